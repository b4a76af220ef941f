"""Trace a `vllm.LLM` that the user made: `with trace(llm, store=...): llm.generate(...)`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moescope.tracer.errors import TracerError, UnsupportedModelError
from moescope.tracer.format import DEFAULT_RUN
from moescope.tracer.request import TraceRequest
from moescope.tracer.settings import load_settings

_SETTLE_TIMEOUT_S = 60.0


@contextmanager
def trace(
    llm: Any,
    *,
    store: str | Path | None,
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
        store: the trace store's folder, made if there is none; None records and writes nothing.
        run: the run of requests that don't name one.
        condition: the condition of requests that don't name one.
        default: whether requests that say nothing are traced.
        settings: any of the settings in docs/settings.md, such as policy="drop".

    Raises:
        UnsupportedModelError: the model's routing can't be traced; the message says what to do.
        StoreError: `store` is something else, or holds another model's traces.
        TracerError: rows were lost that the policy promised to keep.

    """
    from moescope.tracer.vllm_seam import call_workers, set_default_request

    load_settings(**settings)  # an error here names the setting, before the engine is asked
    place = None if store is None else str(Path(store).absolute())
    call_workers(llm, "start", place, settings)
    try:
        _prove(llm)
        set_default_request(llm, TraceRequest(trace=default, run=run, condition=condition))
        yield
        settle(llm)
    finally:
        set_default_request(llm, None)
        call_workers(llm, "stop")


def _prove(llm: Any) -> None:
    """Run one token, and refuse the model if a layer's routing did not arrive."""
    from vllm import SamplingParams

    from moescope.tracer.vllm_seam import call_workers

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
    from moescope.tracer.vllm_seam import call_workers, run_empty_step

    deadline = time.monotonic() + _SETTLE_TIMEOUT_S
    while True:
        status = call_workers(llm, "sync")[0]
        if not status["live"] or llm.llm_engine.has_unfinished_requests():
            return status
        if time.monotonic() > deadline:
            raise TracerError(f"{status['live']} finished requests never reached the tracer")
        run_empty_step(llm)
        time.sleep(0.001)
