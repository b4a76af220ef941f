"""The Triton kernels: what a GPU runs where a CPU runs torch. One launch each.

    steer   edit one layer's routing by the masks of its tokens; its twin is reroute.py
    route   the same without a router before it: score, choose, weigh, mask and record in one
    store   keep one layer's routing that the router left elsewhere
    pack    bring a step's traced rows into the format, all layers at once; its twin is
            `recorder.pack_on_cpu`

All but `store` have a program of one warp for each token: layers have few experts.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from moescope.tracer.mask import RouterSpec

if TYPE_CHECKING:
    from moescope.tracer.reroute import SteerTables

# As in mask.py and reroute.py.
_DEACTIVATE = tl.constexpr(1)
_ACTIVATE = tl.constexpr(2)
_LEAST_SUM = tl.constexpr(1e-37)
_SCORINGS = {"softmax": 0, "sigmoid": 1, "sqrtsoftplus": 2}
_LAYERS_AT_ONCE = 8
_BLOCK = 512


@triton.jit
def _score(x, valid, scoring: tl.constexpr):
    """The router's function of the logits; softmax is over all of them."""
    if scoring == 0:
        top = tl.max(tl.max(tl.where(valid, x, -float("inf")), axis=1), axis=0)
        powers = tl.where(valid, tl.exp(x - top), 0.0)
        out = powers / tl.sum(tl.sum(powers, axis=1), axis=0)
    elif scoring == 1:
        out = 1.0 / (1.0 + tl.exp(-x))
    else:
        power = tl.exp(tl.minimum(x, 20.0))
        more = 1.0 + power
        # log(1 + power), exact also where it is tiny
        log = tl.where(more == 1.0, power, tl.log(more) * (power / (more - 1.0)))
        out = tl.sqrt(tl.where(x > 20.0, x, log))
    return out


@triton.jit
def _ordered(x):
    """Integers in the order of float32 numbers (see `reroute._top`), as int64."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _group_scores(scores, usable, column, biased: tl.constexpr, size: tl.constexpr):
    """By its best expert, or by the sum of its two best; [groups]."""
    grouped = tl.where(usable, scores, -float("inf"))
    best = tl.max(grouped, axis=1)
    if biased and size > 1:
        first = tl.min(tl.where(grouped == best[:, None], column, size), axis=1)
        rest = tl.where(column == first[:, None], -float("inf"), grouped)
        second = tl.max(rest, axis=1)
        best += tl.where(second == -float("inf"), 0.0, second)
    return best


@triton.jit
def _decide(
    logits,
    action,
    bias,
    correction_bias,
    steered,
    papers,
    epsilon,
    old,
    scaling,
    k: tl.constexpr,
    padded_k: tl.constexpr,
    groups: tl.constexpr,
    padded_groups: tl.constexpr,
    size: tl.constexpr,
    padded_size: tl.constexpr,
    topk_groups: tl.constexpr,
    scoring: tl.constexpr,
    renormalizes: tl.constexpr,
    biased: tl.constexpr,
    chosen_before: tl.constexpr,
):
    """One token's experts and their gate weights, [padded_k] each; the rules are in reroute.py.

    `logits`, `action` and `bias` point to the token's and its mask's rows, which are read if it is
    `steered`; `papers`: by SteerMoE's rule. `old`: what the router chose, if `chosen_before`.
    """
    lowest: tl.constexpr = -(2**62)
    rank = tl.arange(0, padded_k)
    ranked = rank < k
    group = tl.arange(0, padded_groups)[:, None]
    column = tl.arange(0, padded_size)[None, :]
    expert = group * size + column
    valid = (group < groups) & (column < size)
    x = tl.load(logits + expert, mask=valid, other=0.0).to(tl.float32)
    act = tl.load(action + expert, mask=valid & steered, other=0)
    edited = x + tl.load(bias + expert, mask=valid & steered, other=0.0)
    if scoring == 0:  # noqa: SIM102 - the first is decided when the kernel is compiled
        if papers:
            most = tl.max(tl.max(tl.where(valid, x, -float("inf")), axis=1), axis=0)
            least = tl.min(tl.min(tl.where(valid, x, float("inf")), axis=1), axis=0)
            powers = tl.where(valid, tl.exp(x - most), 0.0)
            log_sum = tl.log(tl.sum(tl.sum(powers, axis=1), axis=0)) + most
            edited = x - log_sum
            edited = tl.where(act == _ACTIVATE, most - log_sum + epsilon, edited)
            edited = tl.where(act == _DEACTIVATE, least - log_sum - epsilon, edited)

    before = tl.zeros_like(expert)
    if chosen_before:
        for place in tl.static_range(k):
            chosen_id = tl.sum(tl.where(rank == place, old, 0), axis=0)
            before = tl.where(expert == chosen_id, 1, before)
    scores = edited
    if (scoring != 0) | (groups > 1) | biased:
        scores = _score(edited, valid, scoring)
    if biased:
        learned = tl.load(correction_bias + expert, mask=valid, other=0.0)
        scores += learned.to(tl.float32)
    usable = (act != _DEACTIVATE) & valid
    tier = tl.where(usable, 2, 0)
    if groups > 1:
        index = tl.arange(0, padded_groups)
        of_group = _group_scores(scores, usable, column, biased, size)
        was_chosen = tl.max(tl.where(valid, before, 0), axis=1)
        key = (_ordered(of_group) * 2 + was_chosen) * 1024 - index
        key = tl.where(index < groups, key, lowest)
        taken = tl.zeros_like(index)
        for _ in tl.static_range(topk_groups):
            hit = key == tl.max(key, axis=0)
            taken = tl.where(hit, 1, taken)
            key = tl.where(hit, lowest, key)
        tier = tl.where(usable, 1 + taken[:, None], 0)
    tier = tl.where(act == _ACTIVATE, 3, tier)

    keys = tier.to(tl.int64) * 8589934592 + _ordered(scores) * 2 + before
    keys = tl.where(valid, keys * 1024 - expert, lowest)
    new = tl.zeros_like(rank)
    chosen = tl.zeros([padded_k], dtype=tl.float32)
    for place in tl.static_range(k):
        hit = keys == tl.max(tl.max(keys, axis=1), axis=0)
        winner = tl.sum(tl.sum(tl.where(hit, expert, 0), axis=1), axis=0)
        value = tl.sum(tl.sum(tl.where(hit, edited, 0.0), axis=1), axis=0)
        new = tl.where(rank == place, winner, new)
        chosen = tl.where(rank == place, value, chosen)
        keys = tl.where(hit, lowest, keys)

    if scoring == 0:
        if renormalizes:
            top = tl.max(tl.where(ranked, chosen, -float("inf")), axis=0)
            total = tl.sum(tl.where(ranked, tl.exp(chosen - top), 0.0), axis=0)
        else:
            top = tl.max(tl.max(tl.where(valid, edited, -float("inf")), axis=1), axis=0)
            powers = tl.where(valid, tl.exp(edited - top), 0.0)
            total = tl.sum(tl.sum(powers, axis=1), axis=0)
        gate = tl.exp(chosen - (top + tl.log(total)))
    else:
        gate = _score(chosen[None, :], ranked[None, :], scoring).reshape(padded_k)
        if renormalizes:
            gate = gate / tl.maximum(tl.sum(tl.where(ranked, gate, 0.0), axis=0), _LEAST_SUM)
    return new, tl.where(ranked, gate * scaling, 0.0)


@triton.jit
def _rescale(gate, factor, renormalise):
    """Gate weights times their experts' factors, stretched to their old sum if that is asked."""
    scaled = gate * factor
    if renormalise:
        after = tl.sum(scaled, axis=0)
        if after > _LEAST_SUM:
            scaled = scaled * (tl.sum(gate, axis=0) / after)
    return scaled


@triton.jit
def _steer(
    logits,
    logits_stride,
    out_weights,
    out_ids,
    token_slots,
    action,
    bias,
    scale,
    touched,
    steermoe,
    epsilon,
    renormalise,
    correction_bias,
    layer,
    num_layers,
    scaling,
    reroutes,
    old_weights,
    old_weights_stride,
    old_ids,
    old_ids_stride,
    num_experts: tl.constexpr,
    k: tl.constexpr,
    padded_k: tl.constexpr,
    groups: tl.constexpr,
    padded_groups: tl.constexpr,
    size: tl.constexpr,
    padded_size: tl.constexpr,
    topk_groups: tl.constexpr,
    scoring: tl.constexpr,
    renormalizes: tl.constexpr,
    biased: tl.constexpr,
    in_place: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rank = tl.arange(0, padded_k)
    ranked = rank < k
    out = row * k + rank
    old = tl.load(old_ids + row * old_ids_stride + rank, mask=ranked, other=0).to(tl.int32)
    slot = tl.load(token_slots + row)
    cell = slot.to(tl.int64) * num_layers + layer
    is_padding = tl.max(((old < 0) | (old >= num_experts)).to(tl.int32), axis=0) > 0
    if (tl.load(touched + cell) == 0) | is_padding:
        if not in_place:
            weight = tl.load(old_weights + row * old_weights_stride + rank, mask=ranked, other=0.0)
            tl.store(out_weights + out, weight.to(tl.float32), mask=ranked)
            tl.store(out_ids + out, old, mask=ranked)
    else:
        new, gate = _decide(
            logits + row * logits_stride,
            action + cell * num_experts,
            bias + cell * num_experts,
            correction_bias,
            True,
            tl.load(steermoe + slot) != 0,
            tl.load(epsilon + slot),
            old,
            scaling,
            k,
            padded_k,
            groups,
            padded_groups,
            size,
            padded_size,
            topk_groups,
            scoring,
            renormalizes,
            biased,
            chosen_before=True,
        )
        if tl.load(reroutes + cell) == 0:
            new = old
            weight = tl.load(old_weights + row * old_weights_stride + rank, mask=ranked, other=0.0)
            gate = weight.to(tl.float32)
        factor = tl.load(scale + cell * num_experts + new, mask=ranked, other=0.0)
        scaled = _rescale(gate, factor, tl.load(renormalise + slot) != 0)
        tl.store(out_weights + out, scaled, mask=ranked)
        tl.store(out_ids + out, new, mask=ranked)


@triton.jit
def _route(
    logits,
    logits_stride,
    out_weights,
    out_ids,
    token_slots,
    action,
    bias,
    scale,
    touched,
    steermoe,
    epsilon,
    renormalise,
    correction_bias,
    layer,
    num_layers,
    scaling,
    padding,
    num_experts: tl.constexpr,
    k: tl.constexpr,
    padded_k: tl.constexpr,
    groups: tl.constexpr,
    padded_groups: tl.constexpr,
    size: tl.constexpr,
    padded_size: tl.constexpr,
    topk_groups: tl.constexpr,
    scoring: tl.constexpr,
    renormalizes: tl.constexpr,
    biased: tl.constexpr,
    has_padding: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rank = tl.arange(0, padded_k)
    ranked = rank < k
    out = row * k + rank
    skip = False
    if has_padding:
        skip = tl.load(padding + row) != 0
    if skip:
        tl.store(out_weights + out, tl.zeros([padded_k], dtype=tl.float32), mask=ranked)
        tl.store(out_ids + out, tl.zeros([padded_k], dtype=tl.int32) - 1, mask=ranked)
    else:
        slot = tl.load(token_slots + row)
        cell = slot.to(tl.int64) * num_layers + layer
        steered = tl.load(touched + cell) != 0
        new, gate = _decide(
            logits + row * logits_stride,
            action + cell * num_experts,
            bias + cell * num_experts,
            correction_bias,
            steered,
            steered & (tl.load(steermoe + slot) != 0),
            tl.load(epsilon + slot),
            rank,
            scaling,
            k,
            padded_k,
            groups,
            padded_groups,
            size,
            padded_size,
            topk_groups,
            scoring,
            renormalizes,
            biased,
            chosen_before=False,
        )
        factor = tl.load(scale + cell * num_experts + new, mask=ranked & steered, other=1.0)
        scaled = _rescale(gate, factor, steered & (tl.load(renormalise + slot) != 0))
        tl.store(out_weights + out, scaled, mask=ranked)
        tl.store(out_ids + out, new, mask=ranked)


def steer(
    layer: int,
    logits: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    token_slots: torch.Tensor,
    tables: "SteerTables",
    spec: RouterSpec,
    correction_bias: torch.Tensor | None,
    out_weights: torch.Tensor,
    out_ids: torch.Tensor,
) -> None:
    """`reroute.steer` into `out_weights` float32 and `out_ids` int32, contiguous [n, k].

    These may be `weights` and `ids` themselves: tokens that no mask touches then cost nothing.
    """
    assert weights.stride(1) == ids.stride(1) == 1
    if len(ids):
        _steer[(len(ids),)](
            *_arguments(
                layer, logits, token_slots, tables, spec, correction_bias, out_weights, out_ids
            ),
            tables.reroutes,
            weights,
            weights.stride(0),
            ids,
            ids.stride(0),
            **_constants(logits, out_ids, spec, correction_bias),
            in_place=out_ids.data_ptr() == ids.data_ptr(),
            num_warps=1,
        )


def route(
    layer: int,
    logits: torch.Tensor,
    token_slots: torch.Tensor,
    tables: "SteerTables",
    spec: RouterSpec,
    correction_bias: torch.Tensor | None,
    out_weights: torch.Tensor,
    out_ids: torch.Tensor,
    padding: torch.Tensor | None = None,
) -> None:
    """vLLM's routing and `steer` in one: score, choose, weigh, and leave it in the buffers.

    Equal scores go to the lower expert, as in vLLM's kernels. Weights are vLLM's but for the last
    bit. `padding`: bool [n], tokens that get no expert (ids of -1).
    """
    if len(out_ids):
        _route[(len(out_ids),)](
            *_arguments(
                layer, logits, token_slots, tables, spec, correction_bias, out_weights, out_ids
            ),
            token_slots if padding is None else padding,
            **_constants(logits, out_ids, spec, correction_bias),
            has_padding=padding is not None,
            num_warps=1,
        )


def _arguments(
    layer: int,
    logits: torch.Tensor,
    token_slots: torch.Tensor,
    tables: "SteerTables",
    spec: RouterSpec,
    correction_bias: torch.Tensor | None,
    out_weights: torch.Tensor,
    out_ids: torch.Tensor,
) -> tuple[Any, ...]:
    """What both kernels begin with."""
    assert out_weights.is_contiguous() and out_ids.is_contiguous()  # noqa: PT018
    assert logits.stride(1) == 1
    return (
        logits,
        logits.stride(0),
        out_weights,
        out_ids,
        token_slots,
        tables.action,
        tables.bias,
        tables.scale,
        tables.touched,
        tables.steermoe,
        tables.epsilon,
        tables.renormalise,
        tables.bias if correction_bias is None else correction_bias,
        layer,
        len(tables.shape.layers),
        spec.scaling,
    )


def _constants(
    logits: torch.Tensor, ids: torch.Tensor, spec: RouterSpec, correction_bias: torch.Tensor | None
) -> dict[str, Any]:
    """What both kernels are compiled for."""
    num_experts, k, groups = logits.shape[1], ids.shape[1], spec.num_groups
    assert num_experts <= 1024  # an expert's number has ten bits of the key that it is chosen by
    return {
        "num_experts": num_experts,
        "k": k,
        "padded_k": triton.next_power_of_2(k),
        "groups": groups,
        "padded_groups": triton.next_power_of_2(groups),
        "size": num_experts // groups,
        "padded_size": triton.next_power_of_2(num_experts // groups),
        "topk_groups": spec.topk_groups,
        "scoring": _SCORINGS[spec.scoring],
        "renormalizes": spec.renormalize,
        "biased": correction_bias is not None,
    }


@triton.jit
def _store(weights, ids, out_weights, out_ids, count, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < count
    weight = tl.load(weights + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_weights + at, weight, mask=inside)
    tl.store(out_ids + at, tl.load(ids + at, mask=inside, other=0).to(tl.int32), mask=inside)


def store(
    weights: torch.Tensor, ids: torch.Tensor, out_weights: torch.Tensor, out_ids: torch.Tensor
) -> None:
    """Copy `weights` and `ids` [n, k] into `out_weights` float32 and `out_ids` int32 [n, k]."""
    weights, ids = weights.contiguous(), ids.contiguous()
    assert out_weights.is_contiguous() and out_ids.is_contiguous()  # noqa: PT018
    count = ids.numel()
    if count:
        grid = (triton.cdiv(count, _BLOCK),)
        _store[grid](weights, ids, out_weights, out_ids, count, block=_BLOCK)


@triton.jit(do_not_specialize=["first"])  # or it would be compiled anew at some values
def _pack(
    weights,
    ids,
    layer_stride,
    positions,
    tokens,
    places,
    out_positions,
    out_tokens,
    out_weights,
    out_experts,
    first,
    num_layers: tl.constexpr,
    k: tl.constexpr,
    padded_k: tl.constexpr,
    at_once: tl.constexpr,
    all_places: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    out_row = first + row
    if not all_places:
        row = tl.load(places + row).to(tl.int64)
    if tl.program_id(1) == 0:
        tl.store(out_positions + out_row, tl.load(positions + row).to(tl.int32))
        tl.store(out_tokens + out_row, tl.load(tokens + row).to(tl.int32))
    layer = (tl.program_id(1) * at_once + tl.arange(0, at_once))[:, None]
    rank = tl.arange(0, padded_k)[None, :]
    inside = (layer < num_layers) & (rank < k)
    source = layer * layer_stride + row * k + rank
    weight = tl.load(weights + source, mask=inside, other=-float("inf"))
    expert = tl.load(ids + source, mask=inside, other=0)
    # An expert's place is the number of those before it: larger weights, equal ones to the left.
    mine, other = weight[:, :, None], weight[:, None, :]
    left = rank[:, None, :] < rank[:, :, None]
    place = tl.sum(((other > mine) | ((other == mine) & left)).to(tl.int32), axis=2)
    target = (out_row * num_layers + layer) * k + place
    tl.store(out_weights + target, weight.to(out_weights.dtype.element_ty), mask=inside)
    tl.store(out_experts + target, expert.to(out_experts.dtype.element_ty), mask=inside)


def pack(
    weights: torch.Tensor,
    ids: torch.Tensor,
    positions: torch.Tensor,
    tokens: torch.Tensor,
    places: torch.Tensor | None,
    out: Sequence[torch.Tensor],
    rows: int,
    first: int = 0,
) -> None:
    """Gather the rows `places` (None: the first ones) of a step, in one launch.

    Args:
        weights: float32 [layers, max_tokens, k], contiguous; the routers' gate weights.
        ids: int32 [layers, max_tokens, k], contiguous; expert ids.
        positions: int [>= rows].
        tokens: int [>= rows].
        places: integers [rows], which tokens of the step.
        out: positions int32 [n], tokens int32 [n], experts uint8 or uint16 [n, layers * k],
            weights float16 [n, layers * k]; contiguous, on the device or pinned.
        rows: how many.
        first: the first row of `out` to fill.

    """
    out_positions, out_tokens, out_experts, out_weights = out
    num_layers, _, k = ids.shape
    assert weights.is_contiguous() and ids.is_contiguous()  # noqa: PT018
    if not rows:
        return
    _pack[(rows, triton.cdiv(num_layers, _LAYERS_AT_ONCE))](
        weights,
        ids,
        ids.stride(0),
        positions,
        tokens,
        positions if places is None else places,
        out_positions,
        out_tokens,
        out_weights,
        out_experts,
        first,
        num_layers=num_layers,
        k=k,
        padded_k=triton.next_power_of_2(k),
        at_once=_LAYERS_AT_ONCE,
        all_places=places is None,
        num_warps=1,
    )
