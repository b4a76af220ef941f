import json

import pytest
from starlette.datastructures import Headers

from moescope.server.wishes import read_body, read_headers, read_wishes, trace_of, write_wishes
from moescope.tracer.errors import InputError


def resolved(headers=None, body=None, *, started=None, default=False, key=None):
    """(run, the xargs that vLLM gets) of a request."""
    said = read_headers(Headers(headers or {}))
    data = read_body(json.dumps(body or {}).encode(), said)
    wishes = read_wishes(data, said)
    run = trace_of(wishes, started, default=default)
    return run, write_wishes(data, said, key, run).get("vllm_xargs")


def test_who_says_nothing_is_left_alone():
    assert resolved() == (None, None)
    assert resolved(body={"vllm_xargs": {"other": 1}}) == (None, {"other": 1})
    assert resolved(body={"vllm_xargs": None}) == (None, None)


def test_headers_become_xargs():
    assert resolved({"X-Trace": "on"}) == (
        "default",
        {"moescope_trace": "on", "moescope_run": "default"},
    )
    assert resolved({"X-Trace-Run": "r"}) == ("r", {"moescope_trace": "on", "moescope_run": "r"})
    off = {"moescope_trace": "off"}
    assert resolved({"X-Trace": "off"}) == (None, off)
    assert resolved({"X-Trace": "off"}, default=True, started="s") == (None, off)
    both = off | {"moescope_run": "r"}
    assert resolved({"X-Trace": "off", "X-Trace-Run": "r"}) == (None, both)
    assert resolved({"X-Steering-Mask": "calm"}, key="calm@1") == (
        None,
        {"moescope_mask": "calm@1"},
    )


def test_a_started_run_takes_those_who_name_none():
    took = {"moescope_trace": "on", "moescope_run": "s"}
    assert resolved(started="s") == ("s", took)
    assert resolved({"X-Trace": "on"}, started="s") == ("s", took)
    condition = {"vllm_xargs": {"moescope_condition": "c"}}
    assert resolved(body=condition, started="s") == ("s", took | {"moescope_condition": "c"})
    named = {"vllm_xargs": {"moescope_run": "r"}}
    assert resolved(body=named, started="s") == ("r", took | {"moescope_run": "r"})
    assert resolved(body={"vllm_xargs": {"moescope_trace": "off"}}, started="s")[0] is None


def test_the_engines_default_counts_as_traced():
    assert resolved(default=True)[0] == "default"
    assert resolved(body={"vllm_xargs": {"moescope_trace": "off"}}, default=True)[0] is None


def test_what_the_body_says_badly_is_left_for_the_tracer_to_refuse():
    for xargs in ({"moescope_trace": "maybe"}, {"moescope_run": 3}, {"moescope_trace": [1]}):
        got = resolved(body={"vllm_xargs": xargs}, started="s")[1]
        assert got.items() >= xargs.items()


@pytest.mark.parametrize(
    "headers",
    [
        [("x-trace", "maybe")],
        [("x-trace", "")],
        [("x-trace", "on"), ("x-trace", "off")],
        [("x-steering-mask", "a"), ("X-Steering-Mask", "a")],
        [("x-trace-run", "../up")],
        [("x-trace-run", "a/b")],
        [("x-trace-run", "")],
        [("x-trace-run", ".hidden")],
        [("x-trace-run", "r" * 201)],
    ],
)
def test_bad_headers(headers):
    raw = [(name.lower().encode(), value.encode()) for name, value in headers]
    with pytest.raises(InputError):
        read_headers(Headers(raw=raw))


@pytest.mark.parametrize(
    ("headers", "xargs"),
    [
        ({"X-Trace": "on"}, {"moescope_trace": "off"}),
        ({"X-Trace": "off"}, {"moescope_trace": True}),
        ({"X-Trace-Run": "a"}, {"moescope_run": "b"}),
        ({}, {"moescope_mask": 3}),
        ({"X-Steering-Mask": "a"}, {"moescope_mask": ["a"]}),
    ],
)
def test_contradictions(headers, xargs):
    with pytest.raises(InputError):
        resolved(headers, {"vllm_xargs": xargs})


def test_the_same_said_twice_is_no_contradiction():
    run, xargs = resolved({"X-Trace-Run": "a"}, {"vllm_xargs": {"moescope_run": "a"}})
    assert (run, xargs) == ("a", {"moescope_trace": "on", "moescope_run": "a"})


BODIES = [
    b"",
    b"{",
    b"[]",
    b"3",
    b'"x"',
    b"\xff",
    b"[" * 100_000,
    b'{"vllm_xargs": []}',
    b"1" * 5000,
]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_wishes_are_never_lost_in_a_body_that_can_not_hold_them(body):
    assert read_body(body, {}) is None
    with pytest.raises(InputError, match="x-steering-mask"):
        read_body(body, {"moescope_mask": "calm"})
