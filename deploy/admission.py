"""Which requests a replica lets through to its server now, and what a mask's name means to them."""

import asyncio
import time
from collections.abc import Iterable
from contextlib import suppress

from moescope.deploy.target import Target
from moescope.server.registry import read_key, resolve_key
from moescope.tracer.errors import MoescopeError


class OutError(MoescopeError):
    """The replica may not serve now; another one may."""


class Admission:
    """Closed until `open`, while a change is about to come (`bar`), and without a lease.

    A request that comes then waits, `patience_s` at most.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._target: Target | None = None
        self._barred: frozenset[str] | None = frozenset()  # names of masks; None: every request
        self._lease_end = 0.0
        self._news = asyncio.Condition()

    @property
    def serving(self) -> bool:
        """Whether requests go through, but for those that wait for a change."""
        return self._target is not None and time.monotonic() < self._lease_end

    async def open(self, target: Target) -> None:
        """The server has exactly this."""
        self._target, self._barred = target, frozenset()
        await self._tell()

    async def close(self) -> None:
        """The server may have something else from now on."""
        self._target = None
        await self._tell()

    async def bar(self, names: frozenset[str] | None) -> None:
        """Let requests wait that name one of these masks, or all."""
        self._barred = names
        await self._tell()

    async def renew(self, lease_end: float) -> None:
        """Serve until then, in the seconds of `time.monotonic`."""
        self._lease_end = lease_end
        await self._tell()

    async def admit(self, texts: Iterable[str]) -> dict[str, str]:
        """Wait until a request may pass that names these masks; returns the key of each.

        OutError if it has waited too long, UnknownError or InputError if there is no such mask.
        """
        names = {text: read_key(text)[0] for text in texts}
        deadline = time.monotonic() + self._patience_s
        async with self._news:
            while True:
                barred = self._barred is None or not self._barred.isdisjoint(names.values())
                if self._target is not None and self.serving and not barred:
                    state = self._target.state
                    return {text: resolve_key(state, text) for text in names}
                left = deadline - time.monotonic()
                if left <= 0:
                    raise OutError(
                        "this replica waits for a change of masks to reach it: ask again, or look "
                        "at GET /v1/replicas"
                    )
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), left)

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()
