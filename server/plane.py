"""The control plane of one server: what its routes and its middleware share."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any

from moescope.server.audit import split_key
from moescope.server.auth import Gate
from moescope.server.engine import Engine
from moescope.server.errors import ConflictError, UnknownError
from moescope.server.leases import Leases
from moescope.server.logs import log_change
from moescope.server.metrics import Counts
from moescope.server.registry import Registry, StoredMask
from moescope.server.wishes import check_run
from moescope.tracer.errors import InputError, StoreError
from moescope.tracer.format import ModelFacts
from moescope.tracer.mask import ComposeError, Mask, RouterSpec, check_mask, mask_in_force
from moescope.tracer.mask_format import NO_MASK
from moescope.tracer.object_path import Where

logger = logging.getLogger("moescope")

_SETTLE_TIMEOUT_S = 2.0
_SETTLE_WAIT_S = 0.02


class Plane:
    """Masks, slots, the global mask and runs.

    Changes are made one after the other, and in a thread, since they wait for the disk: the event
    loop has streams to serve.
    """

    def __init__(
        self,
        engine: Engine,
        status: dict[str, Any],
        registry: Registry,
        gate: Gate,
        *,
        store: Where | None,
        traces_by_default: bool,
    ) -> None:
        self.engine, self.registry, self.gate = engine, registry, gate
        self.store, self.traces_by_default = store, traces_by_default
        self.facts = ModelFacts.from_json(status["facts"])
        self.spec = RouterSpec(**status["router"])
        self.leases = Leases(engine, status["num_slots"])
        self.composes: bool = status["composes"]  # own masks are in force with the global one
        self.started: str | None = None  # the run that takes requests which name none
        self.counts = Counts()
        self._changes = asyncio.Lock()
        self._fitting: set[str] = set()  # keys of masks that were checked: versions never change

    def in_force(self, own: str | None) -> str:
        """What a request with this mask of its own (None: it says nothing) is steered by now."""
        key = self.registry.state.steering
        return mask_in_force(key, own, composes=self.composes) or NO_MASK

    def check(self, mask: Mask) -> None:
        """Refuse a mask that does not fit the model."""
        check_mask(mask, self.facts.shape, self.spec)

    async def restore(self) -> None:
        """Put the global mask in force that the last server had."""
        key = self.registry.state.steering
        if key is None:
            return
        try:
            mask = self.registry.resolve(key).mask
            self.check(mask)
        except InputError as error:
            raise StoreError(
                f"the global mask {key} can't be put in force again: {error}. Name another "
                '--masks for this model, or write "steering": null into state.json'
            ) from None
        await self.engine.set_global(key, mask)
        logger.info("global mask %s is in force", key)

    # Masks.

    async def put(self, mask: Mask, who: str) -> tuple[StoredMask, bool]:
        """Add a version; see `Registry.put`."""
        self.check(mask)
        async with self._changes:
            stored, created = await asyncio.to_thread(self.registry.put, mask, who)
        if created:
            log_change("mask put", mask=stored.key, who=who)
        return stored, created

    async def delete(self, name: str, who: str) -> str:
        """Delete a name; requests that run under it keep their slot."""
        async with self._changes:
            key = await asyncio.to_thread(self.registry.delete, name, who)
        self.counts.forget(lambda key: self.registry.state.has(*split_key(key)))
        log_change("mask deleted", mask=key, who=who)
        return key

    async def steer(self, text: str | None, who: str) -> str | None:
        """Change the global mask to this one, or to none; returns its key.

        ConflictError if own masks compose and one that a request holds can't be in force with it.
        """
        if text == NO_MASK:
            raise InputError("to have no global mask, DELETE /v1/steering")
        async with self._changes:
            stored = None if text is None else self.registry.resolve(text)
            if stored is not None:
                self.check(stored.mask)
            before = self.registry.state.steering
            key = None if stored is None else stored.key
            if key == before:
                return key
            async with self.leases.without_idle() if self.composes else nullcontext():
                try:
                    await self._set_global(key, None if stored is None else stored.mask)
                    await asyncio.to_thread(self.registry.set_steering, key, who)
                except Exception:
                    # What is not on disk, or not in every replica, must not stay in force.
                    old = None if before is None else self.registry.resolve(before).mask
                    await self.engine.set_global(before, old)
                    raise
            log_change("global mask set", mask=key, before=before, who=who)
            return key

    async def _set_global(self, key: str | None, mask: Mask | None) -> None:
        try:
            await self.engine.set_global(key, mask)
        except ComposeError as error:
            raise ConflictError(
                f"{key} can't become the global mask while a request has its own: {error}. Or try "
                "again when that request has ended"
            ) from None

    def resolve(self, masks: tuple[str, ...]) -> StoredMask | None:
        """The mask that a request names, by one or two names; None for "none"."""
        found = [None if text == NO_MASK else self.registry.resolve(text) for text in masks]
        keys = {NO_MASK if mask is None else mask.key for mask in found}
        if len(keys) > 1:
            raise InputError(
                f"the header names mask {masks[0]!r} and the body {masks[1]!r}: name it once, or "
                "the same"
            )
        return found[0]

    @asynccontextmanager
    async def steered(self, masks: tuple[str, ...]) -> AsyncIterator[str | None]:
        """The key of a request's own mask, which is loaded inside the block."""
        mask = self.resolve(masks) if masks else None
        if mask is None:
            yield NO_MASK if masks else None
            return
        if mask.key not in self._fitting:
            self.check(mask.mask)
            self._fitting.add(mask.key)
        async with self.leases.hold(mask.key, mask.mask):
            yield mask.key

    # Runs.

    def demand_store(self) -> Where:
        """The trace store; ConflictError if the server has none."""
        if self.store is None:
            raise ConflictError("this server has no trace store: start it with --store DIR")
        return self.store

    async def start(self, run: str) -> None:
        """Trace requests that name no run into this one."""
        check_run(run)
        self.demand_store()
        if self.started not in (None, run):
            raise ConflictError(f"the run {self.started} is started: stop it first")
        self.started = run
        log_change("run started", run=run)

    async def stop(self, run: str) -> dict[str, Any]:
        """End that, and put finished requests on disk; returns the tracer's status."""
        check_run(run)
        if self.started != run:
            raise UnknownError(f"the run {run} is not started")
        self.started = None
        log_change("run stopped", run=run)
        deadline = time.monotonic() + _SETTLE_TIMEOUT_S
        while True:
            # Requests that have ended are told to the workers with the step after.
            status = await self.engine.sync()
            if not status["live"] or time.monotonic() > deadline:
                return status
            await asyncio.sleep(_SETTLE_WAIT_S)
