"""A batch trace job: every line of a job file through vLLM, into a trace store.

The whole job is read, checked and tokenised before the model is loaded. A job that was killed is
finished by running it again: an example whose request is complete in the store is not repeated.
"""

import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from moescope.analysis import open_store
from moescope.clients.job import JobLine, read_job
from moescope.clients.spans import EncodedRequest, encode
from moescope.clients.terminal import rate_progress
from moescope.tracer.errors import InputError
from moescope.tracer.format import DEFAULT_RUN
from moescope.tracer.request import TraceRequest

# Requests that wait in the engine's queue, as a multiple of those that it runs at once.
_QUEUED = 4


@dataclass(frozen=True, slots=True)
class JobSummary:
    """What a job did. `tokens` counts rows; `seconds` is the time of tracing, without loading."""

    requests: int
    skipped: int
    tokens: int
    incomplete: int
    dropped_rows: int
    seconds: float


def run_job(
    job: Path,
    store: Path,
    model: str,
    *,
    run: str = DEFAULT_RUN,
    engine_options: tuple[str, ...] = (),
    policy: str = "block",
    console: Console | None = None,
) -> JobSummary:
    """Trace every line of `job` that the store does not hold yet.

    Args:
        job: a job file (docs/job-format.md).
        store: the trace store, made if there is none.
        model: a folder or a Hugging Face name, as vLLM takes it.
        run: the run that the requests belong to.
        engine_options: vLLM's engine options, as on its command line.
        policy: "block" or "drop" (docs/settings.md).
        console: where to show progress; None shows nothing.

    Raises:
        InputError: a bad line, option or store; nothing is loaded or written then.
        UnsupportedModelError: the model's routing can't be traced.

    """
    lines = read_job(job)
    arguments = engine_arguments(model, engine_options)
    encoded = _encode(lines, arguments)
    todo = _missing(store, run, lines, encoded)
    skipped = len(lines) - len(todo)
    if not todo:
        return JobSummary(0, skipped, 0, 0, 0, 0.0)
    if console is not None:
        console.print(f"loading {model} ({len(todo)} requests to trace, {skipped} done before)")
    llm = load_engine(arguments)
    _check_lengths(llm, lines, encoded, todo)
    started = time.monotonic()
    dropped = _trace(llm, store, run, policy, [(lines[i], encoded[i]) for i in todo], console)
    seconds = time.monotonic() - started
    tokens, incomplete = _count(store, run, {lines[i].example_id for i in todo})
    return JobSummary(len(todo), skipped, tokens, incomplete, dropped, seconds)


def engine_arguments(model: str, options: tuple[str, ...]) -> Any:
    """vLLM's `EngineArgs`; `options` are as `vllm serve` takes them. For this process."""
    # vLLM's own lines of INFO would drown the progress bar; the user's choice comes first.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # The engine in this process dies with it. In one of its own it would outlive a SIGKILL, go on
    # with what is queued, and trace it a second time beside the job that is run again.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    from vllm import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(
        prog="moescope trace",
        usage="moescope trace JOB --model MODEL --store DIR -- [vLLM engine options]",
        add_help=False,
    )
    namespace = EngineArgs.add_cli_args(parser).parse_args(["--model", model, *options])
    arguments = EngineArgs.from_cli_args(namespace)
    arguments.use_tqdm_on_load = False
    if arguments.enable_prefix_caching is None:
        arguments.enable_prefix_caching = False  # traced requests do not read it anyway
    return arguments


def _encode(lines: list[JobLine], arguments: Any) -> list[EncodedRequest]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            arguments.tokenizer or arguments.model,
            revision=arguments.tokenizer_revision or arguments.revision,
            trust_remote_code=arguments.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"can't load the tokenizer of --model {arguments.model}: {error}"
        ) from error
    return [encode(line, tokenizer) for line in lines]


def _missing(
    store: Path, run: str, lines: list[JobLine], encoded: list[EncodedRequest]
) -> list[int]:
    """Indices of the lines without a complete request in the store's run."""
    if not (store / "manifest.json").exists():
        return list(range(len(lines)))
    done = {
        (example, condition): (prompt_tokens, spans)
        for example, condition, prompt_tokens, spans in open_store(store)
        .execute(
            "SELECT example_id, condition, prompt_tokens, spans FROM requests "
            "WHERE run = ? AND complete",
            [run],
        )
        .fetchall()
    }
    todo = []
    for index, (line, request) in enumerate(zip(lines, encoded, strict=True)):
        there = done.get((line.example_id, line.condition))
        if there is None:
            todo.append(index)
            continue
        spans = [(span["segment"], span["start"], span["stop"]) for span in there[1] or ()]
        if (there[0], spans) != (len(request.token_ids), list(request.spans)):
            raise InputError(
                f"line {line.line}: the store's run {run!r} holds another text for example "
                f"{line.example_id!r}, condition {line.condition!r}; choose another --run or store"
            )
    return todo


def load_engine(arguments: Any) -> Any:
    """A `vllm.LLM` of these `engine_arguments`."""
    from vllm import LLM

    return LLM.from_engine_args(arguments)


def _check_lengths(
    llm: Any, lines: list[JobLine], encoded: list[EncodedRequest], todo: list[int]
) -> None:
    limit = llm.llm_engine.model_config.max_model_len
    for index in todo:
        needed = len(encoded[index].token_ids) + _sampling(encoded[index], None).max_tokens
        if needed > limit:
            raise InputError(
                f"line {lines[index].line}: needs {needed} tokens, and the engine takes {limit}: "
                "shorten it, or raise the limit with `-- --max-model-len N`"
            )


def _sampling(request: EncodedRequest, wishes: TraceRequest | None) -> Any:
    from vllm import SamplingParams

    extra_args = None if wishes is None else wishes.extra_args()
    if request.generate is None:
        # Teacher forcing: the response is part of the prompt, and one token must be sampled.
        return SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, extra_args=extra_args
        )
    return SamplingParams(**request.generate.sampling(), extra_args=extra_args)


def _trace(
    llm: Any,
    store: Path,
    run: str,
    policy: str,
    work: list[tuple[JobLine, EncodedRequest]],
    console: Console | None,
) -> int:
    """Run the requests; returns the rows that were dropped."""
    from moescope.tracer.session import settle, trace

    engine = llm.llm_engine
    limit = _QUEUED * engine.vllm_config.scheduler_config.max_num_seqs
    waiting: Iterator[tuple[JobLine, EncodedRequest]] = iter(work)
    queued = len(work)
    with rate_progress(console) as progress, trace(llm, store=store, run=run, policy=policy):
        bar = progress.add_task("tracing", total=len(work), rate="")
        started, tokens = time.monotonic(), 0
        while queued or engine.has_unfinished_requests():
            while queued and engine.get_num_unfinished_requests() < limit:
                line, request = next(waiting)
                queued -= 1
                wishes = TraceRequest(
                    run=run,
                    example_id=line.example_id,
                    condition=line.condition,
                    spans=request.spans,
                )
                llm.enqueue(
                    [{"prompt_token_ids": request.token_ids}],
                    _sampling(request, wishes),
                    use_tqdm=False,
                )
            for output in engine.step():
                if output.finished:
                    tokens += len(output.prompt_token_ids)
                    tokens += sum(len(each.token_ids) for each in output.outputs)
                    rate = tokens / (time.monotonic() - started)
                    progress.update(bar, advance=1, rate=f"{rate:,.0f} tokens/s")
        return int(settle(llm)["dropped_rows"])


def _count(store: Path, run: str, examples: set[str]) -> tuple[int, int]:
    """(rows, incomplete requests) of these examples in a run."""
    tokens, incomplete = (
        open_store(store)
        .execute(
            "SELECT coalesce(sum(tokens), 0), count(*) FILTER (NOT complete) FROM requests "
            "WHERE run = ? AND example_id IN (SELECT unnest(?))",
            [run, sorted(examples)],
        )
        .fetchone()
    ) or (0, 0)
    return int(tokens), int(incomplete)
