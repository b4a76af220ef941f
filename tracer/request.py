"""What one request asks of the tracer, and how it says so.

A request carries its wishes in vLLM's `SamplingParams.extra_args` (over HTTP: `vllm_xargs`):

    moescope_trace       "on" or "off"
    moescope_run         name of the run; "default" if absent
    moescope_example_id  what the request is an instance of; pairs of conditions share it
    moescope_condition   "with_doc", "without_doc", ...
    moescope_spans       [["document", 3, 40], ...]: segments as [start, stop) token positions of
                         the prompt, ascending and disjoint; over HTTP the same as a JSON string
    moescope_mask        the mask to be steered by, "name@version", or "none"

Naming any of them but `moescope_trace` and `moescope_mask` turns tracing on.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from moescope.tracer.errors import InputError
from moescope.tracer.format import DEFAULT_RUN, TEMPLATE

PREFIX = "moescope_"
RESOLVED = "moescope"  # the key of the checked request, from the front-end to the worker

Span = tuple[str, int, int]


class TraceRequest(BaseModel):
    """A request's wishes; `extra_args()` is what to put into `SamplingParams`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trace: bool = True
    run: str = Field(DEFAULT_RUN, min_length=1, max_length=200)
    example_id: str | None = Field(None, max_length=1000)
    condition: str | None = Field(None, max_length=200)
    spans: list[Span] | None = None
    mask: str | None = Field(None, min_length=1, max_length=200)

    @field_validator("trace", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        switch = {"on": True, "off": False}
        if isinstance(value, str) and value not in switch:
            raise ValueError('must be "on" or "off"')
        return switch[value] if isinstance(value, str) else value

    @field_validator("spans", mode="before")
    @classmethod
    def _from_json(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                return json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"is not JSON ({error})") from None
        return value

    @field_validator("spans")
    @classmethod
    def _ordered(cls, spans: list[Span] | None) -> list[Span] | None:
        before = 0
        for name, start, stop in spans or ():
            if not name or name == TEMPLATE:
                raise ValueError(f'a segment can\'t be named "{name}"')
            if not before <= start < stop:
                raise ValueError(
                    f"[{name!r}, {start}, {stop}] is empty, or overlaps or precedes the one "
                    "before it"
                )
            before = stop
        return spans

    def extra_args(self) -> dict[str, Any]:
        """This request in the form that `SamplingParams(extra_args=...)` takes."""
        fields = self.model_dump(exclude={"trace"}, exclude_none=True)
        on = {"trace": "on" if self.trace else "off"}
        return {PREFIX + name: value for name, value in (on | fields).items()}


def parse_extra_args(extra_args: Mapping[str, Any] | None, default: TraceRequest) -> TraceRequest:
    """The wishes in `extra_args`, over those of `default`; InputError names a bad one."""
    given = {
        key.removeprefix(PREFIX): value
        for key, value in (extra_args or {}).items()
        if key.startswith(PREFIX)
    }
    if not given:
        return default
    if given.keys() == {"mask"} and isinstance(given["mask"], str) and default.spans is None:
        return _with_mask(default, given["mask"])
    return _over(default, given)


def _over(default: TraceRequest, given: dict[str, Any]) -> TraceRequest:
    if given.keys() - {"trace", "mask"}:
        given.setdefault("trace", True)
    try:
        return TraceRequest.model_validate(default.model_dump() | given)
    except ValidationError as error:
        problems = "; ".join(
            f"{PREFIX}{'.'.join(map(str, item['loc']))} = {item['input']!r}: "
            f"{item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        )
        raise InputError(
            f"{problems}. Known: {', '.join(PREFIX + name for name in TraceRequest.model_fields)}"
        ) from None


@functools.lru_cache(maxsize=1024)
def _with_mask(default: TraceRequest, mask: str) -> TraceRequest:
    """What most steered requests say; many say the same."""
    return _over(default, {"mask": mask})
