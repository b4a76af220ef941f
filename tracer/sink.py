"""Where a step's rows go: into the ring of a writer process, or nowhere."""

import json
import logging
import os
import sys
import time
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

from moescope.tracer.detached import Detached
from moescope.tracer.errors import StoreError, TracerError
from moescope.tracer.format import ModelFacts, Stage
from moescope.tracer.object_path import Where
from moescope.tracer.ring import (
    CLOSED,
    DROPPED_REQUESTS,
    DROPPED_ROWS,
    FAILED,
    FINISHED,
    LOST_ROWS,
    STARTING,
    STATE,
    SYNC_ASKED,
    SYNC_DONE,
    TAIL,
    Ring,
    Rows,
)
from moescope.tracer.settings import Settings

logger = logging.getLogger("moescope")

_START_TIMEOUT_S = 60.0
_WAIT_S = 0.0005
_ALIVE_EVERY_S = 0.1
_LOOK_EVERY_S, _LONGEST_WAIT_S = 1.0, 60.0


class Sink(Protocol):
    """Takes rows and messages of one engine."""

    def write(self, rows: Rows) -> bool:
        """Take a step's rows; False when they were dropped."""

    def send(self, message: dict[str, Any]) -> bool:
        """Pass a `begin`, `finish` or `mask` message on; False when there was no room."""

    def poll(self, *, wait: bool = False) -> None:
        """Let go of the rows whose copy has arrived; with `wait`, of all."""

    def sync(self) -> None:
        """Return when everything finished so far is on disk."""

    def close(self) -> None:
        """Finish; every finished request is on disk afterwards."""


class Arrival(Protocol):
    """The end of a copy, such as a `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether it has happened."""

    def synchronize(self) -> None:
        """Wait for it."""


class NullSink:
    """Takes everything and keeps nothing: what tracing costs without the writing."""

    def write(self, rows: Rows) -> bool:  # noqa: ARG002
        """Do nothing."""
        return True

    def send(self, message: dict[str, Any]) -> bool:  # noqa: ARG002
        """Do nothing."""
        return True

    def poll(self, *, wait: bool = False) -> None:
        """Do nothing."""

    def sync(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class RingSink:
    """The engine's end of the ring, and the owner of the writer process.

    When the writer dies, an engine that is to block raises an error: a batch job is run again, and
    nothing is lost. One that is to drop rows serves people, and starts another (`resume`).
    """

    def __init__(
        self,
        store: Where,
        facts: ModelFacts,
        settings: Settings,
        *,
        min_rows: int = 1,
        stage: Stage | None = None,
    ) -> None:
        """`min_rows`: the ring takes that many at least, whatever its size in the settings.

        `facts` are the whole model's; `stage`: of a pipeline, whose layers the rows have.
        """
        shape = facts.shape if stage is None else stage.of(facts.shape)
        self._arriving: deque[tuple[int, Arrival | None]] = deque()
        self._block = settings.policy == "block"
        self._warned = False
        capacity = max((settings.ring_mib << 20) // shape.row_bytes, min_rows)
        message_bytes = 1 << 22
        self._ring = Ring.create(shape, capacity, message_bytes)
        self._argument: dict[str, Any] = {
            "fd": self._ring.fd,
            "capacity": capacity,
            "message_bytes": message_bytes,
            "store": str(store),
            "facts": facts.to_json(),
            "stage": None if stage is None else asdict(stage),
            "settings": settings.model_dump(mode="json"),
        }
        self._names: list[str] = []  # of all writers that there were
        # Global masks, and the rows before each: those that a writer has not come to, and one more.
        self._masks: deque[tuple[int, str | None]] = deque([(0, None)])
        self._look_at = time.monotonic() + _LOOK_EVERY_S
        self._patience_s = _LOOK_EVERY_S
        self._process = self._start()
        deadline = time.monotonic() + _START_TIMEOUT_S
        while self._ring.word(STATE) == STARTING:
            self._check_alive()
            if time.monotonic() > deadline:
                self._process.kill()
                raise TracerError(f"the trace writer didn't start within {_START_TIMEOUT_S:.0f} s")
            time.sleep(_WAIT_S)
        self._check_alive()

    def _start(self) -> Detached:
        """Start a writer, which goes on where the last one was."""
        ring = self._ring
        while len(self._masks) > 1 and self._masks[1][0] <= ring.word(TAIL):
            self._masks.popleft()
        name, me = uuid.uuid4().hex[:12], os.pidfd_open(os.getpid())
        argument = self._argument | {"engine": me, "writer": name, "earlier": self._names}
        argument["mask"] = self._masks[0][1]
        ring.set_word(STATE, STARTING)
        command = [sys.executable, "-m", "moescope.tracer.writer", json.dumps(argument)]
        process = Detached(command, pass_fds=[ring.fd, me])
        os.close(me)
        self._names.append(name)
        self._started = time.monotonic()
        return process

    @property
    def has_stopped(self) -> bool:
        """Whether the writer is dead, and there is to be another."""
        return not self._block and not self._process.running()

    @property
    def wants_another(self) -> bool:
        """Whether the writer is dead and it is time for another; looks once a second."""
        now = time.monotonic()
        if now < self._look_at:
            return False
        self._look_at = now + _LOOK_EVERY_S
        if not self.has_stopped:
            return False
        # One that dies at once, again and again, is left alone for longer and longer.
        lived = now - self._started
        if lived > _LONGEST_WAIT_S:
            self._patience_s = _LOOK_EVERY_S
        if lived < self._patience_s:
            return False
        self._patience_s = min(2 * self._patience_s, _LONGEST_WAIT_S)
        return True

    def resume(self, begins: Sequence[dict[str, Any]], requests: int) -> bool:
        """Start another writer after the death of one; False: say how many requests again.

        `begins` are the messages of the requests that run, `requests` how many began ever.
        """
        failure = self._ring.failure if self._ring.word(STATE) == FAILED else "it was killed"
        logger.error("the trace writer died (%s); starting another", failure)
        self._process.close()
        self._process = self._start()
        self._warned = False
        for message in begins:
            self._ring.send(message)
        return self._ring.send(self.resumed(requests))

    def resumed(self, requests: int) -> dict[str, Any]:
        """The message to the present writer of how many requests began before it."""
        return {"op": "resume", "writer": self._names[-1], "requests": requests}

    @property
    def dropped_rows(self) -> int:
        """Rows that were let go since the start, or lost by a writer that died."""
        return self._ring.word(DROPPED_ROWS) + self._ring.word(LOST_ROWS)

    @property
    def ring(self) -> Ring:
        """The ring, for those who fill it by themselves (`reserve`, then `publish`)."""
        return self._ring

    @property
    def where(self) -> dict[str, Any]:
        """Where other processes find the ring's counters (ring_watch.py), and its writer's name."""
        stage = self._argument["stage"]
        prefix = "" if stage is None else f"p{stage['number']}of{stage['count']}-"
        return {
            "engine": os.getpid(),
            "fd": self._ring.fd,
            "capacity": self._ring.capacity,
            "writer": prefix + self._names[-1],
        }

    def write(self, rows: Rows) -> bool:
        """Copy rows into the ring; waits or drops by the policy when it is full."""
        count = len(rows)
        done = 0
        while done < count:  # once, but for a step larger than the ring
            size = min(count - done, self._ring.capacity) if self._block else count
            parts = self.reserve(size)
            if parts is None:
                return False
            for source, target in parts:
                chosen = slice(done + source.start, done + source.stop)
                mines = self._ring.columns[target].columns()
                for mine, theirs in zip(mines, rows.columns(), strict=True):
                    mine[:] = theirs[chosen]
            self.publish(size)
            done += size
        return True

    def reserve(self, count: int) -> list[tuple[slice, slice]] | None:
        """Parts of the ring for rows to come (see `Ring.reserve`), by the policy.

        Waits for room, or counts the rows as dropped and gives None.
        """
        self.poll()
        ring = self._ring
        if not self._block and count > ring.free:
            ring.set_word(DROPPED_ROWS, ring.word(DROPPED_ROWS) + count)
            self._warn_once()
            return None
        self._wait_for(lambda: ring.free >= count)
        return ring.reserve(count)

    def publish(self, count: int, arrival: Arrival | None = None) -> None:
        """The writer may have the oldest reserved rows, once `arrival` has happened."""
        self._arriving.append((count, arrival))
        self.poll()

    def poll(self, *, wait: bool = False) -> None:
        """Publish what has arrived; with `wait`, all of it."""
        while self._arriving:
            count, arrival = self._arriving[0]
            if arrival is not None and wait:
                arrival.synchronize()
            elif arrival is not None and not arrival.query():
                return
            self._arriving.popleft()
            self._ring.publish(count)

    def send(self, message: dict[str, Any]) -> bool:
        """Queue a message; waits or gives up by the policy when there is no room."""
        if message["op"] != "begin":
            message["rows_before"] = self._ring.reserved
        if message["op"] == "mask":
            while self._masks[-1][0] > self._ring.reserved:
                self._masks.pop()
            self._masks.append((self._ring.reserved, message["mask"]))
        if self._block:
            self._wait_for(lambda: self._ring.send(message))
            return True
        sent = self._ring.send(message)
        if not sent and message["op"] == "begin":
            self._ring.set_word(DROPPED_REQUESTS, self._ring.word(DROPPED_REQUESTS) + 1)
        return sent

    def sync(self) -> None:
        """Wait until every request finished so far is on disk; TracerError if that fails."""
        self.poll(wait=True)
        asked = self._ring.word(SYNC_ASKED) + 1
        self._ring.set_word(SYNC_ASKED, asked)
        self._wait_for(lambda: self._ring.word(SYNC_DONE) >= asked)

    def close(self) -> None:
        """End the writer; TracerError if it failed."""
        self.poll(wait=True)
        self._ring.set_word(CLOSED, 1)
        self._process.wait()
        self._process.close()
        state, failure = self._ring.word(STATE), self._ring.failure
        self._ring.close()
        if state != FINISHED:
            raise TracerError(f"the trace writer failed: {failure or 'it was killed'}")

    def _warn_once(self) -> None:
        if not self._warned:
            self._warned = True
            logger.error("the trace store can't keep up, rows are dropped and counted")

    def _wait_for(self, ready: Any) -> None:
        checked = time.monotonic()
        while not ready():
            self.poll()
            if time.monotonic() - checked > _ALIVE_EVERY_S:
                self._check_alive()
                checked = time.monotonic()
            time.sleep(_WAIT_S)

    def _check_alive(self) -> None:
        if self._ring.word(STATE) == FAILED:
            self._process.wait()
            kind, _, message = self._ring.failure.partition(": ")
            if kind == StoreError.__name__:
                raise StoreError(message)
            raise TracerError(f"the trace writer failed: {self._ring.failure}")
        if not self._process.running():
            if self._ring.word(STATE) == STARTING:
                raise TracerError(
                    "the trace writer could not start, and nothing is traced; what it said of the "
                    "reason is above, where the engine's errors go"
                )
            then = "restart the engine to trace again" if self._block else "another will start"
            raise TracerError(f"the trace writer died; {then}, what it had written is whole")
