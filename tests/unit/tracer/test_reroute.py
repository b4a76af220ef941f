"""Routing under masks, against plain Python that does one token at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_cases import (
    EXPERTS,
    FAMILIES,
    GROUPS,
    LAYER,
    SCORES_64,
    SHAPE,
    TOP_K,
    choice_scores,
    plain_routing,
    random_correction,
    random_logits,
    random_mask,
    reference_choice,
    reference_weights,
    tables_with,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from moescope.tracer.format import MoeShape
from moescope.tracer.mask import ACTIVATE, DEACTIVATE, RouterSpec, compile_mask, make_mask
from moescope.tracer.reroute import SteerTables, steer

families = pytest.mark.parametrize("spec", FAMILIES.values(), ids=FAMILIES)
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=25, deadline=None)


def route(tables, slots, logits, weights, ids, spec, correction):
    slots = torch.tensor(np.broadcast_to(slots, len(logits)).copy(), dtype=torch.int32)
    return steer(LAYER, logits, weights, ids, slots, tables, spec, correction)


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


# The rules.


@families
@few
@given(seed=seeds)
def test_hard_masks_equal_the_reference(spec, seed):
    rng = np.random.default_rng(seed)
    logits, correction = random_logits(rng), random_correction(rng, spec)
    weights, ids = plain_routing(logits, spec, correction, rng)
    mask = random_mask(rng)
    table = compile_mask(mask, SHAPE)
    action, scale = table.action[LAYER], table.scale[LAYER].astype(np.float64)
    tables = tables_with(mask)
    tables.touched[1, LAYER] = tables.reroutes[1, LAYER] = True
    new_weights, new_ids = route(tables, 1, logits, weights, ids, spec, correction)
    edited = logits + torch.from_numpy(table.bias[LAYER])
    for token, scores in enumerate(choice_scores(edited, spec, correction)):
        before = set(ids[token].tolist())
        priority = [(e not in before, e) for e in range(EXPERTS)]
        chosen = reference_choice(scores, action, spec, priority)
        assert new_ids[token].tolist() == chosen
        expected = reference_weights(
            edited[token].numpy(), chosen, scale, spec, bool(table.renormalise)
        )
        np.testing.assert_allclose(new_weights[token], expected, rtol=1e-4, atol=1e-6)


@families
@few
@given(seed=seeds)
def test_no_mask_is_violated(spec, seed):
    rng = np.random.default_rng(seed)
    logits, correction = random_logits(rng), random_correction(rng, spec)
    weights, ids = plain_routing(logits, spec, correction, rng)
    mask = random_mask(rng, steermoe=spec.scoring == "softmax" and rng.random() < 0.5)
    new_weights, new_ids = route(tables_with(mask), 1, logits, weights, ids, spec, correction)
    action = compile_mask(mask, SHAPE).action[LAYER]
    for chosen in new_ids.tolist():
        assert len(set(chosen)) == TOP_K
        assert not set(chosen) & set(np.flatnonzero(action == DEACTIVATE))
        assert set(np.flatnonzero(action == ACTIVATE)) <= set(chosen)
    assert torch.isfinite(new_weights).all()
    assert (new_weights >= 0).all()


@families
@few
@given(seed=seeds)
def test_no_action_gives_the_routers_own_routing(spec, seed):
    rng = np.random.default_rng(seed)
    logits, correction = random_logits(rng), random_correction(rng, spec)
    if spec.num_groups > 1 and spec.correction_bias:  # groups tie by sums: no telling which it took
        logits, correction = torch.randn_like(logits), torch.randn(EXPERTS)
    weights, ids = plain_routing(logits, spec, correction, rng)
    tables = SteerTables(SHAPE, 1, 8)
    tables.touched[:] = True
    new_weights, new_ids = route(tables, 0, logits, weights, ids, spec, correction)
    assert same_bits(new_weights, weights)
    assert same_bits(new_ids, ids)
    tables.reroutes[:] = True
    new_weights, new_ids = route(tables, 0, logits, weights, ids, spec, correction)
    order, new_order = ids.long().argsort(-1), new_ids.long().argsort(-1)
    assert torch.equal(new_ids.gather(1, new_order), ids.gather(1, order))
    torch.testing.assert_close(
        new_weights.gather(1, new_order), weights.gather(1, order), rtol=1e-4, atol=1e-6
    )


@families
@few
@given(seed=seeds)
def test_scale_alone_keeps_the_choice(spec, seed):
    rng = np.random.default_rng(seed)
    logits, correction = random_logits(rng), random_correction(rng, spec)
    weights, ids = plain_routing(logits, spec, correction, rng)
    factors = rng.choice([0.0, 0.25, 1.0, 2.0], EXPERTS)
    entries = [
        {"layer": 4, "expert": e, "action": "scale", "value": f} for e, f in enumerate(factors)
    ]
    masks = [make_mask(name="s", entries=entries, renormalise=again) for again in (False, True)]
    tables = tables_with(*masks)
    new_weights, new_ids = route(tables, 1, logits, weights, ids, spec, correction)
    expected = weights * torch.tensor(factors, dtype=torch.float32)[ids.long()]
    assert same_bits(new_ids, ids)
    assert same_bits(new_weights, expected)
    again, new_ids = route(tables, 2, logits, weights, ids, spec, correction)
    assert same_bits(new_ids, ids)
    total, rest = weights.sum(-1), expected.sum(-1)
    kept = rest > 1e-37
    torch.testing.assert_close(again.sum(-1)[kept], total[kept], rtol=1e-5, atol=0)
    assert (again[~kept] < 1e-30).all()


def steermoe_rule(logits, action, top_k, renormalize, epsilon):
    """SteerMoE (arXiv 2509.09660) on one token, from its description, in float64."""
    scores = logits - np.log(np.exp(logits).sum())
    most, least = scores.max(), scores.min()
    scores[action == ACTIVATE] = most + epsilon
    scores[action == DEACTIVATE] = least - epsilon
    chosen = np.argsort(-scores, kind="stable")[:top_k]
    weights = (np.exp(scores) / np.exp(scores).sum())[chosen]
    return dict(zip(chosen, weights / weights.sum() if renormalize else weights, strict=True))


@pytest.mark.parametrize("renormalize", [False, True])
@few
@given(seed=seeds, epsilon=st.floats(1e-3, 2))
def test_steermoe_mode_equals_the_papers_rule(renormalize, seed, epsilon):
    rng = np.random.default_rng(seed)
    spec = RouterSpec("softmax", renormalize)
    logits = torch.tensor(rng.normal(size=(4, EXPERTS)) * 3, dtype=torch.float32)
    weights, ids = plain_routing(logits, spec, None, rng)
    mask = random_mask(rng, steermoe=True).model_copy(update={"epsilon": epsilon})
    action = compile_mask(mask, SHAPE).action[LAYER]
    tables = tables_with(mask)
    new_weights, new_ids = route(tables, 1, logits, weights, ids, spec, None)
    if not tables.touched[1, LAYER]:
        return
    for token, row in enumerate(logits.numpy().astype(np.float64)):
        expected = steermoe_rule(row, action, TOP_K, renormalize, epsilon)
        assert set(new_ids[token].tolist()) == set(expected)
        np.testing.assert_allclose(
            new_weights[token], [expected[e] for e in new_ids[token].tolist()], atol=1e-6
        )


@families
@few
@given(seed=seeds)
def test_each_token_is_routed_as_if_its_mask_were_alone(spec, seed):
    rng = np.random.default_rng(seed)
    logits, correction = random_logits(rng, 12), random_correction(rng, spec)
    weights, ids = plain_routing(logits, spec, correction, rng)
    masks = [
        random_mask(rng, steermoe=spec.scoring == "softmax" and number % 2 == 1)
        for number in range(3)
    ]
    tables, slots = tables_with(*masks), rng.integers(0, 4, 12)
    mixed_weights, mixed_ids = route(tables, slots, logits, weights, ids, spec, correction)
    for slot in range(4):
        alone = tables_with(masks[slot - 1]) if slot else tables_with()
        own = slots == slot
        lone_weights, lone_ids = route(alone, int(slot > 0), logits, weights, ids, spec, correction)
        assert same_bits(mixed_ids[own], lone_ids[own])
        assert same_bits(mixed_weights[own], lone_weights[own])
    assert same_bits(mixed_ids[slots == 0], ids[slots == 0])
    assert same_bits(mixed_weights[slots == 0], weights[slots == 0])


# Corners.


def entries_of(action, *experts, **more):
    return [{"layer": 4, "expert": e, "action": action} | more for e in experts]


def steer_one(logits, spec, entries, correction=None, **fields):
    """Ids and weights of one token, as lists."""
    mask = make_mask(name="m", entries=entries, **fields)
    logits = torch.tensor([logits], dtype=torch.float32)
    ids = torch.arange(TOP_K, dtype=torch.int32).unsqueeze(0)
    weights = torch.full((1, TOP_K), 0.25)
    weights, ids = route(tables_with(mask), 1, logits, weights, ids, spec, correction)
    return ids[0].tolist(), weights[0].tolist()


def test_activate_reaches_into_groups_that_would_not_be_chosen():
    logits = [9.0] * 4 + [8.0] * 4 + [1.0] * 4 + [0.0] * 4
    for name in ("grouped softmax", "grouped sigmoid with bias"):
        spec = FAMILIES[name]
        correction = torch.zeros(EXPERTS) if spec.correction_bias else None
        ids, _ = steer_one(logits, spec, entries_of("activate", 9, 15), correction)
        assert ids == [9, 15, 0, 1]


def test_starved_groups_are_filled_up_from_the_others_by_score():
    logits = [9.0, 8, 7, 6, 5, 4, 3, 2, 0.5, 1, 1.5, 0, 0, 0.75, 0, 0]
    spec = RouterSpec("softmax", False, GROUPS, 1)
    ids, _ = steer_one(logits, spec, entries_of("deactivate", 1, 2, 3))
    assert ids == [0, 4, 5, 6]
    # A group's score is of its usable experts: with 0 out too, the second group is the best one.
    ids, _ = steer_one(logits, spec, entries_of("deactivate", 0, 1, 2, 3, 6, 7))
    assert ids == [4, 5, 10, 9]


def test_a_group_with_one_usable_expert_is_scored_by_it():
    spec = RouterSpec("sigmoid", False, GROUPS, 1, correction_bias=True)
    logits = [4.0, 0, 0, 0, -1, -1, -1, -1, -9, -9, -9, -9, -9, -9, -9, -9]
    ids, _ = steer_one(logits, spec, entries_of("deactivate", 1, 2, 3), torch.zeros(EXPERTS))
    assert ids[0] == 0
    logits[0] = -1.0  # alone, it is less than the two of the next group
    ids, _ = steer_one(logits, spec, entries_of("deactivate", 1, 2, 3), torch.zeros(EXPERTS))
    assert ids == [4, 5, 6, 7]


def test_renormalised_weights_of_tiny_scores_are_still_weights():
    logits = [500.0] * 8 + [3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0]
    off = entries_of("deactivate", *range(8))
    ids, weights = steer_one(logits, FAMILIES["softmax renormalized"], off)
    exps = [math.exp(x) for x in (3, 2, 1, 0)]
    assert ids == [8, 9, 10, 11]
    assert weights == pytest.approx([x / sum(exps) for x in exps])
    low = [0.0] * 8 + [-200.0] * 8
    for name in ("grouped sigmoid", "sqrtsoftplus with bias"):
        correction = torch.zeros(EXPERTS) if FAMILIES[name].correction_bias else None
        _, weights = steer_one(low, FAMILIES[name], off, correction)
        assert all(math.isfinite(weight) for weight in weights)


def test_without_renormalising_the_others_keep_their_weight():
    logits = np.arange(16.0)[::-1].tolist()
    before = SCORES_64["softmax"](np.array(logits))
    ids, weights = steer_one(logits, FAMILIES["softmax"], entries_of("deactivate", 0, 2))
    assert ids == [1, 3, 4, 5]
    assert weights == pytest.approx(before[ids].tolist())


def test_all_chosen_experts_scaled_to_nothing():
    for again in (False, True):
        entries = entries_of("scale", *range(EXPERTS), value=0.0)
        assert steer_one([0.0] * 16, FAMILIES["softmax"], entries, renormalise=again)[1] == [0] * 4


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64, torch.uint32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_untouched_bits(id_dtype, dtype):
    tables = tables_with(make_mask(name="m", entries=entries_of("deactivate", 0)))
    logits = torch.randn(8, EXPERTS).to(torch.bfloat16)
    logits[0] = torch.nan  # padding may hold anything
    weights = torch.randn(TOP_K, 8).to(dtype).T
    weights[0] = torch.nan
    ids = torch.rand(8, EXPERTS).argsort(-1)[:, :TOP_K].to(id_dtype)
    slots = np.array([0, 1] * 4)
    new_weights, new_ids = route(tables, slots, logits, weights, ids, FAMILIES["softmax"], None)
    assert (new_weights.dtype, new_ids.dtype) == (dtype, id_dtype)
    assert new_weights.is_contiguous()
    assert new_ids.is_contiguous()
    assert same_bits(new_weights[0::2], weights[0::2])
    assert same_bits(new_ids[0::2], ids[0::2])
    assert 0 not in new_ids[1::2].long()


def test_another_layers_mask_touches_nothing():
    mask = make_mask(name="m", entries=[{"layer": 3, "expert": 0, "action": "deactivate"}])
    tables = tables_with(mask)
    assert (tables.touches(0), tables.touches(1)) == (True, False)
    logits, weights = torch.randn(4, EXPERTS), torch.rand(4, TOP_K)
    ids = torch.rand(4, EXPERTS).argsort(-1)[:, :TOP_K]
    new_weights, new_ids = route(tables, 1, logits, weights, ids, FAMILIES["softmax"], None)
    assert same_bits(new_weights, weights)
    assert same_bits(new_ids, ids)


def test_padding_rows_stay_padding():
    tables = tables_with(make_mask(name="m", entries=entries_of("deactivate", 0)))
    ids = torch.tensor([[-1] * TOP_K, [0, 1, 2, 3]], dtype=torch.int32)
    weights = torch.tensor([[0.0] * TOP_K, [0.25] * TOP_K])
    args = torch.randn(2, EXPERTS), weights, ids
    new_weights, new_ids = route(tables, 1, *args, FAMILIES["softmax"], None)
    assert new_ids[0].tolist() == [-1] * TOP_K
    assert not new_weights[0].any()
    assert 0 not in new_ids[1]


def test_slots_are_written_in_place():
    tables = SteerTables(SHAPE, 3, 8)
    tensors = {k: v for k, v in vars(tables).items() if isinstance(v, torch.Tensor)}
    places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    rng = np.random.default_rng(0)
    masks = [random_mask(rng), random_mask(rng, steermoe=True)]
    for mask in masks * 2:
        tables.set_slot(1, compile_mask(mask, SHAPE))
        tables.set_slot(2, compile_mask(masks[0], SHAPE))
        fresh = tables_with(mask, masks[0])
        for name in tensors.keys() - {"token_slots"}:
            assert torch.equal(getattr(tables, name), getattr(fresh, name)), name
    assert {name: getattr(tables, name).data_ptr() for name in tensors} == places
    tables.clear_slot(1)
    assert not tables.touched[1].any()
    assert tables.touches(0)
    tables.clear_slot(2)
    assert not tables.touches(0)
    other = MoeShape((3,), EXPERTS, TOP_K)
    with pytest.raises(ValueError, match="the table is for"):
        tables.set_slot(1, compile_mask(make_mask(name="m", entries=[]), other))


@families
def test_nothing_waits_for_the_device_or_depends_on_data(spec):
    # A fake tensor has a shape and no data: to read a value or to shape by it is an error.
    with FakeTensorMode():
        tables = SteerTables(SHAPE, 4, 8)
        weights, ids = steer(
            LAYER,
            torch.empty(8, EXPERTS, dtype=torch.bfloat16),
            torch.empty(8, TOP_K),
            torch.empty(8, TOP_K, dtype=torch.int32),
            tables.token_slots,
            tables,
            spec,
            torch.empty(EXPERTS) if spec.correction_bias else None,
        )
    assert weights.shape == ids.shape == (8, TOP_K)
