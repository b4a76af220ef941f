"""The routes of the control plane in a small FastAPI application."""

import asyncio

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from moescope.server.errors import ConflictError
from moescope.server.routes import router
from moescope.tracer.errors import StoreError, TracerError
from moescope.tracer.store import StoreWriter

JSON = {"Content-Type": "application/json"}
MASK = {"name": "calm", "entries": [{"layer": 1, "expert": 3, "action": "deactivate"}]}


def client_of(plane, **options):
    app = FastAPI()
    app.include_router(router)
    app.state.moescope = plane
    return TestClient(app, client=("127.0.0.1", 5), base_url="http://localhost", **options)


@pytest.fixture
def plane(make_plane):
    return make_plane()


@pytest.fixture
def client(plane):
    return client_of(plane)


def code(response):
    assert response.json()["error"]["code"] == response.status_code
    return response.status_code


def test_the_life_of_a_mask(client):
    answer = client.put("/v1/masks/calm", json=MASK)
    assert answer.json() == {"name": "calm", "version": 1, "key": "calm@1", "created": True}
    assert client.put("/v1/masks/calm", json=MASK).json()["created"] is False
    other = MASK | {"note": "softer", "entries": []}
    assert client.put("/v1/masks/calm", json=other).json()["version"] == 2
    shown = client.get("/v1/masks/calm").json()
    assert (shown["version"], shown["versions"], shown["mask"]["note"]) == (2, [1, 2], "softer")
    first = client.get("/v1/masks/calm", params={"version": 1}).json()
    assert first["mask"]["entries"][0]["expert"] == 3
    listed = {"name": "calm", "version": 2, "key": "calm@2", "note": "softer", "entries": 0}
    assert client.get("/v1/masks").json() == {"data": [listed]}
    assert client.delete("/v1/masks/calm").json() == {"name": "calm", "deleted": "calm@2"}
    assert client.get("/v1/masks").json() == {"data": []}
    assert code(client.get("/v1/masks/calm")) == 404
    assert code(client.delete("/v1/masks/calm")) == 404


def test_what_is_wrong_with_a_mask_is_named(client):
    def put(name="calm", **fields):
        return client.put(f"/v1/masks/{name}", json=MASK | fields)

    signature = {"moe_layers": [1], "num_experts": 4, "top_k": 1}
    assert code(put(signature=signature)) == 409
    far = put(entries=[{"layer": 1, "expert": 8, "action": "deactivate"}])
    assert code(far) == 422
    assert "expert 8 of layer 1" in far.json()["error"]["message"]
    odd = put(entries=[{"layer": 1, "expert": 1, "action": "explode"}])
    assert code(odd) == 422
    assert "entries.0.action" in odd.json()["error"]["message"]
    assert code(put(name="storm")) == 422
    assert code(put(name="none")) == 422
    assert code(put(unknown=1)) == 422
    assert code(client.put("/v1/masks/calm", content=b"{")) == 422
    broken = client.put("/v1/masks/calm", content=b"{", headers=JSON)
    assert "no JSON" in broken.json()["error"]["message"]
    plain = client.put("/v1/masks/calm", content="x", headers={"Content-Type": "text/plain"})
    assert "Content-Type" in plain.json()["error"]["message"]
    for halves in (b'{"name": "\\ud800", "entries": []}', b'{"name": "calm", "\\ud800": []}'):
        assert code(client.put("/v1/masks/calm", content=halves, headers=JSON)) == 422
    assert code(client.get("/v1/masks/calm", params={"version": 0})) == 422
    assert client.get("/v1/masks").json() == {"data": []}


def test_the_global_mask(client, engine):
    assert client.get("/v1/steering").json() == {"mask": None}
    assert code(client.put("/v1/steering", json={"mask": "calm"})) == 404
    client.put("/v1/masks/calm", json=MASK)
    assert client.put("/v1/steering", json={"mask": "calm"}).json() == {"mask": "calm@1"}
    assert engine.steering == "calm@1"
    assert client.get("/v1/steering").json() == {"mask": "calm@1"}
    assert code(client.delete("/v1/masks/calm")) == 409
    assert code(client.put("/v1/steering", json={"mask": "a/b"})) == 422
    none = client.put("/v1/steering", json={"mask": "none"})
    assert (code(none), "DELETE" in none.text) == (422, True)
    assert code(client.put("/v1/steering", json={})) == 422
    assert client.delete("/v1/steering").json() == {"mask": None}
    assert engine.steering is None


def test_a_global_mask_that_the_engine_refuses_is_not_kept(client, plane, engine):
    client.put("/v1/masks/calm", json=MASK)
    engine.error = TracerError("the worker is gone")
    assert code(client.put("/v1/steering", json={"mask": "calm"})) == 503
    assert plane.registry.state.steering is None


def test_a_global_mask_that_can_not_be_kept_is_taken_back(client, plane, engine, monkeypatch):
    client.put("/v1/masks/calm", json=MASK)

    def full(*_):
        raise StoreError("disk full")

    monkeypatch.setattr(plane.registry, "set_steering", full)
    assert code(client.put("/v1/steering", json={"mask": "calm"})) == 503
    assert engine.steering is None


def test_a_global_mask_that_one_replica_refuses_is_taken_back_from_the_others(
    client, engine, monkeypatch
):
    for name in ("calm", "storm"):
        client.put(f"/v1/masks/{name}", json=MASK | {"name": name})
    client.put("/v1/steering", json={"mask": "calm"})
    change = engine.set_global

    async def refuse_once(*args):
        monkeypatch.setattr(engine, "set_global", change)
        await change(*args)
        raise TracerError("the second replica has no room")

    monkeypatch.setattr(engine, "set_global", refuse_once)
    assert code(client.put("/v1/steering", json={"mask": "storm"})) == 503
    assert engine.steering == "calm@1"
    assert client.get("/v1/steering").json()["mask"] == "calm@1"


def test_a_global_mask_that_cannot_join_a_requests_own_is_refused(make_plane, engine, mask):
    plane = make_plane(composes=True)
    client = client_of(plane)
    for one in (mask("calm", 3), mask("paper", 4, mode="steermoe")):
        assert client.put(f"/v1/masks/{one.name}", content=one.to_json(), headers=JSON).is_success

    async def run():
        async with plane.steered(("calm",)):
            with pytest.raises(ConflictError, match=r"^paper@1 can't become .* while a request"):
                await plane.steer("paper", "w")
            assert plane.registry.state.steering is engine.steering is None

    asyncio.run(run())
    # Nobody holds it any more: it leaves its slot.
    assert engine.slots == {1: "calm@1"}
    assert client.put("/v1/steering", json={"mask": "paper"}).json() == {"mask": "paper@1"}
    assert engine.slots == {}
    assert client.get("/v1/moe").json()["own_mask"] == "compose"


def test_the_model(client):
    moe = client.get("/v1/moe").json()
    assert (moe["moe_layers"], moe["num_experts"], moe["top_k"]) == ([1, 2, 3], 8, 2)
    assert moe["router"]["scoring"] == "softmax"
    assert moe["own_mask"] == "replace"
    assert moe["slots"] == {"total": 2, "in_use": {}, "loaded": []}


def test_runs(make_plane, tmp_path, engine):
    plane = make_plane(store=tmp_path / "store")
    StoreWriter(tmp_path / "store", plane.facts).close()
    client = client_of(plane)
    assert client.post("/v1/traces/monday/start").json()["started"] is True
    assert client.post("/v1/traces/monday/start").status_code == 200
    assert code(client.post("/v1/traces/tuesday/start")) == 409
    assert code(client.post("/v1/traces/tuesday/stop")) == 404
    assert client.get("/v1/traces").json() == {
        "started": "monday",
        "live": 0,
        "rows": 0,
        "bytes": 0,
        "dropped_rows": 0,
        "runs": [],
    }
    engine.live = [1, 2]  # that end with the next steps
    stopped = client.post("/v1/traces/monday/stop").json()
    assert stopped == {"run": "monday", "started": False, "live": 0}
    assert code(client.post("/v1/traces/monday/stop")) == 404
    for bad in ("..", ".hidden", "a%20b", "%2e%2e%2fup", "r" * 201):
        assert client.post(f"/v1/traces/{bad}/start").status_code in (404, 422)
    assert plane.started is None


def test_a_server_without_a_store(client, plane):
    assert code(client.get("/v1/traces")) == 409
    assert code(client.post("/v1/traces/monday/start")) == 409
    with pytest.raises(ConflictError):
        plane.demand_store()


def test_every_route_asks_for_the_key_first(make_plane):
    plane = make_plane(admin_key="s3cret")
    client = client_of(plane)
    for path, operations in client.app.openapi()["paths"].items():
        url = path.replace("{name}", "calm").replace("{run}", "r")
        for method in operations:
            answer = client.request(method, url, content=b"{")
            assert code(answer) == 401
            assert answer.headers["www-authenticate"] == "Bearer"
    client.headers["Authorization"] = "Bearer s3cret"
    assert client.put("/v1/masks/calm", json=MASK).status_code == 200
    [line] = plane.registry._audit.lines()
    assert line["who"].startswith("key:")
    assert "s3cret" not in str(line)


def test_without_a_key_only_this_machine(plane):
    app = client_of(plane).app
    far = TestClient(app, client=("10.0.0.1", 5), base_url="http://localhost")
    assert code(far.get("/v1/masks")) == 401


def test_the_openapi_page_is_typed_and_has_examples(client):
    page = client.app.openapi()
    put = page["paths"]["/v1/masks/{name}"]["put"]
    assert put["requestBody"]["content"]["application/json"]["examples"]
    assert {"200", "401", "409", "422"} <= put["responses"].keys()
    for operations in page["paths"].values():
        for operation in operations.values():
            assert operation["description"]
            assert operation["responses"]["200"]["content"]["application/json"]["schema"]
            assert operation["security"]


def test_a_restart_brings_the_global_mask_back(make_plane, engine, mask):
    plane = make_plane()
    plane.registry.put(mask("calm", 1), "w")
    asyncio.run(plane.steer("calm", "w"))
    engine.steering = None
    plane = make_plane()
    asyncio.run(plane.restore())
    assert engine.steering == "calm@1"
