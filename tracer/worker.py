"""What a vLLM worker knows of tracing and steering, and what can be asked of it remotely.

vllm_seam.py calls the first half around every step; `collective_rpc` calls the second half between
steps, by name, as methods of vLLM's worker.
"""

import functools
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict
from typing import Any

import torch
from numpy.typing import NDArray

from moescope.tracer import errors
from moescope.tracer import mask as masks
from moescope.tracer.errors import InputError, MoescopeError, TracerError, UnsupportedModelError
from moescope.tracer.format import ModelFacts
from moescope.tracer.object_path import Where
from moescope.tracer.recorder import Recorder
from moescope.tracer.request import TraceRequest
from moescope.tracer.settings import Settings, load_settings
from moescope.tracer.sink import NullSink, RingSink
from moescope.tracer.steering import Steering
from moescope.tracer.vllm_model import Place

NO_PLUGIN = (
    "this engine runs without moescope's vLLM plugin: either VLLM_PLUGINS is set and does not name "
    "moescope, or moescope was not installed with pip"
)


class WorkerTracer:
    """Tracing and steering of one worker's model, or the reason why it can be neither."""

    def __init__(
        self,
        recorder: Recorder | None,
        steering: Steering | None,
        reason: str = "",
        *,
        place: Place | None = None,
    ) -> None:
        self.recorder, self.steering, self.reason = recorder, steering, reason
        self._place = place
        self._first = 0 if place is None else place.first

    @property
    def facts(self) -> ModelFacts:
        """The whole model's, of which this worker may have a pipeline stage."""
        recorder, _ = self.demand()
        return recorder.facts if self._place is None else self._place.facts

    @property
    def idle(self) -> bool:
        """Whether a step needs nothing of us."""
        if self.recorder is None or self.steering is None:
            return True
        return self.recorder.sink is None and not self.steering.active

    def demand(self) -> tuple[Recorder, Steering]:
        """The recorder and the masks; UnsupportedModelError where there are none."""
        if self.recorder is None or self.steering is None:
            raise UnsupportedModelError(self.reason)
        return self.recorder, self.steering

    def finish(self, request_ids: AbstractSet[str]) -> None:
        """These requests ended before this step."""
        recorder, steering = self.demand()
        recorder.finish(request_ids)
        steering.finish(request_ids)

    def rest(self) -> None:
        """A step has no tokens; after the last one's, the next may be long in coming."""
        self.demand()[0].rest()

    def begin(
        self, request_id: str, resolved: dict[str, Any], prompt_tokens: int, **more: Any
    ) -> None:
        """A request that is to be traced or steered, or both, begins with this step.

        `more` are fields of `Traced` (assemble.py), and `speculation`: what `writer.Drafts.begin`
        is to know.
        """
        recorder, steering = self.demand()
        slot = resolved.pop("slot")
        if slot is not None:
            steering.begin(request_id, slot, resolved["mask"])
        if resolved["trace"]:
            wishes = TraceRequest.model_validate(resolved)
            recorder.begin(
                request_id,
                wishes,
                prompt_tokens,
                composes=steering.composes,
                **more,
            )

    def before_forward(self, request_ids: Sequence[str], counts: NDArray[Any]) -> None:
        """The step's tokens are known, and the model has not run."""
        if self.steering is not None and self.steering.active:
            self.steering.assign(request_ids, counts)

    def after_step(
        self,
        request_ids: Sequence[str],
        counts: NDArray[Any],
        tokens: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """The model has run; see `Recorder.end_step`."""
        self.demand()[0].end_step(request_ids, counts, tokens, positions)

    def route(
        self, layer: int, logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a layer's router decided, steered and recorded."""
        assert self.recorder is not None and self.steering is not None  # noqa: PT018
        if self.steering.active or self.steering.always:
            room = self.recorder.room(layer, len(ids))
            weights, ids = self.steering.route(self._first + layer, logits, weights, ids, room)
        self.recorder.record(layer, weights, ids)
        return weights, ids

    def route_alone(
        self, layer: int, logits: torch.Tensor, padding: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A layer's routing without vLLM's, steered and recorded; see `kernels.route`.

        None if there are more tokens than buffers.
        """
        assert self.recorder is not None and self.steering is not None  # noqa: PT018
        room = self.recorder.room(layer, len(logits))
        if room is not None:
            self.steering.route_alone(self._first + layer, logits, padding, room)
        return room

    def attach(self, store: Where | None, settings: Settings) -> None:
        """Trace into `store`, if this worker is one that records (`Place`)."""
        recorder, _ = self.demand()
        place = self._place
        if store is None or (place is not None and not place.records):
            recorder.attach(NullSink())
            return
        stage = None if place is None else place.stage
        rows = recorder.max_tokens
        recorder.attach(RingSink(store, self.facts, settings, min_rows=rows, stage=stage))


# Remote calls. An error of ours travels back as a value: vLLM would keep only its text.


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
    return check_answers(answers)


def check_answers(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of all workers; raises what one of them raised."""
    for answer in answers:
        if "error" in answer:
            kind = getattr(errors, answer["error"], None) or getattr(masks, answer["error"])
            raise kind(answer["message"])
    return answers


def joined(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """One status of all workers: several record in a pipeline, one does elsewhere."""
    one = next((answer for answer in answers if answer["attached"]), answers[0])
    return one | {
        "live": max(answer["live"] for answer in answers),
        "steered": max(answer["steered"] for answer in answers),
        "dropped_rows": sum(answer["dropped_rows"] for answer in answers),
        "rings": [answer["ring"] for answer in answers if answer.get("ring")],
        "silence": next((a["silence"] for a in answers if a["silence"]), None),
    }


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
    tracer: WorkerTracer = self.model_runner.moescope
    recorder, _ = tracer.demand()
    if recorder.sink is not None:
        raise InputError(
            "this engine is tracing already: leave the other `with trace(...)` first, or unset "
            "MOESCOPE_STORE"
        )
    tracer.attach(store, load_settings(**settings))
    return tracer.facts.to_json()


@_answer
def moescope_sync(self: Any) -> dict[str, Any]:
    """Put every finished request on disk; returns the status, `live` of it."""
    recorder, _ = self.model_runner.moescope.demand()
    if recorder.sink is not None and not recorder.num_live:
        recorder.sink.sync()
    return _status(self)


@_answer
def moescope_stop(self: Any) -> dict[str, Any]:
    """Stop tracing; finished requests are on disk afterwards, others are given up."""
    recorder, _ = self.model_runner.moescope.demand()
    status = _status(self)
    recorder.detach()
    return status


@_answer
def moescope_load_mask(self: Any, slot: int, key: str, mask: dict[str, Any]) -> dict[str, Any]:
    """Put a mask into a slot; {"busy": True} while requests run under what lies there."""
    _, steering = self.model_runner.moescope.demand()
    return {"busy": not steering.load(slot, key, masks.make_mask(**mask))}


@_answer
def moescope_unload_masks(self: Any, slots: list[int] | None = None) -> dict[str, Any]:
    """Empty these slots of requests' own masks; {"busy": True} while requests run in one.

    None is all of them, and then a request that runs is a TracerError.
    """
    _, steering = self.model_runner.moescope.demand()
    if slots is None:
        steering.unload_all()
        return {"busy": False}
    return {"busy": not steering.unload(slots)}


@_answer
def moescope_set_global(self: Any, key: str | None, mask: dict[str, Any] | None) -> dict[str, Any]:
    """The mask of requests that name none, from the next step on; None for no mask."""
    recorder, steering = self.model_runner.moescope.demand()
    steering.set_global(key, None if mask is None else masks.make_mask(**mask))
    recorder.mask_changes(key)
    return {}


@_answer
def moescope_status(self: Any) -> dict[str, Any]:
    """The model's facts and the counters, or the reason why this model can't be traced."""
    tracer: WorkerTracer = self.model_runner.moescope
    if tracer.recorder is None:
        return {"reason": tracer.reason}
    return _status(self)


def _status(worker: Any) -> dict[str, Any]:
    recorder, steering = worker.model_runner.moescope.demand()
    slots = {slot: key for slot, key in steering.keys.items() if slot > 0}
    return {
        "facts": worker.model_runner.moescope.facts.to_json(),
        "router": asdict(steering.spec),
        "num_slots": steering.num_slots,
        "composes": steering.composes,
        "slots": slots,
        "steered": steering.num_requests,
        "global": steering.global_key,
        "ring": recorder.sink.where if isinstance(recorder.sink, RingSink) else None,
        **recorder.status(),
    }


REMOTE = (
    moescope_start,
    moescope_sync,
    moescope_stop,
    moescope_status,
    moescope_load_mask,
    moescope_unload_masks,
    moescope_set_global,
)
