"""The writer process: takes rows out of the ring and appends whole files to the store.

    python -m moescope.tracer.writer '{"fd": 7, "parent": 4242, ...}'   (started by sink.py)

A process and not a thread, since the engine's Python is the bottleneck of decoding. It outlives
the engine by as long as it needs: when the engine is gone, however it died, the rows in the ring
are still there; requests that were finished are written, the others are given up.
"""

import json
import os
import signal
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import pyarrow as pa

from moescope.tracer.assemble import Assembler, Traced
from moescope.tracer.format import ModelFacts
from moescope.tracer.ring import (
    CLOSED,
    DROPPED_REQUESTS,
    DROPPED_ROWS,
    FINISHED,
    HEAD,
    RUNNING,
    STATE,
    SYNC_ASKED,
    SYNC_DONE,
    Ring,
    Rows,
)
from moescope.tracer.settings import Settings
from moescope.tracer.store import StoreWriter

# Waking up costs the engine a moment of its cores; the ring has room for many steps.
_IDLE_SLEEP_S, _BUSY_SLEEP_S = 0.02, 0.01
# Taken at a time, so that files keep their size when the ring is full.
_BITE_ROWS = 8192


class Writer:
    """The loop between the ring and the store."""

    def __init__(self, ring: Ring, store: StoreWriter, facts: ModelFacts, settings: Settings):
        self.ring, self.store, self.settings = ring, store, settings
        self.assembler = Assembler(
            facts.shape, memory_bytes=settings.writer_mib << 20, spill=store.path
        )
        self._taken = ring.word(HEAD)  # rows taken out of the ring so far
        self._pending: deque[dict[str, Any]] = deque()  # messages behind rows still in the ring
        self._committed_at = time.monotonic()

    def run(self, parent: int) -> None:
        """Work until the engine closes the ring or is gone."""
        while True:
            # Read before draining: what was sent before the end is then seen.
            ended = self.ring.word(CLOSED) or os.getppid() != parent
            asked = self.ring.word(SYNC_ASKED)
            moved = self.drain()
            if moved == _BITE_ROWS:
                if self._due():
                    self.commit()
                continue
            if ended or asked != self.ring.word(SYNC_DONE) or self._due():
                self.commit()
                self.ring.set_word(SYNC_DONE, asked)
            if ended:
                return
            time.sleep(_BUSY_SLEEP_S if moved else _IDLE_SLEEP_S)

    def drain(self) -> int:
        """Take messages and at most `_BITE_ROWS` rows out of the ring; returns the rows."""
        for message in self.ring.receive():
            if message["op"] == "begin":
                self.assembler.begin(Traced(**{k: v for k, v in message.items() if k != "op"}))
            else:
                self._pending.append(message)
        moved = 0
        for block in self.ring.available():
            bite = block[: _BITE_ROWS - moved]
            self._add(bite)
            self.ring.release(len(bite))
            moved += len(bite)
        self._apply()
        return moved

    def _add(self, rows: Rows) -> None:
        """Add rows, applying each message behind the last row that came before it."""
        done = 0
        while done < len(rows):
            self._apply()
            until = len(rows)
            if self._pending:
                until = min(until, done + self._pending[0]["rows_before"] - self._taken)
            self.assembler.add(rows[done:until])
            self._taken += until - done
            done = until

    def _apply(self) -> None:
        while self._pending and self._pending[0]["rows_before"] <= self._taken:
            message = self._pending.popleft()
            if message["op"] == "mask":
                self.assembler.mask_changes(message["mask"])
            else:
                self.assembler.finish(message["request"], message["lost_rows"])

    def commit(self) -> None:
        """Write the finished requests, if any, as one pair of files."""
        self._committed_at = time.monotonic()
        tables = self.assembler.take()
        if tables is not None:
            self.store.commit(*tables)
        self.store.save_dropped(self.ring.word(DROPPED_ROWS), self.ring.word(DROPPED_REQUESTS))

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
    facts = ModelFacts.from_json(given["facts"])
    ring = Ring(given["fd"], facts.shape, given["capacity"], given["message_bytes"])
    # The engine's settings as they are: this process must not read the environment anew.
    settings = Settings.model_construct(
        **{name: given["settings"][name] for name in ("writer_mib", "file_rows", "flush_seconds")}
    )
    try:
        with StoreWriter(Path(given["store"]), facts) as store:
            ring.set_word(STATE, RUNNING)
            Writer(ring, store, facts, settings).run(given["parent"])
        ring.set_word(STATE, FINISHED)
    except Exception as error:
        ring.fail(f"{type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    main(sys.argv[1])
