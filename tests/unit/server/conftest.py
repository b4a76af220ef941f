"""A control plane around an engine that only remembers what it was told."""

import asyncio
from dataclasses import asdict

import pytest

from moescope.server.auth import Gate
from moescope.server.plane import Plane
from moescope.server.registry import Registry
from moescope.tracer.format import ModelFacts, MoeShape
from moescope.tracer.mask import RouterSpec, compile_mask, compose, make_mask

SHAPE = MoeShape((1, 2, 3), 8, 2)
FACTS = ModelFacts("m", None, "MoeForCausalLM", "float32", SHAPE, "softmax", True, "vllm 0")


class FakeEngine:
    """What a worker would do, without one; `busy` and `error` make its answers."""

    def __init__(self, num_slots=2):
        self.num_slots, self.composes, self.own, self.base = num_slots, False, {}, None
        self.slots, self.published, self.steering = {}, {}, None
        self.loads, self.busy, self.error, self.live = [], 0, None, []
        self.wait = None

    async def status(self):
        return {
            "facts": FACTS.to_json(),
            "router": asdict(RouterSpec("softmax", True)),
            "attached": True,
            "live": len(self.live),
            "num_slots": self.num_slots,
            "composes": self.composes,
            "slots": dict(self.slots),
            "global": self.steering,
        }

    async def load_mask(self, slot, key, mask):
        self.loads.append((slot, key))
        assert key.rpartition("@")[0] == mask.name
        if self.wait is not None:
            await self.wait.wait()
        if self.error is not None:
            raise self.error
        if self.busy:
            self.busy -= 1
            return False
        # A slot that requests may still name must never change under them.
        assert slot not in self.published.values()
        self.compose(mask, self.base)
        self.slots[slot], self.own[slot] = key, mask
        return True

    async def unload(self, slots):
        await asyncio.sleep(0)
        if self.busy:
            self.busy -= 1
            return False
        for slot in slots:
            assert slot not in self.published.values()
            del self.slots[slot], self.own[slot]
        return True

    def compose(self, mask, base):
        if self.composes and base is not None:
            compose(compile_mask(base, SHAPE), compile_mask(mask, SHAPE))

    async def set_global(self, key, mask):
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        assert (key is None) == (mask is None)
        for own in self.own.values():
            self.compose(own, mask)
        self.steering, self.base = key, mask

    async def sync(self):
        if self.live:
            self.live.pop()
        return await self.status()

    def publish(self, slots):
        for key, slot in slots.items():
            assert self.slots[slot] == key
        self.published = dict(slots)


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def make_plane(engine, tmp_path):
    """`make_plane(admin_key=None, store=None, ...)`; asked again, the one before is closed."""
    open_planes = []

    def make(admin_key=None, store=None, traces_by_default=False, composes=False):
        engine.composes = composes
        for plane in open_planes:
            plane.registry.close()
        plane = Plane(
            engine,
            asyncio.run(engine.status()),
            Registry(tmp_path / "masks"),
            Gate(admin_key),
            store=store,
            traces_by_default=traces_by_default,
        )
        open_planes.append(plane)
        return plane

    yield make
    for plane in open_planes:
        plane.registry.close()


@pytest.fixture
def mask():
    """`mask(name, *experts)` deactivates experts of layer 1."""

    def make(name, *experts, action="deactivate", **fields):
        entries = [{"layer": 1, "expert": e, "action": action} for e in experts]
        return make_mask(name=name, entries=entries, **fields)

    return make
