"""The writer process: takes rows out of the ring and appends whole files to the store.

    python -m moescope.tracer.writer '{"fd": 7, "engine": 8, ...}'   (started by sink.py)

A process and not a thread, since the engine's Python is the bottleneck of decoding. It outlives
the engine by as long as it needs: when the engine is gone, however it died, the rows in the ring
are still there; requests that were finished are written, the others are given up and counted.

A speculating engine computes tokens that may not be its requests': `Drafts` keeps their rows out.
"""

import json
import os
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from moescope.tracer.assemble import Assembler, Traced
from moescope.tracer.detached import has_ended
from moescope.tracer.format import ModelFacts, MoeShape, Stage
from moescope.tracer.ring import (
    BEGUN,
    BYTES,
    CLOSED,
    DROPPED_REQUESTS,
    DROPPED_ROWS,
    FILES,
    FINISHED,
    LOOKED_AT,
    LOST_ROWS,
    ROWS,
    RUNNING,
    SETTLED,
    STATE,
    SYNC_ASKED,
    SYNC_DONE,
    TAIL,
    WAITING_SINCE,
    WRITER,
    Ring,
    Rows,
)
from moescope.tracer.settings import Settings
from moescope.tracer.store import StoreWriter, WriterCounters

# Waking up costs the engine a moment of its cores; the ring has room for many steps.
_IDLE_SLEEP_S, _BUSY_SLEEP_S = 0.02, 0.01
# Taken at a time, so that files keep their size when the ring is full.
_BITE_ROWS = 8192


@dataclass(slots=True)
class _End:
    """Where a request of a speculating engine ends: no row has position `limit` or a later one.

    Known from the start is what its wishes allow. The limit falls to the position of the first stop
    token that the model gave, from position `stops_from` on.
    """

    limit: float
    stops_from: int
    stop_ids: list[int]


class Drafts:
    """Which rows of a speculating engine are their requests' own.

    A draft that was rejected has position -1 (vllm_seam.py). Of those that were accepted in a
    request's last step, some may lie behind its end: without speculation they had not been
    computed, and nor had the last token itself, be it the last by number or a stop token.
    """

    def __init__(self) -> None:
        self._ends: dict[int, _End] = {}

    def begin(self, traced: Traced, max_tokens: int | None, min_tokens: int) -> None:
        """A request gives `max_tokens` at most, and the `min_tokens`-th is the first to stop it."""
        limit = np.inf if max_tokens is None else traced.prompt_tokens + max_tokens - 1
        stops_from = traced.prompt_tokens + max(min_tokens, 1) - 1
        self._ends[traced.request] = _End(limit, stops_from, traced.stop_ids)

    def finish(self, request: int) -> None:
        """A request has no more rows."""
        self._ends.pop(request, None)

    def leave_out(self, rows: Rows) -> Rows:
        """The rows that are their requests' own; they must come in order."""
        if not self._ends:
            return rows
        keep = rows.position >= 0
        for request in np.unique(rows.request).tolist():
            if (end := self._ends.get(request)) is None:
                continue
            mine = np.flatnonzero((rows.request == request) & keep)
            positions = rows.position[mine]
            stops = (positions >= end.stops_from) & np.isin(rows.token[mine], end.stop_ids)
            end.limit = min([end.limit, *positions[stops].tolist()])
            keep[mine[positions >= end.limit]] = False
        return rows[keep]


class Writer:
    """The loop between the ring and the store."""

    def __init__(self, ring: Ring, store: StoreWriter, shape: MoeShape, settings: Settings):
        self.ring, self.store, self.settings = ring, store, settings
        memory_bytes = settings.writer_mib << 20
        self.assembler = Assembler(shape, memory_bytes=memory_bytes, spill=store.scratch)
        self._drafts = Drafts()
        # Rows taken out of the ring so far. Not HEAD: the engine may have written some by now.
        self._taken = ring.word(TAIL)
        # Messages behind rows still in the ring, with their places among the messages.
        self._pending: deque[tuple[int, dict[str, Any]]] = deque()
        self._committed_at = time.monotonic()
        self._earlier: list[WriterCounters] = []
        self._name, self._begun = "", 0

    def take_over(self, name: str, earlier: list[WriterCounters], mask: str | None) -> None:
        """Go on where another writer of this engine died; `mask` was in force globally there.

        What that one had taken and not put on disk is lost, and is counted in its name: its rows
        here, and its requests when the engine has said which of them run on.
        """
        ring, self._earlier, self._name = self.ring, earlier, name
        on_disk = sum(each.rows for each in earlier)
        # A file that was finished just before the end may not have been reported.
        lost = ring.word(TAIL) - ring.word(SETTLED) - (on_disk - ring.word(ROWS))
        earlier[-1].dropped_rows += lost
        self.store.amend(earlier[-1])
        ring.set_word(LOST_ROWS, ring.word(LOST_ROWS) + lost)
        ring.set_word(SETTLED, ring.word(TAIL))
        self._report_files()
        if mask is not None:
            self.assembler.mask_changes(mask)

    def run(self, engine: int) -> None:
        """Work until the engine closes the ring or is gone; `engine`: its `os.pidfd_open`."""
        while True:
            # Read before draining: what was sent before the end is then seen.
            ended = self.ring.word(CLOSED) or has_ended(engine)
            asked = self.ring.word(SYNC_ASKED)
            moved = self.drain()
            self._report()
            if moved == _BITE_ROWS:
                if self._due():
                    self.commit()
                continue
            if ended:
                self._give_up()
            if ended or asked != self.ring.word(SYNC_DONE) or self._due():
                self.commit()
                self.ring.set_word(SYNC_DONE, asked)
            if ended:
                return
            time.sleep(_BUSY_SLEEP_S if moved else _IDLE_SLEEP_S)

    def drain(self) -> int:
        """Take messages and at most `_BITE_ROWS` rows out of the ring; returns the rows."""
        self.ring.set_word(LOOKED_AT, time.monotonic_ns())
        blocks = self.ring.available()  # first: what begins these rows' requests is then there too
        for place, message in self.ring.receive():
            if message["op"] == "begin":
                self._begin(message)
            elif message["op"] == "resume":
                if message["writer"] == self._name:  # and not one that died while it started
                    self._resume(message["requests"])
            else:
                self._pending.append((place, message))
        moved = 0
        for block in blocks:
            bite = block[: _BITE_ROWS - moved]
            self._add(bite)
            self.ring.release(len(bite))
            moved += len(bite)
        self._apply()
        self.ring.forget(self._pending[0][0] if self._pending else None)
        return moved

    def _begin(self, message: dict[str, Any]) -> None:
        speculation = message.pop("speculation", None)
        traced = Traced(**{k: v for k, v in message.items() if k != "op"})
        if self.assembler.is_open(traced.request):
            return  # said again, in case that an earlier writer took the first message with it
        self.assembler.begin(traced)
        self._begun += 1
        self.ring.set_word(BEGUN, max(self.ring.word(BEGUN), traced.request))
        if speculation is not None:
            self._drafts.begin(traced, *speculation)

    def _resume(self, requests: int) -> None:
        """Of so many requests that the engine has begun, count those that no writer knows of."""
        known = self._begun + sum(e.requests + e.unfinished_requests for e in self._earlier)
        last = self._earlier[-1]
        last.unfinished_requests += max(0, requests - known)
        self.store.amend(last)

    def _add(self, rows: Rows) -> None:
        """Add rows, applying each message behind the last row that came before it."""
        done = 0
        while done < len(rows):
            self._apply()
            until = len(rows)
            if self._pending:
                until = min(until, done + self._pending[0][1]["rows_before"] - self._taken)
            self.assembler.add(self._drafts.leave_out(rows[done:until]))
            self._taken += until - done
            done = until

    def _apply(self) -> None:
        while self._pending and self._pending[0][1]["rows_before"] <= self._taken:
            _, message = self._pending.popleft()
            if message["op"] == "mask":
                self.assembler.mask_changes(message["mask"])
            elif not self.assembler.is_open(message["request"]):
                # It began with a writer that died, and is counted there.
                lost = self.assembler.give_up(message["request"])
                self.ring.set_word(LOST_ROWS, self.ring.word(LOST_ROWS) + lost)
            else:
                self._drafts.finish(message["request"])
                self.assembler.finish(message["request"], message["lost_rows"])

    def _give_up(self) -> None:
        """The engine is gone: what it had not handed over will not come any more.

        A request whose last rows were on their way is incomplete; one that ran is not written.
        """
        for _, message in self._pending:
            if message["op"] == "finish" and self.assembler.is_open(message["request"]):
                missing = message["rows_before"] - self._taken
                self._drafts.finish(message["request"])
                self.assembler.finish(message["request"], message["lost_rows"] + missing)
        if self._pending:
            missing = self._pending[-1][1]["rows_before"] - self._taken
            self.ring.set_word(DROPPED_ROWS, self.ring.word(DROPPED_ROWS) + missing)
            self._pending.clear()
        self.store.save_unfinished(self.assembler.num_open)

    def commit(self) -> None:
        """Write the finished requests, if any, as one pair of files."""
        self._committed_at = time.monotonic()
        tables = self.assembler.take()
        if tables is not None:
            self.store.commit(*tables)
            self._report_files()
            self._report()
        self.ring.set_word(SETTLED, self._taken - self.assembler.num_rows)
        # The engine's numbers are of all its writers.
        rows, requests = self.ring.word(DROPPED_ROWS), self.ring.word(DROPPED_REQUESTS)
        for each in self._earlier:
            rows, requests = rows - each.dropped_rows, requests - each.dropped_requests
        self.store.save_dropped(rows + self.ring.word(LOST_ROWS), requests)

    def _report_files(self) -> None:
        """Say in the ring what all writers of this engine have put on disk."""
        writers = [*self._earlier, self.store.counters]
        for word, name in ((FILES, "files"), (ROWS, "rows"), (BYTES, "bytes")):
            self.ring.set_word(word, sum(getattr(each, name) for each in writers))

    def _report(self) -> None:
        """Say in the ring since when finished requests have waited, for those who watch it."""
        waiting = self._committed_at if self.assembler.num_finished else 0
        self.ring.set_word(WAITING_SINCE, int(waiting * 1e9))

    def _due(self) -> bool:
        if not self.assembler.num_finished:
            self._committed_at = time.monotonic()
            return False
        waited = time.monotonic() - self._committed_at
        return (
            self.assembler.finished_rows >= self.settings.file_rows
            or waited >= self.settings.flush_seconds
        )


def main(argument: str) -> None:
    """Attach to the ring and run; a failure is left in the ring for the engine to report."""
    # The engine decides when to end: it closes the ring, or it is gone.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # The cores belong to the engine.
    pa.set_cpu_count(1)
    os.nice(10)
    given = json.loads(argument)
    facts, stage = ModelFacts.from_json(given["facts"]), None
    shape = facts.shape
    if given["stage"] is not None:
        stage = Stage(**given["stage"] | {"layers": tuple(given["stage"]["layers"])})
        shape = stage.of(shape)
    ring = Ring(given["fd"], shape, given["capacity"], given["message_bytes"])
    # The engine's settings as they are: this process must not read the environment anew.
    settings = Settings.model_construct(
        **{name: given["settings"][name] for name in ("writer_mib", "file_rows", "flush_seconds")}
    )
    try:
        ring.set_word(WRITER, os.getpid())
        with StoreWriter(given["store"], facts, writer=given["writer"], stage=stage) as store:
            writer = Writer(ring, store, shape, settings)
            if given["earlier"]:
                earlier = store.earlier(given["earlier"])
                writer.take_over(given["writer"], earlier, given["mask"])
            ring.set_word(STATE, RUNNING)
            writer.run(given["engine"])
        ring.set_word(STATE, FINISHED)
    except Exception as error:
        ring.fail(f"{type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    main(sys.argv[1])
