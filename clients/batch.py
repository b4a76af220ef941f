"""A batch trace job: every line of a job file through vLLM, into a trace store.

The whole job is read, checked and tokenised before the model is loaded. A job that was killed is
finished by running it again: an example whose request is complete in the store is not repeated.
"""

import os
import time
import uuid
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from moescope.analysis import open_store
from moescope.clients.job import JobLine, read_job
from moescope.clients.spans import EncodedRequest, encode
from moescope.clients.terminal import rate_progress
from moescope.tracer.errors import InputError
from moescope.tracer.format import DEFAULT_RUN
from moescope.tracer.object_path import Where, store_path
from moescope.tracer.request import TraceRequest

# Requests that wait in the engine's queue, as a multiple of those that it runs at once.
_QUEUED = 4


@dataclass(frozen=True, slots=True)
class Work:
    """One request of a job, as the engine takes it; `there`: answers that the store has of it."""

    line: int
    example_id: str
    condition: str
    request: EncodedRequest
    there: int = 0

    @property
    def num_answers(self) -> int:
        """How many requests of the store it makes."""
        generate = self.request.generate
        return 1 if generate is None else generate.n or 1


@dataclass(frozen=True, slots=True)
class Done:
    """What a store's run has of one example under one condition: complete requests alone."""

    requests: int
    prompt_tokens: int
    spans: list[tuple[str, int, int]]


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
    store: Where,
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
    arguments, todo, skipped = prepare_job(job, store, model, run, engine_options)
    if not todo:
        return JobSummary(0, skipped, 0, 0, 0, 0.0)
    if console is not None:
        console.print(f"loading {model} ({len(todo)} requests to trace, {skipped} done before)")
    llm = load_engine(arguments)
    check_lengths(llm, todo)
    started = time.monotonic()
    dropped = _trace(llm, store, run, policy, todo, console)
    seconds = time.monotonic() - started
    tokens, incomplete, _ = tally(store, run, todo)
    return JobSummary(len(todo), skipped, tokens, incomplete, dropped, seconds)


def prepare_job(
    job: Path, store: Where, model: str, run: str, engine_options: tuple[str, ...]
) -> tuple[Any, list[Work], int]:
    """Read, check and tokenise a job; returns vLLM's `EngineArgs`, the requests that the store
    does not hold yet, and the number of those that it holds. InputError as in `run_job`.
    """
    lines = read_job(job)
    arguments = engine_arguments(model, engine_options)
    todo = missing(store, run, _encode(lines, arguments))
    return arguments, todo, len(lines) - len(todo)


def engine_arguments(model: str, options: tuple[str, ...]) -> Any:
    """vLLM's `EngineArgs`; `options` are as `vllm serve` takes them. For this process.

    InputError for data parallelism: the `vllm.LLM` of one process has no replicas.
    """
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
    if (replicas := arguments.data_parallel_size) > 1:
        raise InputError(
            f"--data-parallel-size {replicas}: one engine runs here; leave the option out. Several "
            f"trace one job with `moescope trace --ray local --replicas {replicas}` (docs/ray.md)"
        )
    arguments.use_tqdm_on_load = False
    if arguments.enable_prefix_caching is None:
        arguments.enable_prefix_caching = False  # traced requests do not read it anyway
    return arguments


def _encode(lines: list[JobLine], arguments: Any) -> list[Work]:
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
    return [
        Work(line.line, line.example_id, line.condition, encode(line, tokenizer)) for line in lines
    ]


def done_before(store: Where, run: str) -> dict[tuple[str, str], Done]:
    """What is complete in a run of the store, by example and condition."""
    if not (store_path(store) / "manifest.json").exists():
        return {}
    rows = (
        open_store(store)
        .execute(
            "SELECT example_id, condition, count(*), any_value(prompt_tokens), any_value(spans) "
            "FROM requests WHERE run = ? AND complete GROUP BY ALL",
            [run],
        )
        .fetchall()
    )
    return {
        (example, condition): Done(
            count, tokens, [(span["segment"], span["start"], span["stop"]) for span in spans or ()]
        )
        for example, condition, count, tokens, spans in rows
    }


def missing(store: Where, run: str, works: list[Work]) -> list[Work]:
    """Those that are not complete in the store's run; InputError if it has another text."""
    done = done_before(store, run)
    todo = []
    for work in works:
        there, request = done.get((work.example_id, work.condition)), work.request
        if there is not None and (there.prompt_tokens, there.spans) != (
            len(request.token_ids),
            list(request.spans),
        ):
            raise InputError(
                f"line {work.line}: the store's run {run!r} holds another text for example "
                f"{work.example_id!r}, condition {work.condition!r}; choose another --run or store"
            )
        todo += unfinished(work, there)
    return todo


def unfinished(work: Work, there: Done | None) -> list[Work]:
    """The work, with the answers that the store has; nothing if it has all."""
    num_there = 0 if there is None else there.requests
    return [replace(work, there=num_there)] if num_there < work.num_answers else []


def load_engine(arguments: Any) -> Any:
    """A `vllm.LLM` of these `engine_arguments`."""
    from vllm import LLM

    return LLM.from_engine_args(arguments)


def tokens_needed(work: Work) -> int:
    """Tokens that the engine must have room for: the prompt, and what may be sampled."""
    generate = work.request.generate
    return len(work.request.token_ids) + (1 if generate is None else generate.max_tokens)


def check_lengths(llm: Any, works: Iterable[Work]) -> None:
    """InputError, naming the line, if one is too long for the engine."""
    limit = llm.llm_engine.model_config.max_model_len
    for work in works:
        if (needed := tokens_needed(work)) > limit:
            raise InputError(
                f"line {work.line}: needs {needed} tokens, and the engine takes {limit}: "
                "shorten it, or raise the limit with `-- --max-model-len N`"
            )


def enqueue(llm: Any, run: str, work: Work, request_id: str) -> None:
    """Give one request to the engine, to be traced; its output comes under this id.

    In the store vLLM has added eight random digits, which alone are too few for many engines.
    """
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    wishes = TraceRequest(
        run=run,
        example_id=work.example_id,
        condition=work.condition,
        spans=work.request.spans,
    )
    if work.request.generate is None:
        # Teacher forcing: the response is part of the prompt, and one token must be sampled.
        given: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
    else:
        given = work.request.generate.sampling()
    if work.there:
        given["n"] = work.num_answers - work.there
    sampling = SamplingParams(
        **given, extra_args=wishes.extra_args(), output_kind=RequestOutputKind.FINAL_ONLY
    )
    llm.llm_engine.add_request(request_id, tokens_input(work.request.token_ids), sampling)


def tokens_of(output: Any) -> int:
    """Prompt and sampled tokens of a finished `RequestOutput`."""
    return len(output.prompt_token_ids) + sum(len(each.token_ids) for each in output.outputs)


def _trace(
    llm: Any, store: Where, run: str, policy: str, todo: list[Work], console: Console | None
) -> int:
    """Run the requests; returns the rows that were dropped."""
    from moescope.tracer.session import settle, trace

    engine = llm.llm_engine
    limit = _QUEUED * engine.vllm_config.scheduler_config.max_num_seqs
    waiting, queued, name = iter(todo), len(todo), uuid.uuid4().hex[:8]
    with rate_progress(console) as progress, trace(llm, store=store, run=run, policy=policy):
        bar = progress.add_task("tracing", total=len(todo), rate="")
        started, tokens = time.monotonic(), 0
        while queued or engine.has_unfinished_requests():
            while queued and engine.get_num_unfinished_requests() < limit:
                work = next(waiting)
                enqueue(llm, run, work, f"{name}-{work.line}")
                queued -= 1
            for output in engine.step():
                if output.finished:
                    tokens += tokens_of(output)
                    rate = tokens / (time.monotonic() - started)
                    progress.update(bar, advance=1, rate=f"{rate:,.0f} tokens/s")
        return int(settle(llm)["dropped_rows"])


def tally(store: Where, run: str, works: Sequence[Work]) -> tuple[int, int, int]:
    """What a run has of these requests: rows, how many are incomplete, and how many are there
    more often than asked for.
    """
    asked = pa.table(
        {
            "example_id": [work.example_id for work in works],
            "condition": [work.condition for work in works],
            "wanted": [work.num_answers for work in works],
        }
    )
    con = open_store(store)
    con.register("asked", asked)
    tokens, incomplete, doubled = con.execute(
        "SELECT sum(tokens), count(*) FILTER (complete < wanted), "
        "count(*) FILTER (complete > wanted) FROM ("
        "  SELECT any_value(wanted) AS wanted, coalesce(sum(tokens), 0) AS tokens, "
        "  count(*) FILTER (complete) AS complete FROM asked LEFT JOIN "
        "  (SELECT * FROM requests WHERE run = ?) USING (example_id, condition) "
        "  GROUP BY example_id, condition)",
        [run],
    ).fetchone() or (0, 0, 0)
    return int(tokens), int(incomplete), int(doubled)
