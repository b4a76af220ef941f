import asyncio

import pytest

from moescope.server import leases as module
from moescope.server.leases import Leases
from moescope.tracer.errors import InputError, SlotsFullError


def test_an_idle_mask_stays_loaded_and_may_not_be_named(engine, mask):
    leases = Leases(engine, 2)

    async def run():
        for _ in range(3):
            async with leases.hold("a@1", mask("a")):
                assert engine.published == {"a@1": 1}
            assert engine.published == {}

    asyncio.run(run())
    assert engine.loads == [(1, "a@1")]
    assert leases.in_use == {}


def test_more_masks_than_slots_at_once_are_refused_and_one_after_the_other_are_not(engine, mask):
    leases = Leases(engine, 2)

    async def run():
        async with leases.hold("a@1", mask("a")), leases.hold("b@1", mask("b")):
            with pytest.raises(SlotsFullError):
                await leases.hold("c@1", mask("c")).__aenter__()
            async with leases.hold("a@1", mask("a")):
                assert leases.in_use == {"a@1": 2, "b@1": 1}
        for name in "cdefg":
            async with leases.hold(f"{name}@1", mask(name)):
                assert list(engine.published) == [f"{name}@1"]

    asyncio.run(run())
    assert leases.in_use == {}


def test_requests_that_come_together_wait_for_one_load(engine, mask):
    leases = Leases(engine, 2)

    async def one():
        async with leases.hold("a@1", mask("a")):
            await asyncio.sleep(0)
            return dict(engine.published)

    async def run():
        engine.wait = asyncio.Event()
        tasks = [asyncio.create_task(one()) for _ in range(5)]
        await asyncio.sleep(0.01)
        # Whoever gives up does not take the load away from the others.
        tasks[0].cancel()
        await asyncio.sleep(0)
        engine.wait.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, *others = asyncio.run(run())
    assert isinstance(first, asyncio.CancelledError)
    assert others == [{"a@1": 1}] * 4
    assert engine.loads == [(1, "a@1")]
    assert leases.in_use == {}


def test_a_load_that_everyone_gave_up_keeps_its_slot_to_itself(engine, mask):
    leases = Leases(engine, 1)

    async def run():
        engine.wait = asyncio.Event()
        task = asyncio.create_task(leases.hold("a@1", mask("a")).__aenter__())
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.sleep(0.01)
        with pytest.raises(SlotsFullError):
            await leases.hold("b@1", mask("b")).__aenter__()
        engine.wait.set()
        await asyncio.sleep(0.01)
        async with leases.hold("b@1", mask("b")):
            assert engine.slots == {1: "b@1"}

    asyncio.run(run())
    assert leases.in_use == {}


def test_a_failed_load_frees_its_slot(engine, mask):
    leases = Leases(engine, 1)

    async def run():
        engine.error = InputError("no")
        attempts = [leases.hold("a@1", mask("a")).__aenter__() for _ in range(3)]
        results = await asyncio.gather(*attempts, return_exceptions=True)
        assert [str(result) for result in results] == ["no"] * 3
        assert leases.in_use == {}
        engine.error = None
        async with leases.hold("b@1", mask("b")):
            pass

    asyncio.run(run())
    assert engine.loads == [(1, "a@1"), (1, "b@1")]


def test_idle_masks_leave_before_a_change_and_none_is_loaded_meanwhile(engine, mask):
    leases = Leases(engine, 3)
    seen = []

    async def request(name):
        async with leases.hold(f"{name}@1", mask(name)):
            seen.append(name)

    async def run():
        await request("idle")
        async with leases.hold("held@1", mask("held")):
            async with leases.without_idle():
                assert engine.slots == {2: "held@1"}
                others = [asyncio.create_task(request(name)) for name in ("idle", "new", "held")]
                await asyncio.sleep(0.01)
                assert seen == ["idle", "held"]
                assert engine.slots == {2: "held@1"}
            await asyncio.gather(*others)
        assert sorted(engine.slots.values()) == ["held@1", "idle@1", "new@1"]

    asyncio.run(run())
    assert leases.in_use == {}


def test_an_idle_mask_whose_last_request_is_ending_is_waited_for(engine, mask, monkeypatch):
    monkeypatch.setattr(module, "_BUSY_WAIT_S", 0.001)
    leases = Leases(engine, 1)

    async def run():
        async with leases.hold("a@1", mask("a")):
            pass
        engine.busy = 3
        async with leases.without_idle():
            assert engine.slots == {}

    asyncio.run(run())


def test_a_slot_whose_last_request_is_ending_is_waited_for(engine, mask, monkeypatch):
    monkeypatch.setattr(module, "_BUSY_WAIT_S", 0.001)
    leases = Leases(engine, 1)

    async def run():
        engine.busy = 3
        async with leases.hold("a@1", mask("a")):
            pass

    asyncio.run(run())
    assert len(engine.loads) == 4


def test_but_not_for_ever(engine, mask, monkeypatch):
    monkeypatch.setattr(module, "_BUSY_TIMEOUT_S", 0.02)
    leases = Leases(engine, 1)

    async def run():
        engine.busy = 10**6
        with pytest.raises(SlotsFullError, match="later"):
            await leases.hold("a@1", mask("a")).__aenter__()

    asyncio.run(run())
    assert leases.in_use == {}
