import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.tracer.errors import InputError
from moescope.tracer.request import TraceRequest, parse_extra_args

OFF = TraceRequest(trace=False)


def test_saying_nothing_is_the_default():
    assert parse_extra_args(None, OFF) is OFF
    assert parse_extra_args({"other": 1}, OFF) is OFF


def test_naming_a_run_turns_tracing_on_and_off_means_off():
    assert parse_extra_args({"moescope_run": "a"}, OFF).trace
    assert not parse_extra_args({"moescope_trace": "off"}, TraceRequest()).trace
    assert not parse_extra_args({"moescope_run": "a", "moescope_trace": "off"}, OFF).trace


def test_spans_come_as_lists_or_as_a_json_string():
    text = parse_extra_args({"moescope_spans": '[["document", 0, 3]]'}, OFF)
    assert text.spans == [("document", 0, 3)]
    assert text == parse_extra_args({"moescope_spans": [["document", 0, 3]]}, OFF)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("moescope_trace", "yes"),
        ("moescope_run", ""),
        ("moescope_run", 3),
        ("moescope_runn", "typo"),
        ("moescope_spans", "[[1, 2"),
        ("moescope_spans", [["a", 3, 3]]),
        ("moescope_spans", [["a", -1, 3]]),
        ("moescope_spans", [["a", 0, 3], ["b", 2, 4]]),
        ("moescope_spans", [["template", 0, 3]]),
        ("moescope_spans", [["a", 0]]),
    ],
)
def test_a_bad_wish_is_named_with_its_value(field, value):
    with pytest.raises(InputError) as error:
        parse_extra_args({field: value}, OFF)
    assert field in str(error.value)
    assert repr(value) in str(error.value) or "[" in str(error.value)


@given(
    st.builds(
        TraceRequest,
        trace=st.booleans(),
        run=st.text(min_size=1, max_size=9),
        example_id=st.none() | st.text(max_size=9),
        condition=st.none() | st.text(max_size=9),
        spans=st.none() | st.just([("document", 2, 5), ("question", 5, 6)]),
    )
)
def test_extra_args_and_back(wishes):
    assert parse_extra_args(wishes.extra_args(), OFF) == wishes


def test_a_mask_alone_leaves_the_rest_as_by_default():
    """Also for a default that was seen before, and one that can't be remembered."""
    for default in (TraceRequest(trace=False), TraceRequest(run="a"), TraceRequest(run="b")):
        for mask in ("m@1", "m@2", "m@1"):
            wishes = parse_extra_args({"moescope_mask": mask}, default)
            assert wishes == default.model_copy(update={"mask": mask})
    for default in (TraceRequest(spans=[("document", 0, 3)]), TraceRequest(spans=[])):
        assert parse_extra_args({"moescope_mask": "m@1"}, default).spans == default.spans
    for bad in ("", 7, "m" * 201):
        with pytest.raises(InputError, match="moescope_mask"):
            parse_extra_args({"moescope_mask": bad}, TraceRequest())
