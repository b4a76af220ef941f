"""What routing costs on a GPU, in microseconds a layer, inside a CUDA graph of 24 layers.

    python tests/bench/bench_kernels.py            prints a line of JSON a router and batch size

    router   vLLM's own routing
    room     the same, into the recorder's buffers (plain routers); others: and a copy there
    idle     room, and the mask's kernel with no token under a mask
    masked   room, and the mask's kernel with every token under a mask that changes nothing
    fused, fused_masked   one kernel that scores, chooses, weighs, masks and records, without and
             with masks

`same_ids` and `same_weights`: the shares of tokens for which `fused` gives vLLM's own experts, and
its weights to the last bit.
"""

import json
import statistics
from functools import partial

import torch
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import (
    FusedTopKRouter,
    vllm_topk_softmax,
)
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter

from moescope.tracer.format import MoeShape
from moescope.tracer.kernels import route, steer, store
from moescope.tracer.mask import RouterSpec
from moescope.tracer.reroute import SteerTables

LAYERS, REPLAYS, ROUNDS = 24, 20, 7
BATCHES = (1, 16, 64, 256, 1024, 8192)


def routers() -> dict:
    """Name: (vLLM's router, what masks know of it, its correction bias)."""
    bias = torch.randn(256, device="cuda")
    return {
        "DeepSeek-V2-Lite, OLMoE: softmax, 6 of 64": (
            FusedTopKRouter(6, 64, "softmax", renormalize=False),
            RouterSpec("softmax", False),
            None,
        ),
        "Qwen3-30B-A3B: softmax renormalised, 8 of 128": (
            FusedTopKRouter(8, 128, "softmax", renormalize=True),
            RouterSpec("softmax", True),
            None,
        ),
        "DeepSeek-V2: grouped softmax, 6 of 160": (
            GroupedTopKRouter(6, 160, 8, 3, renormalize=False),
            RouterSpec("softmax", False, 8, 3),
            None,
        ),
        "DeepSeek-V3: grouped sigmoid with bias, 8 of 256": (
            GroupedTopKRouter(8, 256, 8, 4, True, "sigmoid", 1.0, bias),
            RouterSpec("sigmoid", True, 8, 4, True),
            bias,
        ),
        "sigmoid with bias, 8 of 256": (
            FusedTopKBiasRouter(
                8, 256, bias, scoring_func="sigmoid", renormalize=True, routed_scaling_factor=1.0
            ),
            RouterSpec("sigmoid", True, correction_bias=True),
            bias,
        ),
    }


def microseconds(work) -> float:
    """The median time of a replay, by layer."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAYERS):
            work()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / REPLAYS / LAYERS)
    return statistics.median(times)


def measure(router, spec, bias, batch: int) -> dict:
    """The arms drawn above."""
    experts, k = router.global_num_experts, router.top_k
    logits = torch.randn(batch, experts, device="cuda").bfloat16()
    if bias is not None:
        logits = logits.float()
    hidden = torch.empty(batch, 1, device="cuda")
    room = torch.zeros(batch, k, device="cuda"), torch.zeros(batch, k, device="cuda").int()
    shape = MoeShape((0,), experts, k)
    idle, masked = (SteerTables(shape, 2, batch, "cuda") for _ in range(2))
    masked.touched.fill_(True)
    masked.reroutes.fill_(True)
    unused = torch.empty_like(room[1])

    def own():
        return router._compute_routing(hidden, logits, None)

    def into_room():
        if isinstance(router, FusedTopKRouter):
            vllm_topk_softmax(*room, unused, logits, router.renormalize)
        else:
            store(*own(), *room)

    def then(tables):
        slots = tables.token_slots
        if isinstance(router, FusedTopKRouter):
            into_room()
            steer(0, logits, *room, slots, tables, spec, bias, *room)
        else:
            steer(0, logits, *own(), slots, tables, spec, bias, *room)

    def fused(tables):
        route(0, logits, tables.token_slots, tables, spec, bias, *room)

    arms = {"router": own, "room": into_room, "idle": partial(then, idle)}
    arms |= {"masked": partial(then, masked)}
    arms |= {"fused": partial(fused, idle), "fused_masked": partial(fused, masked)}
    result = {name: round(microseconds(work), 3) for name, work in arms.items()}
    weights, ids = own()
    fused(idle)
    torch.cuda.synchronize()
    (theirs, order), (mine, my_order) = ids.long().sort(-1), room[1].long().sort(-1)
    same_ids = (theirs == mine).all(-1)
    same_weights = (weights.gather(1, order) == room[0].gather(1, my_order)).all(-1)
    result |= {"same_ids": round(same_ids.float().mean().item(), 5)}
    return result | {"same_weights": round(same_weights.float().mean().item(), 5)}


def main() -> None:
    """All routers and batch sizes."""
    for name, (router, spec, bias) in routers().items():
        for batch in BATCHES:
            costs = measure(router, spec, bias, batch)
            print(json.dumps({"router": name, "tokens": batch} | costs), flush=True)


if __name__ == "__main__":
    main()
