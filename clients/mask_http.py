"""Speak with a running server's mask routes: `/v1/masks` and what is under it."""

from typing import Any
from urllib.parse import quote

import httpx

from moescope.tracer.errors import InputError
from moescope.tracer.mask import Mask

TIMEOUT_S = 30.0


def push_mask(mask: Mask, url: str, admin_key: str | None = None) -> dict[str, Any]:
    """Put the mask on the server; returns its answer, which has `name` and `version`."""
    return _call("PUT", url, f"/{mask.name}", admin_key, mask.to_json())


def list_masks(url: str, admin_key: str | None = None) -> list[dict[str, Any]]:
    """The masks that the server holds: `name`, `version` and more of each."""
    return _field(_call("GET", url, "", admin_key), "data", url)


def delete_mask(name: str, url: str, admin_key: str | None = None) -> dict[str, Any]:
    """Remove a mask; requests that run under it keep it to their end."""
    return _call("DELETE", url, f"/{quote(name, safe='')}", admin_key)


def _call(
    method: str, url: str, path: str, admin_key: str | None, body: str | None = None
) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"} if body is not None else {}
    if admin_key:
        if not admin_key.isascii():
            raise InputError("the admin key has characters that a header can't carry: use ASCII")
        headers["Authorization"] = f"Bearer {admin_key}"
    try:
        response = httpx.request(
            method,
            f"{url.rstrip('/')}/v1/masks{path}",
            headers=headers,
            content=None if body is None else body.encode(),
            timeout=TIMEOUT_S,
        )
    except httpx.ConnectError as error:
        raise InputError(
            f"nothing answers at {url} ({error}): start a server with `moescope serve`, or say "
            "where it is with --url"
        ) from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise InputError(f"can't reach {url}: {str(error) or type(error).__name__}") from None
    try:
        answer = response.json() if response.content else {}
    except ValueError:
        answer = None
    if response.is_error:
        raise InputError(_refusal(url, response.status_code, answer))
    if not response.is_success or not isinstance(answer, dict):
        raise InputError(
            f"{url} answered with HTTP {response.status_code} and no JSON object: is it a moescope "
            "server?"
        )
    return answer


def _refusal(url: str, status: int, answer: Any) -> str:
    """What the server says, as vLLM's errors are written, or at least the status."""
    error = answer.get("error") if isinstance(answer, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    if not message:
        message = (
            "it knows no such route: is it a moescope server?" if status == 404 else "no reason"
        )
    hint = ". Give the admin key with --admin-key or MOESCOPE_ADMIN_KEY" if status == 401 else ""
    return f"{url} refused (HTTP {status}): {message}{hint}"


def _field(answer: dict[str, Any], name: str, url: str) -> Any:
    if name not in answer:
        raise InputError(f'{url} answered without "{name}": is it a moescope server?')
    return answer[name]
