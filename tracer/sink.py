"""Where a step's rows go: into the ring of a writer process, or nowhere."""

import json
import logging
import os
import sys
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from moescope.tracer.detached import Detached
from moescope.tracer.errors import StoreError, TracerError
from moescope.tracer.format import ModelFacts, Stage
from moescope.tracer.ring import (
    CLOSED,
    DROPPED_REQUESTS,
    DROPPED_ROWS,
    FAILED,
    FINISHED,
    STARTING,
    STATE,
    SYNC_ASKED,
    SYNC_DONE,
    Ring,
    Rows,
)
from moescope.tracer.settings import Settings

logger = logging.getLogger("moescope")

_START_TIMEOUT_S = 60.0
_WAIT_S = 0.0005
_ALIVE_EVERY_S = 0.1


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
    """The engine's end of the ring, and the owner of the writer process."""

    def __init__(
        self,
        store: Path,
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
        argument = {
            "fd": self._ring.fd,
            "capacity": capacity,
            "message_bytes": message_bytes,
            "store": str(store),
            "facts": facts.to_json(),
            "stage": None if stage is None else asdict(stage),
            "settings": settings.model_dump(mode="json"),
        }
        me = os.pidfd_open(os.getpid())
        argument |= {"engine": me}
        command = [sys.executable, "-m", "moescope.tracer.writer", json.dumps(argument)]
        self._process = Detached(command, pass_fds=[self._ring.fd, me])
        os.close(me)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while self._ring.word(STATE) == STARTING:
            self._check_alive()
            if time.monotonic() > deadline:
                self._process.kill()
                raise TracerError(f"the trace writer didn't start within {_START_TIMEOUT_S:.0f} s")
            time.sleep(_WAIT_S)
        self._check_alive()

    @property
    def dropped_rows(self) -> int:
        """Rows that were let go since the start."""
        return self._ring.word(DROPPED_ROWS)

    @property
    def ring(self) -> Ring:
        """The ring, for those who fill it by themselves (`reserve`, then `publish`)."""
        return self._ring

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
            gone = "" if self._process.running() else ": its writer is gone, restart the engine"
            logger.error("the trace store can't keep up, rows are dropped and counted%s", gone)

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
            raise TracerError(
                "the trace writer died; restart the engine to trace again, what it had written is "
                "whole"
            )
