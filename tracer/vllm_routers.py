"""The routers of a loaded model, wrapped: what each decides is steered, and then recorded.

    BaseRouter._compute_routing     each MoE layer's (weights, ids): logical ids, before the
                                    mapping to physical ones of expert-parallel load balancing

Which wrapper a router gets depends on the engine: eager or with CUDA graphs, compiled for a CPU,
steerable inside its graphs.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from moescope.tracer.recorder import Recorder
from moescope.tracer.settings import load_settings
from moescope.tracer.steering import Steering
from moescope.tracer.vllm_model import locate
from moescope.tracer.worker import WorkerTracer

# The tracer of the step that runs now. Compiled graphs of CPU engines reach it through the operator
# below, since they must hold no object of ours.
_running: WorkerTracer | None = None


def wrap_routers(model: Any, config: Any, device: torch.device, version: str) -> WorkerTracer:
    """Steer and record what every router decides; UnsupportedModelError if that can't be."""
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    runners, place, spec = locate(model, config, f"vllm {version}")
    shape = place.facts.shape
    max_tokens = config.scheduler_config.max_num_batched_tokens
    # A mask is for all layers, whichever of them are this pipeline stage's.
    biases: list[Any] = [None] * len(shape.layers)
    for index, runner in enumerate(runners, place.first):
        biases[index] = getattr(runner.router, "e_score_correction_bias", None)
    settings = load_settings()
    graphs = device.type != "cpu" and config.compilation_config.cudagraph_mode.value != 0
    tracer = WorkerTracer(
        Recorder(place.own, max_tokens, device),
        Steering(
            shape,
            spec,
            biases,
            settings.slots,
            max_tokens,
            device,
            captured=settings.steer == "on" if graphs else None,
        ),
        place=place,
    )
    traced_by_dynamo = (
        current_platform.is_cpu() and config.compilation_config.mode != CompilationMode.NONE
    )
    wrap = _through_operator if traced_by_dynamo else _directly
    for index, runner in enumerate(runners):
        original = runner.router._compute_routing
        replaced = _fused(runner.router, tracer, index)
        if replaced is None:
            replaced = wrap(_into_room(runner.router, tracer, index) or original, tracer, index)
        runner.router._compute_routing = functools.wraps(original)(replaced)
    return tracer


def _fused(router: Any, tracer: WorkerTracer, index: int) -> Callable[..., Any] | None:
    """One kernel of ours in place of the router's, if the engine's graphs can be steered.

    A mask's kernel after the router's would cost its launch in every layer (docs/benchmarks.md).
    None for routers that differ from what the kernel does, and without graphs, where tokens that
    no mask touches should keep vLLM's own routing to the last bit.
    """
    from vllm.model_executor.layers.fused_moe.router import fused_topk_router as plain
    from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import (
        FusedTopKBiasRouter,
    )
    from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter
    from vllm.platforms import current_platform

    assert tracer.steering is not None
    known = plain.FusedTopKRouter, FusedTopKBiasRouter, GroupedTopKRouter
    if type(router) not in known or not (tracer.steering.always and current_platform.is_cuda()):
        return None
    if tracer.steering.shape.num_experts % tracer.steering.spec.num_groups:
        return None
    original = router._compute_routing
    pads = getattr(router, "skip_padding", True)

    def compute_routing(
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = len(hidden_states)
        routed = tracer.route_alone(
            index, router_logits, plain._get_padding_mask(tokens) if pads else None
        )
        if routed is None:
            weights, ids = original(hidden_states, router_logits, indices_type, **kwargs)
            return tracer.route(index, router_logits, weights, ids)
        weights, ids = routed
        return weights, ids if indices_type is None else ids.to(indices_type)

    return compute_routing


def _into_room(router: Any, tracer: WorkerTracer, index: int) -> Callable[..., Any] | None:
    """The router's `_compute_routing`, but for where the kernel leaves the result.

    vLLM's kernel of plain routers writes into tensors that it is given: given the recorder's own,
    recording costs nothing. None for other routers, whose results are copied.
    """
    from vllm.model_executor.layers.fused_moe.router import fused_topk_router as plain
    from vllm.platforms import current_platform

    if type(router) is not plain.FusedTopKRouter or not current_platform.is_cuda():
        return None
    original = router._compute_routing
    kernel = {"softmax": plain.vllm_topk_softmax, "sigmoid": plain.vllm_topk_sigmoid}[
        router.scoring_func
    ]

    def compute_routing(
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert tracer.recorder is not None
        room = tracer.recorder.room(index, len(hidden_states))
        if room is None or indices_type not in (None, torch.int32):
            return original(hidden_states, router_logits, indices_type, **kwargs)
        weights, ids = room
        kernel(weights, ids, torch.empty_like(ids), router_logits, router.renormalize)
        return weights, ids

    return compute_routing


def _directly(compute: Callable[..., Any], tracer: WorkerTracer, index: int) -> Callable[..., Any]:
    """For eager engines, and for GPUs, where routing runs inside vLLM's opaque operator."""

    def compute_routing(
        hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = compute(hidden_states, router_logits, *args, **kwargs)
        return tracer.route(index, router_logits, weights, ids)

    return compute_routing


def _through_operator(
    compute: Callable[..., Any], _tracer: WorkerTracer, index: int
) -> Callable[..., Any]:
    """For compiled CPU engines, whose routing torch.compile traces through."""

    def compute_routing(
        hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = compute(hidden_states, router_logits, *args, **kwargs)
        return torch.ops.moescope.route(router_logits, weights, ids, index)

    return compute_routing


@torch.library.custom_op("moescope::route", mutates_args=())
def _route(
    logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`WorkerTracer.route` as an operator: one whose result is used is never removed."""
    if _running is None:
        return weights.clone(), ids.clone()
    new_weights, new_ids = _running.route(index, logits, weights, ids)
    # An operator may not return its own inputs.
    return (
        weights.clone() if new_weights is weights else new_weights,
        ids.clone() if new_ids is ids else new_ids,
    )


@_route.register_fake
def _route_fake(
    logits: torch.Tensor,  # noqa: ARG001
    weights: torch.Tensor,
    ids: torch.Tensor,
    index: int,  # noqa: ARG001
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(weights), torch.empty_like(ids)


def run_step(tracer: WorkerTracer, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a step of this tracer's model."""
    global _running
    _running = tracer
    try:
        return step(*args, **kwargs)
    finally:
        _running = None
