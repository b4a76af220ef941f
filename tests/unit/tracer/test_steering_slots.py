"""The slots of one worker: what lies in them, alone and together with the global mask."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moescope.tracer.errors import TracerError
from moescope.tracer.format import MoeShape
from moescope.tracer.mask import (
    ComposeError,
    RouterSpec,
    compile_mask,
    compose,
    make_mask,
)
from moescope.tracer.mask_format import NO_MASK
from moescope.tracer.steering import NO_MASK_SLOT, Steering

SHAPE = MoeShape((1, 2, 5), num_experts=8, top_k=2)
SPEC = RouterSpec("softmax", renormalize=False)


def mask(name, *experts, action="deactivate", layer=1, **fields):
    entries = [{"layer": layer, "expert": e, "action": action} for e in experts]
    return make_mask(name=name, entries=entries, **fields)


def open_steering(composes, num_slots=3):
    biases = [None] * len(SHAPE.layers)
    return Steering(SHAPE, SPEC, biases, num_slots, 16, torch.device("cpu"), composes=composes)


@pytest.fixture
def steering():
    return open_steering(composes=True)


def off(steering, slot, layer=0):
    """The experts that a slot switches off in a layer (0-based)."""
    if not steering.tables.touched[slot, layer]:
        return []
    return torch.nonzero(steering.tables.action[slot, layer] == 1).flatten().tolist()


def snapshot(steering):
    tables = {
        name: value.clone()
        for name, value in vars(steering.tables).items()
        if isinstance(value, torch.Tensor)
    }
    return tables, dict(steering.keys), steering.global_key


def same(one, other):
    return one[1:] == other[1:] and all(
        torch.equal(one[0][name], other[0][name]) for name in one[0]
    )


@pytest.mark.parametrize("first", ["own", "global"])
def test_both_masks_are_in_force_whichever_comes_first(steering, first):
    if first == "global":
        steering.set_global("all@1", mask("all", 0))
    assert steering.load(1, "own@1", mask("own", 1))
    steering.set_global("all@1", mask("all", 0))
    assert (off(steering, 0), off(steering, 1)) == ([0], [0, 1])
    steering.set_global("other@1", mask("other", 7, layer=2))
    assert (off(steering, 1), off(steering, 1, layer=1)) == ([1], [7])
    steering.set_global(None, None)
    assert (off(steering, 0), off(steering, 1), off(steering, 1, layer=1)) == ([], [1], [])
    assert steering.load(2, "late@1", mask("late", 5))
    assert off(steering, 2) == [5]


def test_the_mask_of_nothing_has_nothing_of_the_global_one(steering):
    steering.set_global("all@1", mask("all", 0))
    steering.begin("r", NO_MASK_SLOT, "none")
    steering.assign(["r"], np.array([3]))
    slot = int(steering.tables.token_slots[0])
    assert not steering.tables.touched[slot].any()


def test_an_own_mask_alone_stands_in_place_of_the_global_one():
    steering = open_steering(composes=False)
    steering.set_global("all@1", mask("all", 0, mode="steermoe"))
    steering.load(1, "own@1", mask("own", 1))
    assert off(steering, 1) == [1]
    steering.set_global("other@1", mask("other", 7))
    assert (off(steering, 0), off(steering, 1)) == ([7], [1])


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (mask("bad", 4, 5, action="activate"), "together: layer 1 has 3 activated experts"),
        (mask("bad", 0, mode="steermoe"), "they can't be in force together"),
    ],
)
def test_a_refusal_names_both_and_leaves_everything_as_it_was(steering, bad, words):
    two = mask("two", 3, action="activate")
    steering.set_global("all@1", mask("all", 7))
    steering.load(1, "one@1", mask("one"))
    steering.load(2, "two@1", two)
    before = snapshot(steering)
    with pytest.raises(ComposeError, match=rf"^the global mask bad@1 .*mask two@1 .*{words}"):
        steering.set_global("bad@1", bad)
    assert same(snapshot(steering), before)
    steering.unload([2])
    steering.set_global("bad@1", bad)
    before = snapshot(steering)
    with pytest.raises(ComposeError, match=rf"^the global mask bad@1 .*mask two@1 .*{words}"):
        steering.load(2, "two@1", two)
    assert same(snapshot(steering), before)


def test_a_slot_is_emptied_when_nobody_runs_in_it(steering):
    steering.set_global("all@1", mask("all", 0))
    for slot in (1, 2):
        steering.load(slot, f"m{slot}@1", mask(f"m{slot}", slot))
    steering.begin("r", 1, "m1@1")
    assert not steering.unload([1, 2])
    assert (off(steering, 1), off(steering, 2)) == ([0, 1], [])
    assert steering.keys.keys() == {NO_MASK_SLOT, 1}
    with pytest.raises(TracerError, match="1 requests still run"):
        steering.unload_all()
    with pytest.raises(TracerError, match="must not run unsteered"):
        steering.begin("late", 2, "m2@1")
    steering.finish(["r"])
    assert steering.unload([1, 3])
    steering.set_global("other@1", mask("other", 5))
    assert (off(steering, 1), off(steering, 2)) == ([], [])


masks = st.builds(
    mask,
    st.just("m"),
    st.integers(0, 3),
    st.integers(4, 7),
    action=st.sampled_from(["deactivate", "activate"]),
    layer=st.sampled_from([1, 2]),
)


@given(st.lists(st.tuples(st.integers(0, 3), st.none() | masks), max_size=12))
def test_every_slot_always_holds_its_mask_with_the_global_one(steps):
    """Slot 0 stands for the global mask; no mask for a slot means that it is emptied."""
    steering, own, base = open_steering(composes=True), {}, None
    for number, (slot, given_mask) in enumerate(steps):
        table = None if given_mask is None else compile_mask(given_mask, SHAPE)
        key = None if given_mask is None else f"m@{number}"
        try:
            if slot == 0:
                steering.set_global(key, given_mask)
                base = table
            elif given_mask is None:
                steering.unload([slot])
                own.pop(slot, None)
            else:
                steering.load(slot, key, given_mask)
                own[slot] = table
        except ComposeError:
            pass
        for at in range(1, 4):
            if at not in own:
                assert not steering.tables.touched[at].any()
                continue
            expected = own[at] if base is None else compose(base, own[at])
            assert (steering.tables.action[at].numpy() == expected.action).all()
            assert (steering.tables.touched[at].numpy() == expected.touched).all()


def test_a_request_of_the_same_name_is_not_steered_by_the_one_before(steering):
    """Its batch looks as the one before: the same name, as many tokens."""
    assert steering.load(1, "m@1", mask("m", 3))
    one = np.ones(1, np.int32)
    steering.begin("a", 1, "m@1")
    steering.assign(["a"], one)
    assert steering.tables.token_slots[0] == 1
    steering.finish(["a"])
    steering.assign(["a"], one)  # another request, which names no mask
    assert steering.tables.token_slots[0] == 0
    steering.begin("a", NO_MASK_SLOT, NO_MASK)
    steering.assign(["a"], one)
    assert steering.tables.token_slots[0] == steering.num_slots + 1
