"""A replica's masks, brought to the registry's from wherever they are."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moescope.deploy.target import Target, apply, concerns, steps_between
from moescope.server.audit import State
from moescope.server.registry import Registry, write_copy
from moescope.tracer.errors import StoreError
from moescope.tracer.mask import Mask, make_mask
from moescope.tracer.mask_format import MaskEntry

NAMES = ("a", "b")
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from(NAMES), st.integers(0, 1)),
        st.tuples(st.just("delete"), st.sampled_from(NAMES), st.just(0)),
        st.tuples(st.just("steer"), st.sampled_from((*NAMES, None)), st.just(0)),
    ),
    max_size=12,
)


def mask_of(name, expert):
    entries = [MaskEntry(layer=0, expert=expert, action="deactivate")]
    return make_mask(name=name, entries=entries)


def change(registry, what, name, expert):
    """Do it, where the state allows it."""
    there = name is not None and registry.state.current(name)
    if what == "put":
        registry.put(mask_of(name, expert), "w")
    elif what == "steer" and (name is None or there):
        registry.set_steering(there or None, "w")
    elif what == "delete" and there and not (registry.state.steering or "").startswith(name):
        registry.delete(name, "w")


def take(registry, step):
    """What a server does when it is told to take a step."""
    if step.what == "put":
        assert registry.put(Mask.model_validate(step.mask), "w")[0].key == step.name
    elif step.what == "delete":
        registry.delete(step.name, "w")
    elif step.what == "steer":
        registry.set_steering(step.name, "w")


def json_of(registry):
    return lambda *key: registry.content(*key).model_dump(mode="json", exclude_none=True)


@given(before=CHANGES, after=CHANGES)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_copy_catches_up_whatever_it_has_missed(before, after):
    with tempfile.TemporaryDirectory() as folder:
        registry = Registry(Path(folder, "shared"))
        for step in before:
            change(registry, *step)
        write_copy(Path(folder, "copy"), registry.copy())
        copy = Registry(Path(folder, "copy"))
        assert copy.state == registry.state
        for step in after:
            change(registry, *step)
        have, want = Target(copy.state), Target(registry.state)
        for step in steps_between(have, want, json_of(registry)):
            take(copy, step)
            have = apply(have, step)
            assert have.state == copy.state
        assert copy.state == registry.state
        assert copy.copy().masks == registry.copy().masks
        assert steps_between(have, want, json_of(registry)) == []
        registry.close()
        copy.close()


def test_a_copy_knows_the_numbers_of_versions_whose_files_are_gone(tmp_path):
    registry = Registry(tmp_path / "shared")
    for expert in (0, 1):
        registry.put(mask_of("a", expert), "w")
    registry.close()
    (tmp_path / "shared" / "a" / "2.json").unlink()
    registry = Registry(tmp_path / "shared")
    write_copy(tmp_path / "copy", registry.copy())
    copy = Registry(tmp_path / "copy")
    assert copy.state == registry.state
    assert copy.put(mask_of("a", 5), "w")[0].key == registry.put(mask_of("a", 5), "w")[0].key
    registry.close()
    copy.close()


@pytest.mark.parametrize(
    ("have", "want"),
    [
        (State({"a": 3}), State({"a": 2})),
        (State({"a": 2}, {"a": 2}), State({"a": 2})),
        (State({"a": 2}), State({"a": 3}, {"a": 1})),
    ],
)
def test_a_copy_of_another_registry_is_refused(have, want):
    with pytest.raises(StoreError, match="mask a is not as the registry has it"):
        steps_between(Target(have), Target(want), lambda _, version: {"v": version})


def test_runs_are_stopped_before_another_is_started():
    state = State()
    steps = steps_between(Target(state, "one"), Target(state, "two"), lambda *_: {})
    assert [(step.what, step.name) for step in steps] == [("stop", "one"), ("start", "two")]
    steps = steps_between(Target(state, "one"), Target(state), lambda *_: {})
    assert [(step.what, step.name) for step in steps] == [("stop", "one")]


def test_which_requests_a_change_is_about():
    before = Target(State({"a": 1, "b": 1}))
    assert concerns(before, Target(State({"a": 2, "b": 1}))) == {"a"}
    assert concerns(before, Target(State({"a": 1, "b": 1}, {"b": 1}))) == {"b"}
    assert concerns(before, Target(State({"a": 1, "b": 1}, {}, "a@1"))) is None
    assert concerns(before, Target(before.state, "run")) is None
