"""Trace and steer a `vllm.LLM` that the user made: `with trace(llm, ...), steer(llm, mask):`."""

import hashlib
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moescope.tracer.errors import InputError, SlotsFullError, TracerError, UnsupportedModelError
from moescope.tracer.format import DEFAULT_RUN
from moescope.tracer.mask_format import Mask
from moescope.tracer.object_path import Where, store_path
from moescope.tracer.request import TraceRequest
from moescope.tracer.settings import load_settings

_SETTLE_TIMEOUT_S = 60.0


@contextmanager
def trace(
    llm: Any,
    *,
    store: Where | None,
    run: str = DEFAULT_RUN,
    condition: str | None = None,
    default: bool = True,
    **settings: Any,
) -> Iterator[None]:
    """Trace the requests that `llm` serves inside the block, and have them on disk after it.

    Requests may name their own run, example and condition:
    `SamplingParams(extra_args=TraceRequest(example_id="q1", condition="with_doc").extra_args())`.

    Args:
        llm: a `vllm.LLM` with a mixture-of-experts model.
        store: the trace store, made if there is none: a folder, or a place in object storage
            ("s3://bucket/traces"); None records and writes nothing.
        run: the run of requests that don't name one.
        condition: the condition of requests that don't name one.
        default: whether requests that say nothing are traced.
        settings: any of the settings in docs/settings.md, such as policy="drop".

    Raises:
        UnsupportedModelError: the model's routing can't be traced; the message says what to do.
        StoreError: `store` is something else, or holds another model's traces.
        TracerError: rows were lost that the policy promised to keep.

    """
    from moescope.tracer.vllm_frontend import set_default_request
    from moescope.tracer.worker import call_workers

    load_settings(**settings)  # an error here names the setting, before the engine is asked
    place = None if store is None else str(store_path(store).absolute())
    call_workers(llm, "start", place, settings)
    try:
        _prove(llm)
        set_default_request(llm, TraceRequest(trace=default, run=run, condition=condition))
        yield
        live = settle(llm)["live"]
    finally:
        set_default_request(llm, None)
        call_workers(llm, "stop")
    if live:
        raise TracerError(
            f"{live} traced requests had not finished at the end of the block, and have no rows: "
            "wait for them inside it"
        )


@contextmanager
def steer(llm: Any, mask: Mask | None) -> Iterator[None]:
    """Steer the requests of `llm` that name no mask of their own; None is no mask.

    Where own masks compose with the global one (MOESCOPE_OWN_MASK), those requests too. The mask is
    in force from the next step on, also for requests that run already, and the one from before
    comes back after the block. Raises InputError if it does not fit the model, and ComposeError if
    it can't be in force together with one of `masks(llm, ...)`.
    """
    before = getattr(llm, "moescope_steered_by", None)
    _set_global(llm, mask)
    try:
        yield
    finally:
        _set_global(llm, before)


def _set_global(llm: Any, mask: Mask | None) -> None:
    from moescope.tracer.vllm_frontend import CHANGING, salt_of_global_mask
    from moescope.tracer.worker import call_workers

    fields = None if mask is None else mask.model_dump(mode="json", exclude_none=True)
    name = None if mask is None else mask.name
    salt_of_global_mask(llm, CHANGING)
    try:
        call_workers(llm, "set_global", name, fields)
        llm.moescope_steered_by = mask
    finally:
        # Never used before, and so not even for the same mask again: requests that ran through
        # the change have left KV of both under the old one.
        salt_of_global_mask(llm, f"global {name} {uuid.uuid4()}")


@contextmanager
def masks(llm: Any, *given: Mask) -> Iterator[None]:
    """Let requests of `llm` name their own masks: `TraceRequest(mask=NAME).extra_args()`.

    Raises InputError if a mask does not fit the model or two have one name, ComposeError if one is
    to be in force together with the global mask (MOESCOPE_OWN_MASK) and can't be, and
    SlotsFullError if they are more than the engine has slots (MOESCOPE_SLOTS).
    """
    from moescope.tracer.vllm_frontend import set_loaded_masks
    from moescope.tracer.worker import call_workers

    slots = {mask.name: slot for slot, mask in enumerate(given, 1)}
    # Another block may have another mask under the same name, and must not read its KV.
    salts = {mask.name: f"{mask.name} {_digest(mask)}" for mask in given}
    if len(slots) < len(given):
        raise InputError(f"two of the masks {[mask.name for mask in given]} have one name")
    num_slots = call_workers(llm, "status")[0].get("num_slots", len(given))
    if len(given) > num_slots:
        raise SlotsFullError(
            f"{len(given)} masks for {num_slots} slots: start the engine with MOESCOPE_SLOTS="
            f"{len(given)} in its environment"
        )
    try:
        for mask in given:
            fields = mask.model_dump(mode="json", exclude_none=True)
            call_workers(llm, "load_mask", slots[mask.name], mask.name, fields)
        set_loaded_masks(llm, slots, salts)
        yield
    finally:
        set_loaded_masks(llm, {})
        settle(llm)
        call_workers(llm, "unload_masks")


def _digest(mask: Mask) -> str:
    return hashlib.sha256(mask.model_dump_json().encode()).hexdigest()[:16]


def _prove(llm: Any) -> None:
    """Run one token, and refuse the model if a layer's routing did not arrive."""
    from vllm import SamplingParams

    from moescope.tracer.worker import call_workers

    if llm.llm_engine.has_unfinished_requests():
        return  # these will show it: the recorder checks the first step, whosever it is
    one = SamplingParams(max_tokens=1, detokenize=False)
    llm.generate([{"prompt_token_ids": [1]}], one, use_tqdm=False)
    for status in call_workers(llm, "status"):
        if status["silence"]:
            raise UnsupportedModelError(status["silence"])


def settle(llm: Any) -> dict[str, Any]:
    """Wait until every finished request of `llm` is on disk; returns the tracer's counters.

    The engine tells its workers of finished requests with the step after, so an idle engine in
    this process needs one more, empty step.
    """
    from moescope.tracer.vllm_frontend import run_empty_step
    from moescope.tracer.worker import call_workers, joined

    deadline = time.monotonic() + _SETTLE_TIMEOUT_S
    while True:
        status = joined(call_workers(llm, "sync"))
        if not status["live"] + status["steered"] or llm.llm_engine.has_unfinished_requests():
            return status
        if time.monotonic() > deadline:
            raise TracerError(f"{status['live']} finished requests never reached the tracer")
        run_empty_step(llm)
        time.sleep(0.001)
