"""Changes in two phases, with replicas that have a registry but no engine."""

import asyncio
from dataclasses import replace

import pytest
from fleets import Replica

from moescope.deploy.fleet import Fleet
from moescope.deploy.target import Target
from moescope.server.audit import State
from moescope.tracer.errors import InputError, StoreError

LEASE_S = 1.0
START = Target(State({"a": 1}))


def steered(key):
    return lambda target: replace(target, state=target.state.steer(key))


def put(target):
    return replace(target, state=target.state.put("a", target.state.latest["a"] + 1))


def with_fleet(story, lease_s=LEASE_S, *, waits=False):
    """Run the story; `waits`: with the wait of a coordinator that has just started."""

    async def run():
        fleet = Fleet(START, lambda _, version: {"v": version}, 2, lease_s)
        if not waits:
            fleet._first_change = 0.0
        try:
            return await story(fleet)
        finally:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

    return asyncio.run(run())


async def two(fleet, **second):
    replicas = [Replica(fleet, "one", START), Replica(fleet, "two", START, **second)]
    for replica in replicas:
        await replica.entered.wait()
    return replicas


def test_a_change_reaches_all_in_two_phases():
    async def story(fleet):
        one, two_ = await two(fleet)
        await fleet.bring(put)
        await fleet.bring(steered("a@2"))
        reach = await fleet.reach()
        assert (reach.reached, reach.not_reached, reach.all) == (["one", "two"], {}, True)
        want = Target(State({"a": 2}, {}, "a@2"))
        for replica in (one, two_):
            assert replica.have == fleet.target == want
            done = [(o.what, o.names, [s.what for s in o.steps]) for o in replica.orders]
            assert done == [
                ("prepare", {"a"}, ["put"]),
                ("commit", None, []),
                ("prepare", None, []),
                ("commit", None, ["steer"]),
            ]

    with_fleet(story)


def test_no_replica_commits_before_all_have_prepared():
    async def story(fleet):
        one, slow = await two(fleet)
        slow.deaf = True
        change = asyncio.create_task(fleet.bring(steered("a@1")))
        await asyncio.sleep(LEASE_S / 2)
        assert [order.what for order in one.orders] == ["prepare"]
        slow.deaf = False
        await change
        assert [order.what for order in one.orders] == ["prepare", "commit"]

    with_fleet(story)


@pytest.mark.parametrize("phase", ["prepare", "commit"])
def test_who_fails_is_named_and_out_until_it_has_caught_up(phase):
    async def story(fleet):
        one, bad = await two(fleet, fails=phase)
        await fleet.bring(steered("a@1"))
        bad.entered.clear()
        reach = await fleet.reach()
        assert (reach.reached, reach.all) == (["one"], False)
        assert reach.to_json()["not_reached"] == [{"replica": "two", "why": "it can't"}]
        assert one.have == fleet.target
        await bad.entered.wait()  # its next question tells it that it is out
        assert bad.have == fleet.target
        assert (await fleet.reach()).all

    with_fleet(story)


def test_a_change_waits_for_the_lease_of_one_that_is_not_heard_of():
    async def story(fleet):
        _, deaf = await two(fleet)
        deaf.deaf = True
        await asyncio.sleep(LEASE_S / 2)
        [lease_end] = [m.lease_end for m in fleet._members.values() if m.replica == "two"]
        await fleet.bring(steered("a@1"))
        assert asyncio.get_running_loop().time() >= lease_end
        reach = await fleet.reach()
        assert reach.reached == ["one"]
        assert "not heard of" in reach.not_reached["two"] or "no answer" in reach.not_reached["two"]
        deaf.entered.clear()
        deaf.deaf = False
        await deaf.entered.wait()
        assert deaf.have == fleet.target

    with_fleet(story)


def test_who_leaves_keeps_nobody_waiting():
    async def story(fleet):
        _, dead = await two(fleet)
        dead.deaf = True
        change = asyncio.create_task(fleet.bring(steered("a@1")))
        await asyncio.sleep(0.05)
        dead.task.cancel()
        fleet.leave("two", "its server has ended")
        await change
        assert (await fleet.reach()).not_reached == {"two": "its server has ended"}
        # Its successor has another name, and gets the change before it serves.
        fleet.join("three")
        assert "starting" in (await fleet.reach()).not_reached["three"]
        three = Replica(fleet, "three", START)
        await three.entered.wait()
        assert three.have == fleet.target
        assert (await fleet.reach()).all

    with_fleet(story, lease_s=1000.0)


def test_what_is_vetoed_changes_nothing_and_all_go_on():
    def vet(answers):
        assert sorted(answer.pages["who"] for answer in answers) == ["one", "two"]
        raise InputError("not together")

    async def story(fleet):
        replicas = await two(fleet)
        for replica in replicas:
            replica.pages = {"who": replica.name}
        with pytest.raises(InputError, match="not together"):
            await fleet.bring(steered("a@1"), vet)
        assert fleet.target == START
        for replica in replicas:
            assert replica.have == START
            assert replica.orders[-1].what == "commit"
            assert (replica.orders[-1].steps, replica.orders[-1].target) == ((), START)

    with_fleet(story)


def test_a_client_that_goes_does_not_stop_a_change_half_way():
    async def story(fleet):
        replicas = await two(fleet)
        change = asyncio.create_task(fleet.bring(steered("a@1")))
        await asyncio.sleep(0.01)
        change.cancel()
        assert (await fleet.reach()).all
        assert [replica.have for replica in replicas] == [fleet.target] * 2
        assert fleet.target.state.steering == "a@1"

    with_fleet(story)


def test_a_new_coordinator_changes_nothing_while_leases_of_the_old_one_may_hold():
    async def story(fleet):
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await fleet.bring(put)
        assert loop.time() - begun >= LEASE_S * 0.95
        assert not (await fleet.reach()).all

    with_fleet(story, waits=True)


def test_pages_of_all_and_a_registry_that_was_put_back():
    async def story(fleet):
        await two(fleet, pages={"/x": 2})
        assert await fleet.report("/x") == {"one": {}, "two": {"/x": 2}}
        with pytest.raises(StoreError, match="not as the registry has it"):
            await fleet.enter("three", Target(State({"a": 9})))
        assert "mask a" in (await fleet.reach()).not_reached["three"]

    with_fleet(story)


def test_a_ticket_of_the_coordinator_before_is_none():
    async def story(fleet):
        await two(fleet)
        after = Fleet(START, lambda _, version: {"v": version}, 2, LEASE_S)
        tickets = list(fleet._members)
        new = [(await after.enter(name, START)).ticket for name in ("two", "one")]
        assert not set(tickets) & set(new)
        assert await after.follow(tickets[0], None) is False

    with_fleet(story)
