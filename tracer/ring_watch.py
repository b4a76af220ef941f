"""A ring's counters, read by a process that stands at neither of its ends.

A server's metrics come from here: looking costs the engine nothing, not even a remote call. The
header of the ring is mapped read-only through /proc, so this works on the engine's own machine and
for its own user.
"""

import mmap
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace

import numpy as np

from moescope.tracer.detached import has_ended
from moescope.tracer.errors import TracerError
from moescope.tracer.ring import (
    BEGUN,
    BYTES,
    DROPPED_REQUESTS,
    DROPPED_ROWS,
    FILES,
    HEAD,
    HEADER_BYTES,
    LOOKED_AT,
    LOST_ROWS,
    MAGIC,
    MESSAGE_HEAD,
    MESSAGE_TAIL,
    ROWS,
    RUNNING,
    STATE,
    TAIL,
    WAITING_SINCE,
    WRITER,
)


@dataclass(frozen=True, slots=True)
class RingCounts:
    """What an engine has handed to its writer since its start, and what the writer did with it.

    `tokens` counts rows, those of a token that was computed again twice. `slots` are the ring's
    rows. `lag_s`: how long what could be on disk has not been: the longer of the times for which
    finished requests have waited for their file, and rows for a writer that looks at them.
    """

    tokens: int
    requests: int
    dropped_rows: int
    dropped_requests: int
    slots: int
    slots_in_use: int
    lag_s: float
    up: bool
    files: int
    rows: int
    bytes: int


class RingWatch:
    """One ring, seen from outside."""

    def __init__(self, where: Mapping[str, int]) -> None:
        """`where`: as `RingSink.where` says. TracerError if it can't be read from here."""
        self._capacity = where["capacity"]
        path = f"/proc/{where['engine']}/fd/{where['fd']}"
        try:
            ring = os.open(path, os.O_RDONLY)
            try:
                header = mmap.mmap(ring, HEADER_BYTES, prot=mmap.PROT_READ)
            finally:
                os.close(ring)
        except (OSError, ValueError) as error:
            raise TracerError(
                f"the ring's counters can't be read ({path}: {error}): the engine must run on this "
                "machine, as the same user"
            ) from None
        self._words = np.frombuffer(header, np.uint64)
        if int(self._words[0]) != MAGIC:
            raise TracerError(f"{path} is no ring of moescope's")
        self._pid = 0
        self._writer: int | None = None

    def counts(self) -> RingCounts:
        """The counters as they are now."""
        # Tails before heads: both grow meanwhile, and what lies between must not be negative.
        tails = self._word(TAIL), self._word(MESSAGE_TAIL)
        waiting_since, looked_at = self._word(WAITING_SINCE), self._word(LOOKED_AT)
        heads = self._word(HEAD), self._word(MESSAGE_HEAD)
        now = time.monotonic_ns()
        since = [waiting_since] if waiting_since else []
        if heads != tails:
            since.append(looked_at or now)
        return RingCounts(
            tokens=heads[0],
            requests=self._word(BEGUN),
            dropped_rows=self._word(DROPPED_ROWS) + self._word(LOST_ROWS),
            dropped_requests=self._word(DROPPED_REQUESTS),
            slots=self._capacity,
            slots_in_use=heads[0] - tails[0],
            lag_s=max((now - at) / 1e9 for at in [*since, now]),
            up=self.running,
            files=self._word(FILES),
            rows=self._word(ROWS),
            bytes=self._word(BYTES),
        )

    @property
    def running(self) -> bool:
        """Whether the writer lives and has not failed."""
        if self._word(WRITER) != self._pid:  # one that died has been replaced
            self.close()
            self._pid = self._word(WRITER)
            with suppress(ProcessLookupError):
                self._writer = os.pidfd_open(self._pid)
        alive = self._writer is not None and not has_ended(self._writer)
        return alive and self._word(STATE) == RUNNING

    def close(self) -> None:
        """Look at it no more."""
        if self._writer is not None:
            os.close(self._writer)
            self._writer = None

    def _word(self, index: int) -> int:
        return int(self._words[index])


def joined_counts(counts: Sequence[RingCounts]) -> RingCounts:
    """One of all rings of an engine: a pipeline has one a stage, each with every token."""
    return replace(
        summed_counts(counts),
        tokens=max(each.tokens for each in counts),
        requests=max(each.requests for each in counts),
        dropped_requests=max(each.dropped_requests for each in counts),
    )


def summed_counts(counts: Sequence[RingCounts]) -> RingCounts:
    """One of engines that have requests of their own; the longest of their lags."""
    names = {field.name for field in fields(RingCounts)} - {"lag_s", "up"}
    return RingCounts(
        **{name: sum(getattr(each, name) for each in counts) for name in names},
        lag_s=max(each.lag_s for each in counts),
        up=all(each.up for each in counts),
    )
