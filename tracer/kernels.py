"""Record one layer on a GPU: order a token's experts by weight, narrow, store, in one launch.

The CPU's twin is `Recorder._record_on_cpu`; both give the same rows.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 64


@triton.jit
def _record(
    weights,
    ids,
    out_weights,
    out_experts,
    num_tokens,
    weights_stride,
    ids_stride,
    out_stride,
    k: tl.constexpr,
    padded_k: tl.constexpr,
    block: tl.constexpr,
):
    rows = tl.program_id(0) * block + tl.arange(0, block)
    columns = tl.arange(0, padded_k)
    inside = (rows[:, None] < num_tokens) & (columns[None, :] < k)
    weight = tl.load(
        weights + rows[:, None] * weights_stride + columns[None, :],
        mask=inside,
        other=-float("inf"),
    ).to(tl.float32)
    expert = tl.load(ids + rows[:, None] * ids_stride + columns[None, :], mask=inside, other=0)
    # An expert's place is the number of those before it: larger weights, equal ones to the left.
    mine, other = weight[:, :, None], weight[:, None, :]
    left = columns[None, None, :] < columns[None, :, None]
    place = tl.sum(((other > mine) | ((other == mine) & left)).to(tl.int32), axis=2)
    target = rows[:, None].to(tl.int64) * out_stride + place
    tl.store(out_weights + target, weight.to(out_weights.dtype.element_ty), mask=inside)
    tl.store(out_experts + target, expert.to(out_experts.dtype.element_ty), mask=inside)


def record(
    weights: torch.Tensor,
    ids: torch.Tensor,
    out_weights: torch.Tensor,
    out_experts: torch.Tensor,
) -> None:
    """Store `weights` and `ids` [n, k] into [n, k] views of the step's buffers.

    The views' rows may lie apart; within a row all four are contiguous.
    """
    num_tokens, k = ids.shape
    for tensor in (weights, ids, out_weights, out_experts):
        assert tensor.stride(1) == 1
    assert out_weights.stride(0) == out_experts.stride(0)
    if num_tokens:
        _record[(triton.cdiv(num_tokens, _BLOCK),)](
            weights,
            ids,
            out_weights,
            out_experts,
            num_tokens,
            weights.stride(0),
            ids.stride(0),
            out_weights.stride(0),
            k=k,
            padded_k=triton.next_power_of_2(k),
            block=_BLOCK,
        )
