"""A slot of the engine for every request that names a mask, from before it runs to its end."""

import asyncio
import time
from collections.abc import AsyncIterator
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
            deadline = time.monotonic() + _BUSY_TIMEOUT_S
            while not await self._engine.load_mask(slot, key, mask):
                if time.monotonic() > deadline:
                    raise SlotsFullError("requests still run in the mask's slot: try again later")
                await asyncio.sleep(_BUSY_WAIT_S)
        except BaseException:
            self._book.fail(key)
            raise
        self._book.confirm(key)
        self._book.release(key)

    def _loaded(self, key: str, done: asyncio.Task[None]) -> None:
        del self._loads[key]
        if not done.cancelled():
            done.exception()  # whoever still waits gets it; if nobody does, it is no news
