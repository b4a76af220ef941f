"""What a request asks of the tracer, checked in vLLM's front-end before the engine sees it.

A bad wish is an error of its request, and never of the engine. A traced request does not read the
prefix cache; one under a mask reads and fills a part of the cache that is that mask's alone.
"""

import uuid
from collections.abc import Callable
from typing import Any

from moescope.tracer.errors import InputError
from moescope.tracer.mask_format import NO_MASK
from moescope.tracer.request import RESOLVED, TraceRequest, parse_extra_args
from moescope.tracer.settings import load_settings
from moescope.tracer.steering import NO_MASK_SLOT

CHANGING = "changing"  # see `salt_of_global_mask`


def process_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    """`InputProcessor.process_inputs`, with a request's wishes checked and resolved."""
    from vllm.exceptions import VLLMValidationError

    class RequestError(InputError, VLLMValidationError):  # type: ignore[misc]
        """An InputError that vLLM's HTTP server answers with status 400."""

        parameter, value = "vllm_xargs", None

    def processed(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        if request.sampling_params is not None:
            try:
                _resolve(self, request)
            except InputError as error:
                raise RequestError(str(error)) from None
        return request

    return processed


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
