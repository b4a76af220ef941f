"""Who traces which requests of a job on Ray, and which writers must have ended before a retry.

When a replica dies, Ray gives its requests out again, and some of them may be in the store: its
writer outlives it and commits what was finished. The ledger remembers who had a request, so that
the next one waits for that writer's end, and then looks at what is there. It is an actor of one
job; losing it ends the job, which is then run again.
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moescope.tracer.object_path import StorePath
from moescope.tracer.store import living_writers

NOBODY = -1


@dataclass(slots=True)
class ReplicaState:
    """One process that holds an engine, or held one. `actor`: the same for all that replaced it.

    `writers` are those of its engine (several in a pipeline), known once it is `ready`.
    """

    number: int
    actor: str
    host: str
    pid: int
    writers: list[str] = field(default_factory=list)
    ready: bool = False
    failure: str | None = None


class Ledger:
    """The replicas of a job, who had which request, and which are done."""

    def __init__(self, num_requests: int) -> None:
        self._replicas: list[ReplicaState] = []
        self._owner = np.full(num_requests, NOBODY, np.int32)
        self._done = np.zeros(num_requests, bool)
        self._tokens = 0
        self._fatal: tuple[str, str] | None = None

    def begin(self, actor: str, host: str, pid: int) -> tuple[int, int, str]:
        """A process starts; returns its number, how many of this actor were before it, and what
        the last one died of.
        """
        before = [replica for replica in self._replicas if replica.actor == actor]
        self._replicas.append(ReplicaState(len(self._replicas), actor, host, pid))
        last = before[-1] if before else None
        return len(self._replicas) - 1, len(before), cause(last) if last else ""

    def ready(self, number: int, writers: Sequence[str]) -> None:
        """Its engine traces, through these writers."""
        replica = self._replicas[number]
        replica.writers, replica.ready = list(writers), True

    def claim(self, number: int, requests: Sequence[int]) -> list[str]:
        """These requests are this replica's now; returns the writers of those who had any."""
        mine = np.asarray(requests)
        before = np.unique(self._owner[mine])
        self._owner[mine] = number
        return [
            writer
            for owner in before.tolist()
            if owner not in (NOBODY, number)
            for writer in self._replicas[owner].writers
        ]

    def done(self, requests: Sequence[int], tokens: Sequence[int]) -> None:
        """These requests are traced, of so many tokens; one that is told twice counts once."""
        for request, count in zip(requests, tokens, strict=True):
            if not self._done[request]:
                self._done[request] = True
                self._tokens += count

    def failed(self, number: int, message: str) -> None:
        """A process is about to end by itself, and why."""
        self._replicas[number].failure = message

    def fatal(self, kind: str, message: str) -> None:
        """The job can't go on: the error's class in tracer/errors.py, and its text."""
        self._fatal = self._fatal or (kind, message)

    def state(self) -> dict[str, Any]:
        """What the command shows: replicas, requests done, their tokens, the fatal error."""
        return {
            "replicas": self._replicas,
            "done": int(self._done.sum()),
            "tokens": self._tokens,
            "fatal": self._fatal,
        }


def cause(replica: ReplicaState) -> str:
    """What a process died of, as far as it could say."""
    return (
        replica.failure or f"without a word (killed?), as process {replica.pid} on {replica.host}"
    )


def wait_for_writers(
    store: StorePath, writers: Collection[str] | None, timeout_s: float
) -> list[str]:
    """Wait until these writers of a store (None: all) have ended; returns those that live on."""
    deadline, pause_s = time.monotonic() + timeout_s, 0.05
    while True:
        living = [w for w in living_writers(store) if writers is None or w in writers]
        if not living or time.monotonic() > deadline:
            return living
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 1.0)
