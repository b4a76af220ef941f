"""A replica: a Ray actor that holds a vLLM engine and traces what it is given.

    call (block) ──┐                      ┌──▶ writer of its own ──▶ the store
    call (block) ──┼──▶ queue ──▶ engine ─┤
    call (block) ──┘     one thread       └──▶ call returns

Ray Data calls a replica from several threads at once, with a block of requests each; one thread
owns the engine, so that the requests of all calls run in one batch. A call returns when its
requests are traced. One that Ray repeats, since its replica died, first waits for the end of that
replica's writer and leaves out what it committed.
"""

import contextlib
import os
import pickle
import queue
import socket
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from moescope.clients.batch import (
    Done,
    Work,
    check_lengths,
    done_before,
    engine_arguments,
    enqueue,
    load_engine,
    tokens_of,
    unfinished,
)
from moescope.clients.ray_ledger import wait_for_writers
from moescope.tracer.errors import InputError, StoreError, TracerError, UnsupportedModelError
from moescope.tracer.object_path import store_path

# Those that another engine would meet too; from any other, a new one may recover.
_FATAL = (InputError, StoreError, UnsupportedModelError)

# A shared folder keeps the locks of a machine that is gone for a while; object storage, the marks.
_DEAD_WRITER_TIMEOUT_S = 900.0
_CLOSE_TIMEOUT_S = 60.0
_TELL_EVERY_S = 0.25
_RETRY_AFTER_S = 5.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What every replica of a job is told. `longest`: the request that needs the most tokens.

    `environment` and `folder` are the command's, so that options mean the same here.
    """

    model: str
    options: tuple[str, ...]
    store: str
    run: str
    policy: str
    longest: Work
    environment: dict[str, str]
    folder: str
    max_restarts: int


class Replica:
    """Called by Ray Data with blocks of `make_block`; tells the ledger, an actor, what is done."""

    def __init__(self, plan: Plan, ledger: Any) -> None:
        import ray

        os.environ.update(plan.environment)
        if Path(plan.folder).is_dir():
            os.chdir(plan.folder)
        self._plan, self._ledger = plan, ledger
        self._looked: dict[tuple[str, ...], dict[tuple[str, str], Done]] = {}
        actor = ray.get_runtime_context().get_actor_id()
        self._number, before, last = self._ask("begin", actor, socket.gethostname(), os.getpid())
        if before > plan.max_restarts:
            self._give_up(
                TracerError(
                    f"a replica died {before} times, and --max-restarts allows {plan.max_restarts} "
                    f"(the last one: {last}). What is traced stays, and the same command goes on."
                )
            )
        self._engine = _Engine(plan, self._tell_done, self._broken)
        self._engine.start()
        try:
            writers = self._engine.ready.result()
        except Exception as error:
            if before and not isinstance(error, _FATAL):
                # What the one before held, a GPU's memory say, may not be free yet.
                self._broken(error)
            self._give_up(error)
        self._ask("ready", self._number, writers)

    def __call__(self, block: pa.Table) -> dict[str, list[int]]:
        """Trace a block's requests; returns their numbers."""
        numbers = block["number"].to_pylist()
        works = dict(zip(numbers, map(pickle.loads, block["work"].to_pylist()), strict=True))
        try:
            todo = self._not_done(works, self._ask("claim", self._number, numbers))
            self._engine.trace(todo)
        except Exception as error:
            self._give_up(error)
        return {"number": numbers}

    def __del__(self) -> None:
        """Close the writer; called when the job is done."""
        if hasattr(self, "_engine"):
            self._engine.stop()

    def _not_done(self, works: dict[int, Work], writers: list[str]) -> dict[int, Work]:
        """Those that none of these writers has committed, once they have ended."""
        if not writers:
            return works
        key = tuple(sorted(writers))
        if key not in self._looked:
            store = store_path(self._plan.store)
            if living := wait_for_writers(store, key, _DEAD_WRITER_TIMEOUT_S):
                raise TracerError(
                    f"Ray replaced a replica, but its trace writers ({', '.join(living)}) still "
                    f"live after {_DEAD_WRITER_TIMEOUT_S:.0f} s, says {store / 'writers'}: their "
                    "machine may be cut off and running. End it, and run the same command again."
                )
            self._looked[key] = done_before(store, self._plan.run)
        there = self._looked[key]
        left = {
            number: again
            for number, work in works.items()
            for again in unfinished(work, there.get((work.example_id, work.condition)))
        }
        found = [number for number in works if number not in left]
        self._ask("done", found, [0] * len(found))
        return left

    def _ask(self, method: str, *args: Any) -> Any:
        """What the ledger answers; it may have died with its machine, and that ends the job."""
        import ray

        return ray.get(getattr(self._ledger, method).remote(*args))

    def _tell_done(self, requests: list[int], tokens: list[int]) -> None:
        self._ledger.done.remote(requests, tokens)

    def _broken(self, error: BaseException) -> None:
        """End this process, to be replaced; its writer goes on until all is on disk."""
        if isinstance(error, _FATAL):
            self._tell_fatal(error)
        else:
            self._ask("failed", self._number, f"{type(error).__name__}: {error}")
        time.sleep(_RETRY_AFTER_S)
        os._exit(1)

    def _give_up(self, error: BaseException) -> None:
        """End the job."""
        self._tell_fatal(error)
        raise error

    def _tell_fatal(self, error: BaseException) -> None:
        kind = type(error).__name__
        ours = isinstance(error, (*_FATAL, TracerError))
        self._ask("fatal", kind, str(error) if ours else f"{kind}: {error}")


class _Batch:
    """The requests of one call: those that run, and a future of their end."""

    def __init__(self, works: dict[int, Work]) -> None:
        self.works = works
        self.open = len(works)
        self.done: Future[None] = Future()


class _Engine(threading.Thread):
    """Loads the engine and runs it; everything that touches it happens in this thread."""

    def __init__(
        self,
        plan: Plan,
        tell: Callable[[list[int], list[int]], None],
        broken: Callable[[BaseException], None],
    ) -> None:
        super().__init__(name="engine", daemon=True)
        self.ready: Future[list[str]] = Future()  # its writers' names
        self._plan, self._tell, self._broken = plan, tell, broken
        self._name = uuid.uuid4().hex[:8]  # of this engine, in the ids of its requests
        self._asked: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()

    def trace(self, works: dict[int, Work]) -> None:
        """Trace these; returns when they are. Raises what can't be helped by another engine."""
        if works:
            batch = _Batch(works)
            self._asked.put(batch)
            batch.done.result()

    def stop(self) -> None:
        """End the thread: what was traced is on disk afterwards."""
        self._asked.put(None)
        self.join(_CLOSE_TIMEOUT_S)

    def run(self) -> None:
        """The thread."""
        try:
            self._run()
        except BaseException as error:
            if not self.ready.done():
                self.ready.set_exception(error)
            else:
                self._broken(error)

    def _run(self) -> None:
        from moescope.tracer.session import trace
        from moescope.tracer.worker import call_workers, joined

        plan = self._plan
        arguments = engine_arguments(plan.model, plan.options)
        if world_size(arguments) > 1:
            # Ray has given us the GPUs of one machine: the workers are our own processes there.
            arguments.distributed_executor_backend = "mp"
        llm = load_engine(arguments)
        check_lengths(llm, [plan.longest])
        with trace(llm, store=plan.store, run=plan.run, policy=plan.policy):
            rings = joined(call_workers(llm, "status"))["rings"]
            self.ready.set_result([ring["writer"] for ring in rings])
            with contextlib.suppress(_Stopped):
                self._serve(llm)

    def _serve(self, llm: Any) -> None:
        """Run what is asked for, until `stop`."""
        from moescope.tracer.session import settle

        engine = llm.llm_engine
        running: dict[str, tuple[int, _Batch]] = {}
        ended: list[_Batch] = []  # traced; the writer hears of it with the step that follows
        told = time.monotonic()
        finished: dict[int, int] = {}  # number -> tokens, for the ledger
        while True:
            busy = engine.has_unfinished_requests()
            if not busy and ended:
                settle(llm)
                self._tell(list(finished), list(finished.values()))
                finished = {}
                _release(ended)
            for batch in self._take(wait=not busy):
                for number, work in batch.works.items():
                    name = f"{self._name}-{work.line}"
                    enqueue(llm, self._plan.run, work, name)
                    running[name] = number, batch
            outputs = engine.step()
            _release(ended)
            for output in outputs:
                if output.finished:
                    number, batch = running.pop(output.request_id)
                    finished[number] = tokens_of(output)
                    batch.open -= 1
                    if not batch.open:
                        ended.append(batch)
            if finished and time.monotonic() - told > _TELL_EVERY_S:
                told = time.monotonic()
                self._tell(list(finished), list(finished.values()))
                finished = {}

    def _take(self, *, wait: bool) -> list[_Batch]:
        """What was asked for meanwhile; with `wait`, something."""
        taken: list[_Batch] = []
        with contextlib.suppress(queue.Empty):
            while True:
                batch = self._asked.get(block=wait and not taken)
                if batch is None:
                    raise _Stopped
                taken.append(batch)
        return taken


class _Stopped(Exception):  # noqa: N818  # not an error
    """`stop` was called."""


def make_block(numbers: list[int], works: list[Work]) -> pa.Table:
    """A block of requests, with their numbers in the ledger."""
    return pa.table(
        {
            "number": pa.array(numbers, pa.int64()),
            "work": pa.array([pickle.dumps(work) for work in works], pa.binary()),
        }
    )


def world_size(arguments: Any) -> int:
    """How many processes, and GPUs, an engine of these `engine_arguments` has."""
    return int(arguments.tensor_parallel_size * arguments.pipeline_parallel_size)


def _release(ended: list[_Batch]) -> None:
    for batch in ended:
        batch.done.set_result(None)
    ended.clear()
