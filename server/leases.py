"""A slot of the engine for every request that names a mask, from before it runs to its end."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from moescope.server.engine import Engine
from moescope.tracer.errors import SlotsFullError
from moescope.tracer.mask import Mask
from moescope.tracer.slots import SlotBook

# A request that was given up by its client runs until the engine's next step.
_BUSY_TIMEOUT_S = 2.0
_BUSY_WAIT_S = 0.01


class Leases:
    """The slots of one engine, whose only user this must be."""

    def __init__(self, engine: Engine, num_slots: int) -> None:
        self._engine = engine
        self._book = SlotBook(num_slots)
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._loading = asyncio.Lock()

    @property
    def in_use(self) -> dict[str, int]:
        """How many requests hold each mask."""
        return self._book.leases

    @property
    def num_slots(self) -> int:
        """How many masks can be in use at once."""
        return self._book.num_slots

    @asynccontextmanager
    async def hold(self, key: str, mask: Mask) -> AsyncIterator[None]:
        """The mask is loaded inside the block; SlotsFullError if there is no slot for it."""
        lease = self._book.acquire(key)
        try:
            if lease.fresh:
                # Shielded: others may wait for the same load when this request is given up.
                await asyncio.shield(self._load_once(key, lease.slot, mask))
        except BaseException:
            self._book.fail(key)
            self._publish()
            raise
        self._publish()
        try:
            yield
        finally:
            self._book.release(key)
            self._publish()

    @asynccontextmanager
    async def without_idle(self) -> AsyncIterator[None]:
        """Inside the block the engine has the masks that requests hold, and gets no others."""
        async with self._loading:
            slots = self._book.drop_idle()
            if slots:
                await _insist(lambda: self._engine.unload(slots))
            yield

    def _publish(self) -> None:
        """Only masks that are held may be named: an idle one may lose its slot at any time."""
        held = self._book.leases
        self._engine.publish({k: slot for k, slot in self._book.loaded.items() if k in held})

    def _load_once(self, key: str, slot: int, mask: Mask) -> asyncio.Task[None]:
        task = self._loads.get(key)
        if task is None:
            # A lease of its own, so that the slot is nobody else's while the load is under way.
            self._book.acquire(key)
            task = self._loads[key] = asyncio.create_task(self._load(key, slot, mask))
            task.add_done_callback(lambda done: self._loaded(key, done))
        return task

    async def _load(self, key: str, slot: int, mask: Mask) -> None:
        try:
            if not await _insist(lambda: self._load_now(key, slot, mask)):
                raise SlotsFullError("requests still run in the mask's slot: try again later")
        except BaseException:
            self._book.fail(key)
            raise
        self._book.confirm(key)
        self._book.release(key)

    async def _load_now(self, key: str, slot: int, mask: Mask) -> bool:
        async with self._loading:
            return await self._engine.load_mask(slot, key, mask)

    def _loaded(self, key: str, done: asyncio.Task[None]) -> None:
        del self._loads[key]
        if not done.cancelled():
            done.exception()  # whoever still waits gets it; if nobody does, it is no news


async def _insist(ask: Callable[[], Awaitable[bool]]) -> bool:
    """Ask until the engine says yes; False if requests run in a slot for too long."""
    deadline = time.monotonic() + _BUSY_TIMEOUT_S
    while not await ask():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_BUSY_WAIT_S)
    return True
