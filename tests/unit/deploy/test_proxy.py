"""Requests on their way through a replica, to a server that says what it got."""

import asyncio
import json
import time

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse

from moescope.deploy.admission import Admission
from moescope.deploy.proxy import Proxy, Reply
from moescope.deploy.target import Target
from moescope.server.audit import State

STATE = State({"calm": 2, "storm": 1})


async def echo(scope, receive, send):
    request = Request(scope, receive)
    body = (await request.body()).decode()
    said = {"path": scope["raw_path"].decode(), "query": scope["query_string"].decode()}
    said |= {"method": request.method, "headers": dict(request.headers), "body": body}
    headers = {"X-Steering-Mask": "calm@2", "Connection": "close", "Server": "inner"}
    await JSONResponse(said, 202, headers=headers)(scope, receive, send)


async def coordinate(call):
    said = {"url": call.url, "method": call.method, "body": call.body.decode()}
    return Reply(207, [(b"x-from", b"coordinator")], json.dumps(said).encode())


def ask(method, url, *, out=False, **request):
    async def run():
        admission = Admission(0.1)
        await admission.renew(time.monotonic() + 60)
        if not out:
            await admission.open(Target(STATE))
        server = httpx.AsyncClient(transport=httpx.ASGITransport(echo), base_url="http://replica")
        proxy = Proxy(server, admission, coordinate)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(proxy), base_url="http://all"
        ) as client:
            return await client.request(method, url, **request)

    return asyncio.run(run())


def complete(mask=None, xargs=None, **request):
    body = {"prompt": "x"} if xargs is None else {"prompt": "x", "vllm_xargs": xargs}
    headers = {} if mask is None else {"X-Steering-Mask": mask}
    return ask("POST", "/v1/completions", json=body, headers=headers, **request)


def test_the_server_gets_the_version_that_counts():
    got = complete("calm", {"moescope_mask": "calm", "moescope_run": "r"}).json()
    assert got["headers"]["x-steering-mask"] == "calm@2"
    xargs = json.loads(got["body"])["vllm_xargs"]
    assert xargs == {"moescope_mask": "calm@2", "moescope_run": "r"}
    assert int(got["headers"]["content-length"]) == len(got["body"])
    assert complete("calm@1").json()["headers"]["x-steering-mask"] == "calm@1"
    assert complete("none").json()["headers"]["x-steering-mask"] == "none"
    assert "x-steering-mask" not in complete().json()["headers"]


def test_a_name_that_is_written_otherwise_is_the_same_name():
    body = r'{"vllm_xargs": {"moescope\u005fmask": "st\u006frm"}}'
    headers = {"Content-Type": "application/json"}
    got = ask("POST", "/v1/chat/completions", content=body, headers=headers).json()
    assert json.loads(got["body"])["vllm_xargs"] == {"moescope_mask": "storm@1"}


@pytest.mark.parametrize(
    "body", ["", "{", "[]", '{"vllm_xargs": 1}', '{"vllm_xargs": {"moescope_mask": 3}}']
)
def test_what_is_malformed_is_left_to_the_server(body):
    assert ask("POST", "/v1/completions", content=body).json()["body"] == body


def test_what_can_not_be_is_refused_as_by_a_single_server():
    for answer, code, words in (
        (complete("nobody"), 404, "there is no mask nobody"),
        (complete("calm@3"), 404, "mask calm has no version 3, only 1, 2"),
        (complete(xargs={"moescope_mask": "nobody"}), 404, "no mask nobody"),
        (complete("calm@x"), 422, "'calm@x' names no mask"),
    ):
        assert answer.status_code == code
        assert words in answer.json()["error"]["message"]


def test_a_replica_that_is_out_lets_no_inference_through():
    for path in ("/v1/completions", "/v1/messages", "/v1/embeddings", "/tokenize"):
        answer = ask("POST", path, json={}, out=True)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert ask("GET", "/v1/models", out=True).status_code == 202
    assert ask("GET", "/v1/replicas", out=True).status_code == 207


def test_all_else_passes_as_it_is():
    answer = ask("DELETE", "/v1/a%2Fb%20c?x=%20y&x=2", headers={"X-Other": "1", "TE": "trailers"})
    got = answer.json()
    assert (got["method"], got["path"], got["query"]) == ("DELETE", "/v1/a%2Fb%20c", "x=%20y&x=2")
    assert got["headers"]["x-other"] == "1"
    assert got["headers"]["host"] == "all"
    assert "te" not in got["headers"]
    assert (answer.status_code, answer.headers["x-steering-mask"]) == (202, "calm@2")
    assert "connection" not in answer.headers  # nor what Serve says itself
    assert "server" not in answer.headers


def test_the_control_plane_is_the_coordinators():
    for path in ("/v1/masks/calm?version=1", "/v1/steering", "/v1/traces/r/start", "/metrics"):
        answer = ask("PUT", path, content=b"{}")
        assert (answer.status_code, answer.headers["x-from"]) == (207, "coordinator")
        assert answer.json() == {"url": path, "method": "PUT", "body": "{}"}


def test_a_server_that_is_gone_is_a_clear_error():
    async def run():
        admission = Admission(0.1)
        await admission.renew(time.monotonic() + 60)
        await admission.open(Target(STATE))
        gone = httpx.AsyncHTTPTransport(uds="/nowhere/http")
        server = httpx.AsyncClient(transport=gone, base_url="http://replica")
        transport = httpx.ASGITransport(Proxy(server, admission, coordinate))
        async with httpx.AsyncClient(transport=transport, base_url="http://all") as client:
            return await client.post("/v1/completions", json={})

    answer = asyncio.run(run())
    assert answer.status_code == 503
    assert "gave no answer" in answer.json()["error"]["message"]
