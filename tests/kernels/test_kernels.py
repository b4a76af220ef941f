"""The Triton kernels against their CPU twins: on a GPU, or in Triton's interpreter without one.

TRITON_INTERPRET=1 pytest tests/kernels        (`make test` does; it installs Triton aside)
"""

import os

import numpy as np
import pytest
import torch
from routing_cases import (
    FAMILIES,
    LAYER,
    plain_routing,
    random_correction,
    random_logits,
    random_mask,
    tables_with,
)

from moescope.tracer.format import MoeShape
from moescope.tracer.mask import RouterSpec, compile_mask, make_mask
from moescope.tracer.recorder import pack_on_cpu, store_on_cpu
from moescope.tracer.reroute import SteerTables
from moescope.tracer.reroute import steer as steer_on_cpu

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from moescope.tracer.kernels import pack, route, steer, store  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
TOKENS = 6


def on_device(tables):
    for name, tensor in vars(tables).items():
        if isinstance(tensor, torch.Tensor):
            setattr(tables, name, tensor.to(DEVICE))
    return tables


def steered(logits, weights, ids, slots, tables, spec, correction, *, in_place):
    """The kernel's weights and ids, on the CPU again."""
    given = [t.to(DEVICE) for t in (logits, weights.clone(), ids.clone(), slots)]
    room = given[1:3] if in_place else [torch.full_like(t, 9) for t in given[1:3]]
    if correction is not None:
        correction = correction.to(DEVICE)
    steer(LAYER, *given, on_device(tables), spec, correction, *room)
    return room[0].cpu(), room[1].cpu()


def routed(logits, slots, tables, spec, correction, padding=None):
    """What the fused kernel decides, on the CPU again."""
    shape = len(logits), tables.shape.top_k
    room = torch.zeros(shape, device=DEVICE), torch.zeros(shape, device=DEVICE).int()
    if correction is not None:
        correction = correction.to(DEVICE)
    given = logits.to(DEVICE), slots.to(DEVICE), on_device(tables), spec, correction
    route(LAYER, *given, *room, None if padding is None else padding.to(DEVICE))
    return room[0].cpu(), room[1].cpu()


@pytest.mark.parametrize("spec", FAMILIES.values(), ids=FAMILIES)
def test_fused_routing_is_the_routers_own_and_then_the_masks(spec):
    for seed in range(5 if INTERPRETED else 200):
        rng = np.random.default_rng(seed)
        logits, correction = random_logits(rng, TOKENS), random_correction(rng, spec)
        # Equal scores: the lower expert, in the router's choice and in the mask's.
        weights, ids = plain_routing(logits, spec, correction, LowestFirst)
        paper = spec.scoring == "softmax" and rng.random() < 0.5
        masks = [random_mask(rng, steermoe=paper), random_mask(rng)]
        slots = torch.tensor(rng.integers(0, 3, TOKENS), dtype=torch.int32)
        tables = tables_with(*masks)
        right = steer_on_cpu(LAYER, logits, weights, ids, slots, tables, spec, correction)
        padding = torch.arange(TOKENS) == TOKENS - 1
        mine = routed(logits, slots, tables_with(*masks), spec, correction, padding)
        assert (mine[1][-1] == -1).all()
        assert not mine[0][-1].any()
        # Where the router chose both of two equal experts, their order may differ.
        by_id = [r[1][:-1].long().argsort(-1) for r in (mine, right)]
        ours, theirs = (
            (r[1][:-1].gather(1, o), r[0][:-1].gather(1, o))
            for r, o in zip((mine, right), by_id, strict=True)
        )
        assert torch.equal(ours[0], theirs[0]), f"seed {seed}"
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-7)


class LowestFirst:
    """In place of a random generator, for `plain_routing`: the order as it is."""

    @staticmethod
    def permutation(given):
        return np.arange(given) if isinstance(given, int) else np.asarray(given)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("spec", FAMILIES.values(), ids=FAMILIES)
def test_masks_route_as_the_cpu_twin_does(spec, in_place):
    for seed in range(5 if INTERPRETED else 200):
        rng = np.random.default_rng(seed)
        logits, correction = random_logits(rng, TOKENS), random_correction(rng, spec)
        weights, ids = plain_routing(logits, spec, correction, rng)
        ids[-1, 0] = -1  # padding
        paper = spec.scoring == "softmax" and rng.random() < 0.5
        masks = [random_mask(rng, steermoe=paper), random_mask(rng)]
        slots = torch.tensor(rng.integers(0, 3, TOKENS), dtype=torch.int32)
        tables = tables_with(*masks)
        right = steer_on_cpu(LAYER, logits, weights, ids, slots, tables, spec, correction)
        mine = steered(
            logits, weights, ids, slots, tables_with(*masks), spec, correction, in_place=in_place
        )
        untouched = (slots == 0) | (torch.arange(TOKENS) == TOKENS - 1)
        assert torch.equal(mine[0][untouched], weights[untouched])
        assert torch.equal(mine[1][untouched], ids[untouched])
        # Scores that a ulp tells apart may change places; there are none among these logits.
        assert torch.equal(mine[1], right[1]), f"seed {seed}"
        torch.testing.assert_close(mine[0], right[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("experts", "k", "spec"),
    [
        (64, 6, RouterSpec("softmax", False)),
        (128, 8, RouterSpec("softmax", True)),
        (160, 6, RouterSpec("softmax", False, 8, 3, scaling=16.0)),
        (256, 8, RouterSpec("sigmoid", True, 8, 4, True, 2.5)),
        (60, 4, RouterSpec("softmax", False)),
        (8, 2, RouterSpec("softmax", True)),
        (384, 8, RouterSpec("sigmoid", True, correction_bias=True, scaling=2.8)),
    ],
)
def test_shapes_of_published_models(experts, k, spec):
    rng = np.random.default_rng(experts)
    shape = MoeShape((0, 1), experts, k)
    tokens = 5 if INTERPRETED else 700
    logits = torch.tensor(rng.normal(size=(tokens, experts)) * 2).bfloat16()
    # Distinct in float32, so that no tie is decided by how a score was rounded.
    logits = logits.float() + torch.arange(experts) * 1e-3
    correction = None
    if spec.correction_bias:
        correction = torch.tensor(rng.normal(size=experts), dtype=torch.float32)
    entries = []
    for layer in shape.layers:
        order = rng.permutation(experts).tolist()
        entries += [{"layer": layer, "expert": e, "action": "deactivate"} for e in order[: k - 1]]
        entries += [{"layer": layer, "expert": e, "action": "activate"} for e in order[-2:]]
        entries += [
            {"layer": layer, "expert": e, "action": "bias", "value": 1.0} for e in order[k : k + 2]
        ]
    table = compile_mask(make_mask(name="m", entries=entries), shape)
    tables = SteerTables(shape, 2, tokens)
    tables.set_slot(1, table)
    slots = torch.arange(tokens, dtype=torch.int32) % 2
    # A mask that changes nothing stands for vLLM's router.
    nothing = SteerTables(shape, 1, tokens)
    nothing.touched.fill_(True)
    nothing.reroutes.fill_(True)
    start = torch.zeros(tokens, k), torch.arange(k, dtype=torch.int32).repeat(tokens, 1)
    zeros = torch.zeros(tokens, dtype=torch.int32)
    weights, ids = steer_on_cpu(LAYER, logits, *start, zeros, nothing, spec, correction)
    right = steer_on_cpu(LAYER, logits, weights, ids, slots, tables, spec, correction)
    mine = steered(logits, weights, ids, slots, tables, spec, correction, in_place=True)
    differ = (mine[1] != right[1]).any(-1)
    assert differ.sum() <= tokens // 500, f"{differ.sum()} of {tokens} tokens"
    torch.testing.assert_close(mine[0][~differ], right[0][~differ], rtol=1e-5, atol=1e-7)
    fused = routed(logits, slots, tables, spec, correction)
    differ = (fused[1] != right[1]).any(-1)
    assert differ.sum() <= tokens // 500, f"{differ.sum()} of {tokens} tokens"
    torch.testing.assert_close(fused[0][~differ], right[0][~differ], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("k", [1, 2, 6, 8, 10])
@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_rows_are_packed_as_the_cpu_twin_packs_them(k, rows, dtype):
    if INTERPRETED and rows > 7:
        rows = 20
    layers, max_tokens = 9, 2 * rows
    generator = torch.Generator().manual_seed(k * rows)
    # Rounded, so that there are ties.
    weights = torch.rand(layers, max_tokens, k, generator=generator).mul(20).round().div(20)
    ids = torch.rand(layers, max_tokens, 200, generator=generator).argsort(-1)[..., :k].int()
    positions, tokens = torch.arange(max_tokens) + 5, torch.arange(max_tokens) * 3
    for places in (None, torch.arange(1, max_tokens, 2)):
        packed = []
        for device in (DEVICE, "cpu"):
            out = [
                torch.zeros(rows + 3, dtype=torch.int32, device=device),
                torch.zeros(rows + 3, dtype=torch.int32, device=device),
                torch.zeros(rows + 3, layers * k, dtype=dtype, device=device),
                torch.zeros(rows + 3, layers * k, dtype=torch.float16, device=device),
            ]
            step = [t.to(device) for t in (weights, ids, positions, tokens)]
            if device == DEVICE and not packed:
                pack(*step, None if places is None else places.to(device), out, rows, 2)
            else:
                pack_on_cpu(*step, places, [column[2 : rows + 2] for column in out])
            packed.append([t.cpu().float() for t in out])
        for mine, twin in zip(*packed, strict=True):
            assert torch.equal(mine, twin)


def test_what_a_router_left_elsewhere_is_stored():
    weights, ids = torch.rand(300, 6), torch.randint(0, 64, (300, 6))
    for keep, device in ((store, DEVICE), (store_on_cpu, "cpu")):
        out = torch.zeros(300, 6, device=device), torch.zeros(300, 6, device=device).int()
        keep(weights.to(device), ids.to(device), *out)
        assert torch.equal(out[0].cpu(), weights)
        assert torch.equal(out[1].cpu(), ids.int())
