"""The one control plane of all replicas, over replicas that have a registry but no engine."""

import asyncio
import json
from dataclasses import asdict
from functools import partial

import pytest
from fleets import Replica

from moescope.deploy.coordinator import Coordinator
from moescope.deploy.proxy import Call
from moescope.deploy.target import Target
from moescope.server.registry import Registry
from moescope.tracer.mask import RouterSpec

KEY = "admin-key"
MOE = {
    "model": "m",
    "architecture": "MoeForCausalLM",
    "moe_layers": [0, 1],
    "num_experts": 8,
    "top_k": 2,
    "router": asdict(RouterSpec("softmax", True)),
    "global_mask": None,
    "own_mask": "compose",
    "slots": {"total": 2, "in_use": {}, "loaded": []},
}


class Line:
    """The coordinator, as a replica of this model calls it."""

    def __init__(self, coordinator, moe):
        self.coordinator, self.moe = coordinator, moe
        self.follow = coordinator.follow

    async def enter(self, name, have):
        return await self.coordinator.enter(name, have, self.moe)


class Fixture:
    def __init__(self, masks):
        self.coordinator = Coordinator(str(masks), None, 2, 60.0)
        self.coordinator._fleet._first_change = 0.0
        for method in ("get", "put", "delete", "post"):
            setattr(self, method, partial(self.ask, method.upper()))

    async def start(self, name, moe=MOE, run=None):
        copy = await self.coordinator.join(name)
        line, pages = Line(self.coordinator, moe), {"/v1/moe": moe}
        replica = Replica(line, name, Target(copy.state, run), pages=pages)
        waits = asyncio.create_task(replica.entered.wait())
        await asyncio.wait([waits, replica.task], return_when=asyncio.FIRST_COMPLETED)
        if replica.task.done():
            replica.task.result()
        return replica

    async def ask(self, method, url, body=None, key=KEY, client="10.0.0.1"):
        headers = [(b"host", b"x"), (b"content-type", b"application/json")]
        if key is not None:
            headers.append((b"authorization", f"Bearer {key}".encode()))
        content = b"" if body is None else json.dumps(body).encode()
        reply = await self.coordinator.control(Call(method, url, headers, content, (client, 1)))
        return reply.status, json.loads(reply.body)

    async def put_mask(self, name, *experts):
        entries = [{"layer": 0, "expert": e, "action": "deactivate"} for e in experts]
        return await self.put(f"/v1/masks/{name}", {"name": name, "entries": entries})


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("MOESCOPE_ADMIN_KEY", KEY)

    def run(story):
        async def in_loop():
            fixture = Fixture(tmp_path / "masks")
            try:
                return await story(fixture)
            finally:
                for task in asyncio.all_tasks() - {asyncio.current_task()}:
                    task.cancel()
                fixture.coordinator._registry.close()

        return asyncio.run(in_loop())

    return run


def test_answers_say_whom_a_change_reached(run):
    async def story(fleet):
        assert (await fleet.get("/v1/masks"))[0] == 503
        one = await fleet.start("one")
        status, body = await fleet.put_mask("calm", 1)
        assert (status, body["key"], body["created"]) == (207, "calm@1", True)
        assert body["replicas"] == {"expected": 2, "reached": ["one"], "not_reached": []}
        await fleet.start("two")
        status, body = await fleet.put("/v1/steering", {"mask": "calm"})
        assert (status, body["mask"]) == (200, "calm@1")
        assert body["replicas"]["reached"] == ["one", "two"]
        assert one.have.state.steering == "calm@1"
        await fleet.coordinator.leave("two", "its server has ended")
        status, body = await fleet.delete("/v1/steering")
        assert (status, body["mask"]) == (207, None)
        assert body["replicas"]["not_reached"] == [
            {"replica": "two", "why": "its server has ended"}
        ]
        status, body = await fleet.get("/v1/replicas")
        assert [(r["replica"], r["serves"]) for r in body["data"]] == [
            ("one", True),
            ("two", False),
        ]

    run(story)


def test_a_change_that_is_refused_goes_nowhere(run):
    async def story(fleet):
        replicas = [await fleet.start("one"), await fleet.start("two")]
        assert (await fleet.put_mask("many", *range(7)))[0] == 422
        assert (await fleet.put("/v1/steering", {"mask": "calm"}))[0] == 404
        assert (await fleet.put("/v1/masks/x", {"name": "x", "entries": 1}))[0] == 422
        assert (await fleet.post("/v1/traces/run/start"))[0] == 409  # there is no store
        assert [replica.orders for replica in replicas] == [[], []]

    run(story)


def test_own_masks_that_requests_hold_bar_a_global_one(run):
    async def story(fleet):
        holds = MOE | {"slots": MOE["slots"] | {"in_use": {"half@1": 1}, "loaded": ["half@1"]}}
        await fleet.start("one")
        two = await fleet.start("two", holds)
        for name, experts in {"half": range(4), "other": range(4, 8), "few": (7,)}.items():
            await fleet.put_mask(name, *experts)
        await fleet.delete("/v1/masks/half")  # who has it runs on under it
        status, body = await fleet.put("/v1/steering", {"mask": "other"})
        assert status == 409
        for words in ("other@1", "half@1", "layer 0"):
            assert words in body["error"]["message"]
        assert (await fleet.get("/v1/steering"))[1] == {"mask": None}
        assert two.have.state.steering is None
        assert (await fleet.put("/v1/steering", {"mask": "few"}))[0] == 200
        assert two.have.state.steering == "few@1"
        moe = (await fleet.get("/v1/moe"))[1]
        assert (moe["global_mask"], moe["slots"]["in_use"]) == ("few@1", {"half@1": 1})
        assert moe["slots"]["loaded"] == ["half@1"]

    run(story)


def test_keys(run):
    async def story(fleet):
        await fleet.start("one")
        for url in ("/v1/masks", "/v1/steering", "/v1/moe", "/v1/traces", "/v1/replicas"):
            assert (await fleet.get(url, key="wrong"))[0] == 401
            assert (await fleet.get(url, key=None, client="127.0.0.1"))[0] == 401
        assert (await fleet.get("/v1/masks"))[0] == 200

    run(story)


def test_a_replica_of_another_model_is_refused(run):
    async def story(fleet):
        await fleet.start("one")
        with pytest.raises(Exception, match="another model"):
            await fleet.start("two", MOE | {"top_k": 3})
        assert (await fleet.put_mask("calm", 1))[1]["replicas"]["reached"] == ["one"]

    run(story)


def test_a_started_run_outlives_the_coordinator(run):
    async def story(fleet):
        await fleet.start("one", run="monday")
        two = await fleet.start("two")
        assert two.have.run == "monday"
        assert fleet.coordinator._app.state.moescope.started == "monday"

    run(story)


def test_a_coordinator_has_the_folder_to_itself_and_what_was_in_force(run, tmp_path):
    async def story(fleet):
        await fleet.start("one")
        await fleet.put_mask("calm", 1)
        await fleet.put("/v1/steering", {"mask": "calm"})

    run(story)

    async def again(fleet):
        assert (await fleet.coordinator.join("two")).state.steering == "calm@1"
        with pytest.raises(Exception, match="another server uses the masks"):
            Registry(tmp_path / "masks")

    run(again)
