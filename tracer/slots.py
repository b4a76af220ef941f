"""Which mask lies in which slot of the engine, and who still needs it: bookkeeping, no engine.

    free ──acquire──▶ loading ──confirm──▶ leased (1, 2, ... requests) ──release──▶ idle
                         └────fail───▶ free            ▲                              │
                                                       └──────────acquire─────────────┘

An idle mask stays loaded, so that the next request with it waits for nothing, until its slot is
needed for another: the one that has been idle for longest goes first. Where own masks compose with
the global one, all idle ones go before that changes.
"""

from collections import OrderedDict
from dataclasses import dataclass

from moescope.tracer.errors import SlotsFullError


@dataclass(slots=True)
class Lease:
    """A slot for one request. `fresh`: the mask must still be loaded into it."""

    slot: int
    fresh: bool


@dataclass(slots=True)
class _Held:
    slot: int
    leases: int
    loaded: bool = False


class SlotBook:
    """Slots 1 to `num_slots` (slot 0 is the global mask's)."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots, 0, -1))
        self._held: OrderedDict[str, _Held] = OrderedDict()  # the longest idle first

    @property
    def loaded(self) -> dict[str, int]:
        """Slots by the key of the mask that lies in them."""
        return {key: held.slot for key, held in self._held.items() if held.loaded}

    @property
    def leases(self) -> dict[str, int]:
        """How many requests use each mask; idle ones are left out."""
        return {key: held.leases for key, held in self._held.items() if held.leases}

    def acquire(self, key: str) -> Lease:
        """Take a slot for a request with this mask; SlotsFullError if all are in use."""
        held = self._held.get(key)
        if held is None:
            held = self._held[key] = _Held(self._take(), 0)
        held.leases += 1
        return Lease(held.slot, fresh=not held.loaded)

    def confirm(self, key: str) -> None:
        """The mask has been loaded into its slot."""
        self._held[key].loaded = True

    def fail(self, key: str) -> None:
        """The mask could not be loaded: its lease ends, and with the last one the slot is free."""
        held = self._held[key]
        held.leases -= 1
        if not held.leases and not held.loaded:
            self._free.append(self._held.pop(key).slot)

    def release(self, key: str) -> None:
        """A request with this mask has ended."""
        held = self._held[key]
        held.leases -= 1
        if not held.leases:
            self._held.move_to_end(key)

    def drop_idle(self) -> list[int]:
        """Let go of the masks that no request uses; returns their slots, which are free now."""
        idle = [key for key, held in self._held.items() if not held.leases]
        slots = [self._held.pop(key).slot for key in idle]
        self._free += slots
        return slots

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        for key, held in self._held.items():
            if not held.leases:
                del self._held[key]
                return held.slot
        raise SlotsFullError(
            f"all {self.num_slots} mask slots are in use by running requests: try again later, or "
            "start the engine with more (MOESCOPE_SLOTS)"
        )
