import io
import json
import logging
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from moescope.server import logs
from moescope.server.errors import UnknownError, refusal
from moescope.server.logs import log_change, note, request_line, show_logs
from moescope.server.middleware import SteeringMiddleware
from moescope.server.settings import ServerSettings, load_server_settings
from moescope.tracer.errors import InputError

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture
def output(monkeypatch):
    """`output(form)`: what is logged from then on, as a list of lines."""
    logger = logging.getLogger("moescope")
    before = logger.level, logger.propagate
    stream = io.StringIO()
    monkeypatch.setattr(logger, "handlers", [])

    def show(form):
        monkeypatch.setattr("sys.stderr", stream)
        show_logs(form)
        return stream

    yield show
    logger.level, logger.propagate = before


def test_text_is_one_line_whatever_a_client_sends(output):
    stream = output("text")
    with request_line('a"b\nINFO moescope: fake', "POST", "/v1/über\r\nx"):
        note(status=404, reason="unknown", detail="no mask\n\x1b[31m" + "x" * 1000)
    [text] = stream.getvalue().splitlines()
    assert " WARNING moescope: request " in text
    assert 'request_id="a\\"b\\nINFO moescope: fake"' in text
    assert "\x1b" not in text
    assert "method=POST" in text
    assert "reason=unknown" in text
    assert len(text) < 800


def test_json_is_one_object_a_line(output):
    stream = output("json")
    with request_line("r1", "PUT", "/v1/steering"):
        log_change("global mask set", mask=None, before="calm@1", who="loopback")
        note(status=200, who="loopback")
    log_change("run started", run="monday")
    logging.getLogger("moescope").info("ready with %s", "masks")
    change, request, outside, plain = map(json.loads, stream.getvalue().splitlines())
    assert change["what"] == "global mask set"
    assert (change["request_id"], change["mask"], change["before"]) == ("r1", None, "calm@1")
    assert request | {"time": 0, "duration_s": 0} == {
        "time": 0, "level": "INFO", "message": "request", "request_id": "r1", "method": "PUT",
        "path": "/v1/steering", "status": 200, "duration_s": 0, "who": "loopback",
    }  # fmt: skip
    assert request["time"].endswith("+00:00")
    assert "request_id" not in outside
    assert plain["message"] == "ready with masks"


def test_a_failure_of_the_server_is_status_500(output):
    stream = output("json")
    with pytest.raises(RuntimeError), request_line("r1", "POST", "/v1/completions"):
        raise RuntimeError("boom")
    assert json.loads(stream.getvalue())["status"] == 500


def test_a_refusal_says_why_and_outside_of_a_request_nothing_is_noted():
    with request_line("r1", "POST", "/v1/completions") as line:
        refusal(UnknownError("there is no mask calm"))
    assert (line.reason, line.detail) == ("unknown", "there is no mask calm")
    assert refusal(UnknownError("no line")).status_code == 404
    assert (line.reason, line.detail) == ("unknown", "there is no mask calm")


def test_logging_that_was_set_up_by_others_is_left_alone(monkeypatch):
    theirs = logging.NullHandler()
    monkeypatch.setattr(logs.logger, "handlers", [theirs])
    show_logs("json")
    assert logs.logger.handlers == [theirs]


@pytest.fixture
def client(make_plane):
    async def serve(request):
        body = await request.body()
        if b"fail" in body:
            raise RuntimeError("boom")
        seen = {"id": request.headers.get("x-request-id"), "body": body.decode()}
        return JSONResponse(seen)

    paths = ("/v1/completions", "/v1/responses", "/v1/masks", "/health", "/pooling")
    app = Starlette(routes=[Route(path, serve, methods=["POST", "GET"]) for path in paths])
    app.add_middleware(SteeringMiddleware)
    app.state.moescope = make_plane(store=Path("store"))
    return TestClient(app)


def test_vllm_gets_the_id_that_the_answer_and_the_line_have(client, output):
    stream = output("json")
    given = client.post("/v1/completions", json={}, headers={"X-Request-Id": "mine"})
    assert given.json()["id"] == given.headers["x-request-id"] == "mine"
    made = client.post("/v1/completions", json={})
    assert made.json()["id"] == made.headers["x-request-id"]
    assert len(made.headers["x-request-id"]) == 32
    named = client.post("/v1/completions", json={"request_id": "theirs"})
    assert (named.json()["id"], named.headers["x-request-id"]) == (None, "theirs")
    both = {"json": {"request_id": "theirs"}, "headers": {"X-Request-Id": "mine"}}
    assert client.post("/v1/completions", **both).headers["x-request-id"] == "mine"
    odd = client.post("/v1/completions", json={"request_id": "a\r\nX-Evil: 1"})
    assert odd.status_code == 200
    assert "x-evil" not in odd.headers
    ids = [json.loads(line)["request_id"] for line in stream.getvalue().splitlines()]
    assert ids == ["mine", made.headers["x-request-id"], "theirs", "mine", "a\r\nX-Evil: 1"]


def test_a_traced_response_has_the_id_in_its_body_where_vllm_looks(client):
    traced = {"X-Trace-Run": "r", "X-Request-Id": "mine"}
    body = client.post("/v1/responses", json={}, headers=traced).json()["body"]
    assert json.loads(body)["request_id"] == "resp_mine"
    body = client.post("/v1/responses", json={"request_id": "theirs"}, headers=traced).json()
    assert json.loads(body["body"])["request_id"] == "theirs"
    untraced = client.post("/v1/responses", content=b'{ "a":1}', headers={"X-Request-Id": "mine"})
    assert untraced.json()["body"] == '{ "a":1}'


def test_a_failure_behind_the_middleware_is_status_500(client, output):
    stream = output("json")
    with pytest.raises(RuntimeError):
        client.post("/v1/completions", json={"fail": True})
    [line] = map(json.loads, stream.getvalue().splitlines())
    assert (line["status"], line["path"]) == (500, "/v1/completions")


def test_which_requests_have_a_line(client, output):
    stream = output("json")
    for path in ("/health", "/v1/masks"):
        assert client.get(path).headers["x-request-id"]
    client.post("/pooling", json={})
    client.post("/pooling", json={}, headers={"X-Trace": "on"})
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["path"], line["status"], line.get("reason")) for line in found] == [
        ("/v1/masks", 200, None), ("/pooling", 200, None), ("/pooling", 422, "invalid"),
    ]  # fmt: skip


def test_the_servers_settings_are_documented():
    text = (DOCS / "settings.md").read_text()
    for name, field in ServerSettings.model_fields.items():
        default = "none" if field.default is None else field.default
        assert f"| `{name}` | {default} | {field.description} |" in text


def test_a_format_that_there_is_not(monkeypatch):
    monkeypatch.setenv("MOESCOPE_LOG_FORMAT", "xml")
    with pytest.raises(InputError, match="log_format"):
        load_server_settings()
