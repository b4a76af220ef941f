"""A trace job over many engines: Ray Data gives blocks of it to replicas, each with its own writer.

The whole job is read, checked and tokenised here, as on one machine; the replicas (ray_replica.py)
write into one store. At the end every request is looked up there: what a lost machine took with it
is traced again, and what can't be shown to be there exactly once is an error.
"""

import gc
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from rich.console import Console

from moescope.clients.batch import JobSummary, Work, missing, prepare_job, tally, tokens_needed
from moescope.clients.ray_cluster import check_address, node_resources, ray_cluster, size_replicas
from moescope.clients.ray_ledger import Ledger, ReplicaState, cause, wait_for_writers
from moescope.clients.ray_replica import Plan, Replica, make_block, world_size
from moescope.clients.terminal import rate_progress
from moescope.tracer import errors
from moescope.tracer.errors import StoreError, TracerError
from moescope.tracer.format import DEFAULT_RUN
from moescope.tracer.object_path import Where, store_path
from moescope.tracer.store import read_writers

DEFAULT_MAX_RESTARTS = 3

# Calls that a replica works on at once, and blocks under way to it: with blocks of 64 requests the
# engine's queue never runs dry, and no more of the job than that waits there.
_CALLS, _AHEAD = 16, 2
_BLOCK_REQUESTS = 64

_PASSES = 3
_POLL_S = 0.5
_WRITERS_TIMEOUT_S = 120.0
_LEFTOVER_TIMEOUT_S = 10.0
_FORWARDED = ("MOESCOPE_", "VLLM_", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")
_OF_ONE_MACHINE = {"VLLM_HOST_IP", "VLLM_PORT"}
_CPU_KV_GIB = "2"
_LOGS = " (the processes' own words are in /tmp/ray/session_latest/logs on their machines)"


def run_ray_job(
    job: Path,
    store: Where,
    model: str,
    *,
    ray: str,
    replicas: int | None = None,
    run: str = DEFAULT_RUN,
    engine_options: tuple[str, ...] = (),
    policy: str = "block",
    max_restarts: int = DEFAULT_MAX_RESTARTS,
    console: Console | None = None,
) -> JobSummary:
    """`batch.run_job` on a Ray cluster: the same store, row for row, by several engines.

    Args:
        job, store, model, run, engine_options, policy, console: as `run_job` takes them; store,
            and the model if it is a folder, have the same path on every machine.
        ray: "local", "auto" or HOST:PORT.
        replicas: engines; None is as many as the GPUs allow, or one a machine without GPUs.
        max_restarts: how often a replica that died is replaced before the job is given up.

    Raises:
        InputError: as `run_job`; or no cluster answers, or the replicas don't fit on it.
        TracerError: replicas died too often; what they had committed stays.
        StoreError: at the end, requests are missing or there twice.

    """
    check_address(ray)  # this, and what follows, takes less than loading anything
    store = store_path(store).absolute()
    if Path(model).is_dir():
        model = str(Path(model).absolute())
    # A job that was killed a moment ago has writers that are about to commit what it finished.
    wait_for_writers(store, None, _LEFTOVER_TIMEOUT_S)
    arguments, todo, skipped = prepare_job(job, store, model, run, engine_options)
    if not todo:
        return JobSummary(0, skipped, 0, 0, 0, 0.0)
    longest = max(todo, key=tokens_needed)
    with ray_cluster(ray) as cluster:
        number, cpus, gpus = size_replicas(node_resources(cluster), replicas, world_size(arguments))
        if console is not None:
            console.print(
                f"loading {model} on {number} replicas ({len(todo)} requests to trace, {skipped} "
                "done before)"
            )
        plan = Plan(
            model=model,
            options=engine_options,
            store=str(store),
            run=run,
            policy=policy,
            longest=longest,
            environment=_environment(cpus=None if gpus else cpus),
            folder=str(Path.cwd()),
            max_restarts=max_restarts,
        )
        number = min(number, len(todo))
        seconds, writers, left = 0.0, set[str](), todo
        try:
            for _ in range(_PASSES):
                seconds += _trace(cluster, plan, left, number, cpus, gpus, writers, console)
                # With the policy `drop`, what is incomplete is so on purpose.
                left = missing(store, run, todo) if policy == "block" else []
                if not left:
                    break
                if console is not None:
                    console.print(f"{len(left)} requests are not in the store: tracing them again")
        finally:
            # Also of a job that failed: the same command may be given at once.
            wait_for_writers(store, writers, _LEFTOVER_TIMEOUT_S)
    tokens, incomplete, doubled = tally(store, run, todo)
    if doubled:
        raise StoreError(
            f"{doubled} requests of run {run!r} are more than once in {store}: was another job "
            "tracing the same run? Rankings would count them twice; trace into a new store."
        )
    dropped = sum(w.dropped_rows for w in read_writers(store) if w.writer in writers)
    return JobSummary(len(todo), skipped, tokens, incomplete, dropped, seconds)


def _environment(cpus: float | None) -> dict[str, str]:
    """What replicas take over of this process's environment; `cpus`: those of each, if no GPU."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_FORWARDED) and name not in _OF_ONE_MACHINE
    }
    if cpus is None:
        return environment
    # Several may share a machine: none binds its threads to the first cores, or takes its memory.
    defaults = {
        "OMP_NUM_THREADS": str(max(1, int(cpus))),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": _CPU_KV_GIB,
    }
    return defaults | environment


def _trace(
    ray: Any,
    plan: Plan,
    works: Sequence[Work],
    replicas: int,
    cpus: float,
    gpus: int,
    writers: set[str],
    console: Console | None,
) -> float:
    """Run the requests once; adds to `writers` and returns the seconds since the first replica
    was ready.
    """
    size = max(1, min(_BLOCK_REQUESTS, len(works) // (replicas * _CALLS)))
    blocks = [
        make_block(list(range(at, min(at + size, len(works)))), list(works[at : at + size]))
        for at in range(0, len(works), size)
    ]
    ledger = ray.remote(Ledger).options(num_cpus=0).remote(len(works))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []
    dataset = ray.data.from_arrow(blocks).map_batches(
        Replica,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_args=(plan, ledger),
        compute=ray.data.ActorPoolStrategy(
            size=replicas,
            max_concurrent_calls_per_actor=_CALLS,
            enable_true_multi_threading=True,
            max_tasks_in_flight_per_actor=_CALLS + _AHEAD,
        ),
        num_cpus=cpus,
        num_gpus=gpus or None,
    )
    watch = _Watch(ray, ledger, len(works), replicas, console)
    try:
        with watch:
            for _ in dataset.iter_batches(batch_size=None, prefetch_batches=0):
                pass
    except ray.exceptions.RayError as error:
        raise watch.explain(error) from None
    finally:
        writers |= watch.writers
    # The replicas end, and with them their writers, when nothing refers to them any more.
    del dataset
    gc.collect()
    if living := wait_for_writers(store_path(plan.store), watch.writers, _WRITERS_TIMEOUT_S):
        raise TracerError(
            f"the trace writers {', '.join(living)} have not ended {_WRITERS_TIMEOUT_S:.0f} s "
            "after the job: the same command, when they have, says whether all is there"
        )
    return watch.seconds


class _Watch:
    """Shows a job's progress while the block runs, and knows what became of its replicas."""

    def __init__(
        self, ray: Any, ledger: Any, total: int, replicas: int, console: Console | None
    ) -> None:
        self._ray, self._ledger = ray, ledger
        self._total, self._num_replicas = total, replicas
        self._progress = rate_progress(console)
        self._bar = self._progress.add_task("starting", total=total, rate="")
        self._said: set[int] = set()
        self._replicas: list[ReplicaState] = []
        self._started: float | None = None
        self.seconds = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def writers(self) -> set[str]:
        """All writers that the job has had so far."""
        return {writer for replica in self._replicas for writer in replica.writers}

    def explain(self, error: Exception) -> errors.MoescopeError:
        """The error to raise for what Ray raised: the one that a replica told the ledger."""
        with suppress(self._ray.exceptions.RayError):
            if fatal := self._look()["fatal"]:
                kind, message = fatal
                known = getattr(errors, kind, None)
                return (
                    known(message) if known else TracerError(f"a replica failed: {message}{_LOGS}")
                )
        lines = str(error).strip().splitlines() or [""]
        return TracerError(f"the job on Ray failed: {lines[-1]}{_LOGS}")

    def __enter__(self) -> Self:
        self._progress.start()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        self._thread.join()
        with suppress(self._ray.exceptions.RayError):
            self._look()
        if kind is None:
            self._progress.update(self._bar, completed=self._total)
        if self._started is not None:
            self.seconds = time.monotonic() - self._started
        self._progress.stop()

    def _watch(self) -> None:
        while not self._over.wait(_POLL_S):
            with suppress(self._ray.exceptions.RayError):
                self._look()

    def _look(self) -> dict[str, Any]:
        state: dict[str, Any] = self._ray.get(self._ledger.state.remote(), timeout=10)
        self._replicas = state["replicas"]
        for replica in self._replicas:
            if replica.ready and replica.number not in self._said:
                self._said.add(replica.number)
                self._started = self._started or time.monotonic()
                self._say(replica)
        waiting = len({r.actor for r in self._replicas if r.ready}) < self._num_replicas
        rate = ""
        if self._started is not None:
            each_second = state["tokens"] / max(time.monotonic() - self._started, 1e-3)
            rate = f"{each_second:,.0f} tokens/s"
        self._progress.update(
            self._bar,
            completed=state["done"],
            description="starting" if waiting and not state["done"] else "tracing",
            rate=rate,
        )
        return state

    def _say(self, replica: ReplicaState) -> None:
        """Which process traces; operators need its id to look at it, or to end it."""
        before = [r for r in self._replicas[: replica.number] if r.actor == replica.actor]
        which = f"replica {self._index(replica)} of {self._num_replicas}"
        text = f"{which}: process {replica.pid} on {replica.host}"
        if before:
            text += f" takes the place of {before[-1].pid}, which died ({cause(before[-1])})"
        self._progress.console.print(text, highlight=False)

    def _index(self, replica: ReplicaState) -> int:
        """The replica's place among all, from 1; it is that of the process it replaces."""
        actors = list(dict.fromkeys(each.actor for each in self._replicas))
        return actors.index(replica.actor) + 1
