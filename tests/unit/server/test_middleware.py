"""The middleware around a real Starlette application, which tells what reached it."""

import asyncio
import json

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from moescope.server.middleware import SteeringMiddleware
from moescope.tracer.errors import TracerError

URL = "/v1/completions"


@pytest.fixture
def plane(make_plane, mask, tmp_path):
    plane = make_plane(store=tmp_path / "store")
    for name in ("calm", "storm", "third"):
        plane.registry.put(mask(name, 1), "w")
    plane.registry.put(mask("calm", 2), "w")
    return plane


@pytest.fixture
def app(plane):
    async def complete(request):
        body = await request.body()
        request.app.state.seen.append(body)
        in_use = dict(plane.leases.in_use)
        try:
            data = json.loads(body)
        except ValueError:
            return JSONResponse({"error": "vLLM's own"}, 400)
        if data.get("fail"):
            raise RuntimeError("boom")

        async def chunks():
            for number in range(3):
                yield json.dumps({"number": number, "in_use": plane.leases.in_use}) + "\n"

        if data.get("stream"):
            return StreamingResponse(chunks())
        length = int(request.headers["content-length"])
        return JSONResponse({"data": data, "in_use": in_use, "whole": length == len(body)})

    paths = (URL, "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/masks", "/pooling")
    app = Starlette(routes=[Route(path, complete, methods=["POST", "GET"]) for path in paths])
    app.add_middleware(SteeringMiddleware)
    app.state.moescope, app.state.seen = plane, []
    return app


@pytest.fixture
def client(app):
    return TestClient(app, raise_server_exceptions=False)


def ask(client, mask=None, body=None, url=URL, **headers):
    named = {} if mask is None else {"X-Steering-Mask": mask}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    return client.post(url, json={"prompt": "é"} | (body or {}), headers=named)


def refused(response):
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == response.status_code
    return error["message"]


@pytest.mark.parametrize("url", [URL, "/v1/chat/completions", "/v1/responses"])
def test_the_mask_is_loaded_pinned_passed_on_and_echoed(client, plane, engine, url):
    answer = ask(client, "calm", url=url)
    assert answer.status_code == 200
    data = answer.json()
    assert data["data"] == {"prompt": "é", "vllm_xargs": {"moescope_mask": "calm@2"}}
    assert data["in_use"] == {"calm@2": 1}
    assert data["whole"]
    assert answer.headers["x-steering-mask"] == "calm@2"
    assert answer.headers["x-trace"] == "off"
    assert "x-trace-run" not in answer.headers
    assert plane.leases.in_use == {}
    assert engine.slots == {1: "calm@2"}


def test_a_version_can_be_pinned_and_named_in_the_body_as_well(client):
    assert ask(client, "calm@1").headers["x-steering-mask"] == "calm@1"
    for text in ("calm@1", "storm"):
        answer = ask(client, body={"vllm_xargs": {"moescope_mask": text, "other": 1}})
        key = answer.headers["x-steering-mask"]
        assert key == (text if "@" in text else f"{text}@1")
        assert answer.json()["data"]["vllm_xargs"] == {"moescope_mask": key, "other": 1}
    twice = {"vllm_xargs": {"moescope_mask": "calm@2"}}
    assert ask(client, "calm", twice).headers["x-steering-mask"] == "calm@2"
    assert "'calm@1'" in refused(ask(client, "calm@1", twice))
    assert ask(client, "none", twice).status_code == 422


def test_untouched_requests_pass_byte_by_byte(client, app):
    body = b'{ "prompt":  "x", "prompt": "\\u00e9" }'
    answer = client.post(URL, content=body)
    assert app.state.seen == [body]
    assert answer.headers["x-steering-mask"] == "none"


def test_the_global_mask_is_echoed_unless_the_request_wants_none(client, plane):
    asyncio.run(plane.steer("storm", "w"))
    assert ask(client).headers["x-steering-mask"] == "storm@1"
    answer = ask(client, "none")
    assert answer.headers["x-steering-mask"] == "none"
    assert answer.json()["data"]["vllm_xargs"] == {"moescope_mask": "none"}
    assert answer.json()["in_use"] == {}
    assert ask(client, "calm").headers["x-steering-mask"] == "calm@2"


def test_where_masks_compose_the_answer_names_both(client, app, plane, engine, mask):
    plane.composes = engine.composes = True
    assert ask(client, "calm").headers["x-steering-mask"] == "calm@2"
    asyncio.run(plane.steer("storm", "w"))
    assert engine.slots == {}
    answer = ask(client, "calm")
    assert answer.headers["x-steering-mask"] == "storm@1+calm@2"
    assert answer.json()["data"]["vllm_xargs"] == {"moescope_mask": "calm@2"}
    assert ask(client).headers["x-steering-mask"] == "storm@1"
    assert ask(client, "none").headers["x-steering-mask"] == "none"
    plane.registry.put(mask("paper", 1, mode="steermoe"), "w")
    app.state.seen.clear()
    answer = ask(client, "paper")
    assert answer.status_code == 422
    assert "force together" in refused(answer)
    assert app.state.seen == []
    assert plane.leases.in_use == {}


def test_refusals_never_reach_vllm(client, app, plane, mask, engine):
    signature = {"moe_layers": [1], "num_experts": 4, "top_k": 1}
    plane.registry.put(mask("other", 1, signature=signature), "w")
    plane.registry.put(mask("toomany", *range(7)), "w")
    assert "storms" in refused(ask(client, "storms"))
    assert ask(client, "storms").status_code == 404
    assert ask(client, "calm@9").status_code == 404
    assert ask(client, "other").status_code == 409
    assert "layer 1" in refused(ask(client, "toomany"))
    for bad in ("", "calm@", "calm@x", "../calm", "calm storm"):
        assert ask(client, bad).status_code == 422, bad
    half = rb'{"vllm_xargs": {"moescope_mask": "\ud800"}}'
    assert client.post(URL, content=half).status_code == 422
    assert ask(client, "calm", X_Trace="maybe").status_code == 422
    assert ask(client, "calm", {"background": True}).status_code == 422
    engine.error = TracerError("the worker is gone")
    assert ask(client, "calm").status_code == 503
    assert app.state.seen == []
    assert plane.leases.in_use == {}


@pytest.mark.parametrize("body", [b"{", b"[1]", b"", b'{"vllm_xargs": 3}'])
def test_a_bad_body_is_vllms_to_refuse_unless_it_should_be_steered(client, app, body):
    assert client.post(URL, content=body, headers={"X-Steering-Mask": "calm"}).status_code == 422
    assert app.state.seen == []
    answer = client.post(URL, content=body)
    assert app.state.seen == [body]
    assert "x-steering-mask" not in answer.headers


def test_wishes_are_refused_where_they_would_do_nothing(client, app):
    assert URL in refused(ask(client, "calm", url="/v1/messages"))
    for header in ("X_Trace", "X_Trace_Run"):
        name = header.replace("_", "-").lower()
        assert name in refused(ask(client, url="/v1/messages", **{header: "on"}))
    wish = {"vllm_xargs": {"moescope_trace": "on"}}
    assert "/pooling serves no moescope_trace" in refused(ask(client, body=wish, url="/pooling"))
    assert ask(client, "calm", url=URL + "/").status_code == 422
    assert app.state.seen == []
    assert client.get(URL, headers={"X-Steering-Mask": "calm"}).status_code != 422
    assert ask(client, "calm", url="/v1/masks").status_code == 200
    assert ask(client, url="/v1/messages").status_code == 200
    # vLLM passes them on by itself here.
    assert ask(client, body=wish, url="/v1/messages").json()["data"]["vllm_xargs"]


@pytest.mark.parametrize(
    "body", [b"", b"moescope_", b'["moescope_"]', b'{"x": "moescope_", "vllm_xargs": {"y": 1}}']
)
def test_bodies_without_wishes_pass_elsewhere_byte_by_byte(client, app, body):
    client.post("/pooling", content=body, headers={"Content-Type": "application/json"})
    client.post("/pooling", content=body)
    assert app.state.seen == [body, body]


def test_traces(client, plane):
    answer = ask(client, "calm", X_Trace="on", X_Trace_Run="r1")
    assert answer.headers["x-trace"] == "on"
    assert answer.headers["x-trace-run"] == "r1"
    xargs = answer.json()["data"]["vllm_xargs"]
    assert xargs == {"moescope_mask": "calm@2", "moescope_trace": "on", "moescope_run": "r1"}
    asyncio.run(plane.start("monday"))
    assert ask(client).headers["x-trace-run"] == "monday"
    assert ask(client, X_Trace="off").headers["x-trace"] == "off"


def test_the_slot_is_held_to_the_end_of_the_stream(client, plane):
    answer = ask(client, "calm", {"stream": True})
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["in_use"] for line in lines] == [{"calm@2": 1}] * 3
    assert answer.headers["x-steering-mask"] == "calm@2"
    assert plane.leases.in_use == {}


def test_the_slot_is_given_back_when_vllm_fails(client, plane):
    assert ask(client, "calm", {"fail": True}).status_code == 500
    assert plane.leases.in_use == {}


async def served(app, path, headers, body, messages, sent):
    """Call the application as a server does, with messages that a client sends after the body."""
    queue = [{"type": "http.request", "body": body, "more_body": False}, *messages]

    async def receive():
        if queue:
            return queue.pop(0)
        await asyncio.sleep(10)
        raise AssertionError

    async def send(message):
        sent.append(message)
        await asyncio.sleep(0)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "headers": headers,
    }
    await app(scope, receive, send)


def test_the_slot_is_given_back_when_the_client_goes(app, plane):
    async def forever():
        while True:
            yield b"x"
            await asyncio.sleep(0.001)

    async def stream(request):
        await request.body()
        return StreamingResponse(forever())

    app.router.routes.insert(0, Route(URL, stream, methods=["POST"]))
    sent = []
    gone = [{"type": "http.disconnect"}]
    headers = [(b"x-steering-mask", b"calm")]
    asyncio.run(asyncio.wait_for(served(app, URL, headers, b"{}", gone, sent), 5))
    assert sent[0]["status"] == 200
    assert plane.leases.in_use == {}


def test_a_client_that_goes_while_it_sends_is_nobodys_request(app):
    sent = []

    async def run():
        async def receive():
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": URL, "headers": [], "app": app}
        await SteeringMiddleware(app)(scope, receive, send)

    asyncio.run(run())
    assert sent == []
    assert app.state.seen == []


def test_no_free_slot_is_429_with_retry_after(app, client, plane):
    async def run():
        masks = [plane.steered((name,)) for name in ("calm", "storm")]
        for held in masks:
            await held.__aenter__()
        sent = []
        await served(app, URL, [(b"x-steering-mask", b"third")], b"{}", [], sent)
        for held in masks:
            await held.__aexit__(None, None, None)
        return sent[0]

    start = asyncio.run(run())
    assert start["status"] == 429
    assert dict(start["headers"])[b"retry-after"] == b"1"
    assert ask(client, "third").status_code == 200


def test_a_websocket_that_wants_a_mask_is_closed(app):
    sent = []

    async def run():
        async def send(message):
            sent.append(message)

        scope = {
            "type": "websocket",
            "path": "/v1/realtime",
            "headers": [(b"x-steering-mask", b"a")],
        }
        await SteeringMiddleware(app)(scope, None, send)

    asyncio.run(run())
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_many_masks_through_few_slots_leave_none_behind(client, plane, mask, engine):
    for number in range(20):
        plane.registry.put(mask(f"m{number}", number % 6), "w")
    for number in range(100):
        name = f"m{number * 7 % 20}"
        assert ask(client, name).json()["data"]["vllm_xargs"]["moescope_mask"] == f"{name}@1"
    assert plane.leases.in_use == {}
    assert engine.published == {}
