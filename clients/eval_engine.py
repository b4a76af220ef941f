"""An engine in this process that answers asks under masks, all arms of a chunk in one batch.

A runner, here and in eval_server.py, is a context manager with

    run(arms, asks)         yields (number of the arm, number of the ask, Reply), in any order

and what the protocol `Runner` names. Every reply was made under its arm's mask, or `run` raises.
"""

import json
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from moescope.clients.batch import engine_arguments, load_engine
from moescope.clients.eval_arms import Arm
from moescope.clients.eval_asks import Ask, Reply
from moescope.tracer.errors import InputError, TracerError
from moescope.tracer.format import MoeShape
from moescope.tracer.mask_format import NO_MASK
from moescope.tracer.request import TraceRequest

# Requests that wait in the engine's queue, as a multiple of those that it runs at once.
_QUEUED = 3
# A vocabulary of at most this many tokens is compared as a whole, for an exact divergence.
SMALL_VOCABULARY = 1024
TOP = 20
_NUM_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")


class Runner(Protocol):
    """Answers asks under masks, between `__enter__` and `__exit__`."""

    @property
    def max_length(self) -> int | None:
        """Tokens that a request may have, with those that it writes; None: not known yet."""

    @property
    def top(self) -> int:
        """How many likeliest tokens it gives beside each token of a text."""

    @property
    def shape(self) -> MoeShape | None:
        """The model's routing, if it is known already; layers () are not known."""

    def tokenizer(self) -> Any:
        """The model's tokenizer."""

    def about(self) -> dict[str, Any]:
        """The model and how it runs, for eval.json."""

    def fingerprint(self) -> Any:
        """What else replies depend on than masks and asks: answers are reused if it is equal."""

    def __enter__(self) -> Self:
        """Start."""

    def __exit__(self, *error: object) -> None:
        """Leave nothing behind."""

    def run(self, arms: Sequence[Arm], asks: Sequence[Ask]) -> Iterator[tuple[int, int, Reply]]:
        """Every ask under every arm, in any order."""


class EngineRunner:
    """A `vllm.LLM`, loaded when the block is entered."""

    def __init__(
        self, model: str, options: tuple[str, ...], *, num_masks: int, top: int | None = None
    ) -> None:
        """`num_masks`: how many masks there will be at most; `top` None: as fits the vocabulary."""
        slots = str(min(max(num_masks, 1), 1024))
        self._environment = {"MOESCOPE_SLOTS": slots, "MOESCOPE_STEER": "on"}
        self._model, self._options = model, options
        self._arguments = engine_arguments(model, options)
        self._config = _text_config(self._arguments)
        vocabulary = int(getattr(self._config, "vocab_size", 0) or 0)
        whole = 0 < vocabulary <= SMALL_VOCABULARY
        self._top = top if top is not None else vocabulary if whole else TOP
        if self._arguments.max_logprobs != -1:
            self._arguments.max_logprobs = max(self._arguments.max_logprobs, self._top)
        self._llm: Any = None

    @property
    def max_length(self) -> int | None:
        """None where only the loaded model says it."""
        if self._llm is not None:
            return int(self._llm.llm_engine.model_config.max_model_len)
        limit = self._arguments.max_model_len
        return limit if isinstance(limit, int) and limit > 0 else None

    @property
    def top(self) -> int:
        """The whole vocabulary if it is small."""
        return self._top

    @property
    def shape(self) -> MoeShape | None:
        """From the model's configuration, as far as it says it."""
        numbers = [
            next(
                (v for name in names if isinstance(v := getattr(self._config, name, None), int)), 0
            )
            for names in (_NUM_EXPERTS, ("num_experts_per_tok",))
        ]
        return MoeShape((), *numbers) if all(numbers) else None

    def tokenizer(self) -> Any:
        """The model's, before it is loaded."""
        return load_tokenizer(
            self._arguments.tokenizer or self._arguments.model,
            revision=self._arguments.tokenizer_revision or self._arguments.revision,
            trust_remote_code=self._arguments.trust_remote_code,
        )

    def about(self) -> dict[str, Any]:
        """The model's name and the engine's options."""
        about = {"model": self._model, "engine": {"options": list(self._options)}}
        return about | specimen_of(self._model)

    def fingerprint(self) -> Any:
        """The options, and which files the model is, if it is a folder."""
        folder = Path(self._model)
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return [str(self._model), list(self._options), stats, self._top]

    def __enter__(self) -> Self:
        # Read when the engine starts, and by nobody else. The user's own choice comes first.
        mine = {name: v for name, v in self._environment.items() if name not in os.environ}
        os.environ.update(mine)
        try:
            self._llm = load_engine(self._arguments)
        finally:
            for name in mine:
                del os.environ[name]
        return self

    def __exit__(self, *_: object) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        cleanup_dist_env_and_memory()

    def run(self, arms: Sequence[Arm], asks: Sequence[Ask]) -> Iterator[tuple[int, int, Reply]]:
        """Every ask under every arm, in chunks of as many masks as the engine has slots."""
        from moescope.tracer.worker import call_workers

        num_slots = int(call_workers(self._llm, "status")[0].get("num_slots", 1))
        chunk: list[int] = []
        for number, arm in enumerate(arms):
            chunk.append(number)
            masked = sum(arms[n].mask is not None for n in chunk)
            if masked == num_slots or arm is arms[-1]:
                yield from self._run_chunk(arms, chunk, asks)
                chunk = []

    def _run_chunk(
        self, arms: Sequence[Arm], chunk: list[int], asks: Sequence[Ask]
    ) -> Iterator[tuple[int, int, Reply]]:
        from moescope.tracer.session import masks

        engine = self._llm.llm_engine
        limit = _QUEUED * engine.vllm_config.scheduler_config.max_num_seqs
        work = iter([(arm, ask) for arm in chunk for ask in range(len(asks))])
        running: dict[str, tuple[str, tuple[int, int]]] = {}
        loaded = [mask for n in chunk if (mask := arms[n].mask) is not None]
        with masks(self._llm, *loaded):
            try:
                while True:
                    room = limit - len(running)
                    if room > limit // 3:
                        some = list(islice(work, room))
                        ids = self._enqueue(arms, asks, some)
                        # Outputs have these ids without the suffix that vLLM added.
                        for request_id, pair in zip(ids, some, strict=True):
                            running[request_id.rsplit("-", 1)[0]] = request_id, pair
                    if not running:
                        break
                    for output in engine.step():
                        if output.finished:
                            _, (arm, ask) = running.pop(output.request_id)
                            yield arm, ask, _reply(asks[ask], output)
            finally:
                if running:
                    engine.abort_request([id_ for id_, _ in running.values()], internal=True)

    def _enqueue(
        self, arms: Sequence[Arm], asks: Sequence[Ask], pairs: list[tuple[int, int]]
    ) -> list[str]:
        if not pairs:
            return []
        prompts = [{"prompt_token_ids": asks[ask].token_ids} for _, ask in pairs]
        sampling = [
            _sampling(_mask_name(arms[arm]), asks[ask].max_tokens, asks[ask].top)
            for arm, ask in pairs
        ]
        ids: list[str] = self._llm.enqueue(prompts, sampling, use_tqdm=False)
        return ids


def _text_config(arguments: Any) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            arguments.model,
            revision=arguments.revision,
            trust_remote_code=arguments.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"can't read the configuration of --model {arguments.model}: {error}"
        ) from (error)
    return config.get_text_config()


def specimen_of(folder: str) -> dict[str, Any]:
    """What the model's folder says of its training, if it is one of `moescope specimen train`."""
    try:
        return {"specimen": json.loads((Path(folder) / "specimen.json").read_bytes())}
    except (OSError, ValueError):
        return {}


def load_tokenizer(name: str, **options: Any) -> Any:
    """A tokenizer by the model's folder or name; InputError says why there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"can't load the tokenizer of {name}: {error}") from error


def _mask_name(arm: Arm) -> str:
    return NO_MASK if arm.mask is None else arm.mask.name


@lru_cache(maxsize=1024)
def _sampling(mask: str, max_tokens: int | None, top: int) -> Any:
    """One object for many requests: vLLM takes a copy for each."""
    from vllm import SamplingParams

    extra_args = TraceRequest(trace=False, mask=mask).extra_args()
    if max_tokens is not None:
        return SamplingParams(max_tokens=max_tokens, temperature=0.0, extra_args=extra_args)
    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=top,
        flat_logprobs=True,
        detokenize=False,
        extra_args=extra_args,
    )


def _reply(ask: Ask, output: Any) -> Reply:
    if ask.max_tokens is not None:
        return Reply(text=output.outputs[0].text)
    if output.num_cached_tokens:
        # Their probabilities would be missing, and may have been computed under another mask.
        raise TracerError(
            f"{output.num_cached_tokens} tokens of a scored text came from the prefix cache: "
            "switch it off with `-- --no-enable-prefix-caching`"
        )
    flat = output.prompt_logprobs
    starts, stops = flat.start_indices, flat.end_indices
    # Every position lists its own token first.
    where = [starts[position] for position in range(ask.first, ask.stop)]
    if [flat.token_ids[n] for n in where] != ask.token_ids[ask.first : ask.stop]:
        raise TracerError("vLLM gave the probabilities of other tokens than those asked for")
    log_p = np.array([flat.logprobs[n] for n in where], np.float32)
    if not ask.top:
        return Reply(log_p=log_p)
    first, last = starts[ask.first], stops[ask.stop - 1]
    shape = (len(where), -1)
    ids = np.array(flat.token_ids[first:last], np.int64).reshape(shape)
    log_ps = np.array(flat.logprobs[first:last], np.float32).reshape(shape)
    return Reply(log_p=log_p, ids=ids, log_ps=log_ps)
