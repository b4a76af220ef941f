"""Errors as HTTP answers, in the shape that vLLM's own errors have.

{"error": {"message": "there is no mask calm", "type": "NotFoundError", "param": null,
           "code": 404}}
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from moescope.server.logs import note
from moescope.tracer.errors import (
    InputError,
    MoescopeError,
    SlotsFullError,
)
from moescope.tracer.mask import SignatureError

RETRY_AFTER_S = 1
_MAX_PROBLEMS = 3


class UnknownError(MoescopeError):
    """There is no such mask, version or run."""


class ConflictError(MoescopeError):
    """The server's state does not allow it now; the message says what to do first."""


class AuthError(MoescopeError):
    """The caller may not use the control plane."""


class Problem(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None = None
    code: int


class Refusal(BaseModel):
    """The answer to a request that was refused."""

    error: Problem


# The first class that fits decides: SignatureError is an InputError too.
_KINDS: list[tuple[type[MoescopeError], int, str, str]] = [
    (AuthError, 401, "AuthenticationError", "unauthorized"),
    (UnknownError, 404, "NotFoundError", "unknown"),
    (SignatureError, 409, "ConflictError", "other_model"),
    (ConflictError, 409, "ConflictError", "conflict"),
    (InputError, 422, "UnprocessableEntityError", "invalid"),
    (SlotsFullError, 429, "RateLimitError", "no_slot"),
    (MoescopeError, 503, "ServiceUnavailableError", "unavailable"),
]
BY_VLLM = "vllm"  # vLLM itself refused the request
REASONS = (*(reason for *_, reason in _KINDS), BY_VLLM)
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": str(RETRY_AFTER_S)}}


def refusal(error: MoescopeError) -> JSONResponse:
    """The answer to a request that failed with `error`; its log line says why."""
    _, code, name, reason = next(kind for kind in _KINDS if isinstance(error, kind[0]))
    # Messages quote what was sent, and JSON can hold halves of characters that no answer can.
    message = str(error).encode("utf-8", "replace").decode("utf-8")
    note(reason=reason, detail=message)
    body = Refusal(error=Problem(message=message, type=name, code=code))
    return JSONResponse(body.model_dump(), code, headers=_HEADERS.get(code))


def invalid(errors: Sequence[Mapping[str, Any]]) -> InputError:
    """One error of ours for what FastAPI found wrong with a request."""
    if errors[0]["type"] == "json_invalid":
        return InputError(f"the body is no JSON: {errors[0]['ctx']['error']}")
    problems = [f"{_place(item['loc'])}: {item['msg']}" for item in errors[:_MAX_PROBLEMS]]
    if len(errors) > _MAX_PROBLEMS:
        problems.append(f"and {len(errors) - _MAX_PROBLEMS} more")
    text = "; ".join(problems).replace("Value error, ", "")
    # FastAPI takes a body of another type for a plain string, and its words don't say so.
    if any(item["type"] == "model_attributes_type" for item in errors):
        text += " (is the header Content-Type: application/json there?)"
    return InputError(text)


def _place(loc: Iterable[Any]) -> str:
    return ".".join(str(part) for part in loc if part != "body") or "the body"
