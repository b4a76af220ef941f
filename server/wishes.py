"""What an inference request wants of moescope, from its headers and its body.

    X-Steering-Mask: NAME[@VERSION] | none      vllm_xargs: {"moescope_mask": ...}
    X-Trace: on | off                                       {"moescope_trace": ...}
    X-Trace-Run: RUN                                        {"moescope_run": ...}

A header and its twin in the body may both be there if they say the same.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers

from moescope.tracer.errors import InputError
from moescope.tracer.format import DEFAULT_RUN
from moescope.tracer.request import PREFIX

MASK_HEADER, TRACE_HEADER, RUN_HEADER = "x-steering-mask", "x-trace", "x-trace-run"
HEADERS = (MASK_HEADER, TRACE_HEADER, RUN_HEADER)
XARGS = "vllm_xargs"
MASK, TRACE, RUN = "moescope_mask", "moescope_trace", "moescope_run"
_TWINS = {MASK_HEADER: MASK, TRACE_HEADER: TRACE, RUN_HEADER: RUN}
_TRACED = (RUN, "moescope_example_id", "moescope_condition", "moescope_spans")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a request says; None where it says nothing.

    `masks`: the names given, in the header and in the body. `traced`: a word in the body or the
    header of a run implies tracing.
    """

    masks: tuple[str, ...]
    trace: bool | None
    run: str | None
    traced: bool


def check_run(run: str) -> str:
    """The name, if it can be a run's."""
    if not _RUN_NAME.fullmatch(run):
        raise InputError(
            f"{run!r} can't be a run's name: use up to 200 letters, digits, dots, dashes and "
            "underscores that begin with a letter or digit"
        )
    return run


def read_headers(headers: Headers) -> dict[str, str]:
    """The wishes in the headers, by their names in the body; InputError if one makes no sense."""
    said = {}
    for header, name in _TWINS.items():
        values = headers.getlist(header)
        if len(values) > 1:
            raise InputError(f"the header {header} is there {len(values)} times: send one")
        if values:
            said[name] = values[0].strip()
    if said.get(TRACE, "on") not in ("on", "off"):
        raise InputError(f"{TRACE_HEADER} is {said[TRACE]!r}: use on or off")
    if RUN in said:
        check_run(said[RUN])
    return said


def read_body(body: bytes, said: dict[str, str]) -> dict[str, Any] | None:
    """The body as a JSON object; None if it is something else, which vLLM will refuse.

    InputError if there are wishes in the headers: they must never be lost on the way.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        data = None
    if isinstance(data, dict) and isinstance(data.get(XARGS), dict | None):
        return data
    if said:
        raise InputError(
            "the body must be a JSON object, and its vllm_xargs, if there, too: a request with "
            f"{', '.join(header for header, name in _TWINS.items() if name in said)} can't be "
            "passed on without"
        )
    return None


def wishes_in(body: bytes) -> list[str]:
    """The names in the body's `vllm_xargs` that are meant for moescope."""
    if PREFIX.encode() not in body:
        return []
    data = read_body(body, {})
    return [name for name in (data or {}).get(XARGS) or () if name.startswith(PREFIX)]


def read_wishes(data: dict[str, Any], said: dict[str, str]) -> Wishes:
    """The wishes of both places; InputError where they contradict each other.

    Two names of one mask ("calm" and "calm@2") can be told to be the same only by who knows it.
    """
    xargs: dict[str, Any] = data.get(XARGS) or {}
    for header, name in _TWINS.items():
        if name != MASK and name in said and xargs.get(name, said[name]) != said[name]:
            raise InputError(
                f"{header} says {said[name]!r}, and {XARGS}.{name} says {xargs[name]!r}: say it "
                "once, or the same"
            )
    masks = [place[MASK] for place in (said, xargs) if place.get(MASK) is not None]
    if not all(isinstance(mask, str) for mask in masks):
        raise InputError(f"{XARGS}.{MASK} must be a text, NAME or NAME@VERSION or none")
    trace, run = said.get(TRACE, xargs.get(TRACE)), said.get(RUN, xargs.get(RUN))
    switch: dict[Any, bool] = {"on": True, "off": False, True: True, False: False}
    return Wishes(
        masks=tuple(masks),
        # What is none of these is left for the tracer to refuse, and so is a run that is no text.
        trace=switch.get(trace) if isinstance(trace, str | int | float) else None,
        run=run if isinstance(run, str) else None,
        traced=RUN in said or any(name in xargs for name in _TRACED),
    )


def trace_of(wishes: Wishes, started: str | None, *, default: bool) -> str | None:
    """The run that the request is traced into; None if it is not traced.

    `started`: the run that takes requests which name none. `default`: whether requests that say
    nothing are traced anyway.
    """
    traced = wishes.trace
    if traced is None:
        traced = wishes.traced or started is not None or default
    return (wishes.run or started or DEFAULT_RUN) if traced else None


def write_wishes(
    data: dict[str, Any], said: dict[str, str], mask: str | None, run: str | None
) -> dict[str, Any]:
    """The body with the wishes in it: the mask's key, and the run if there is one."""
    xargs = (data.get(XARGS) or {}) | said
    if mask is not None:
        xargs[MASK] = mask
    if run is not None:
        xargs = {TRACE: "on", RUN: run} | xargs
    return data | {XARGS: xargs} if xargs else data
