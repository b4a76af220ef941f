import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from typer.testing import CliRunner

from moescope.clients.cli import app
from moescope.clients.generate import generate
from moescope.tracer.errors import InputError


@pytest.fixture
def served():
    """A server that answers as told, and remembers what it was asked: `served.url`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            size = int(self.headers["content-length"])
            server.asked.append((self.path, dict(self.headers), json.loads(self.rfile.read(size))))
            self.answer(*server.answer)

        def do_GET(self):
            self.answer(200, {}, {"data": [{"id": "the-model"}]})

        def answer(self, status, headers, body):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}"
    text = {"choices": [{"text": "There.", "message": {"content": "Here."}}]}
    server.answer = (200, {"X-Steering-Mask": "calm@2", "X-Trace": "off"}, text)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_chat_and_a_completion(served):
    answer = generate("Where?", served.url, mask="calm", api_key="k")
    assert (answer.text, answer.mask, answer.run) == ("Here.", "calm@2", None)
    path, headers, body = served.asked[0]
    assert path == "/v1/chat/completions"
    assert headers["X-Steering-Mask"] == "calm"
    assert headers["Authorization"] == "Bearer k"
    assert (body["model"], body["temperature"]) == ("the-model", 0)
    assert body["messages"] == [{"role": "user", "content": "Where?"}]
    assert generate("Once", served.url + "/", raw=True, model="m").text == "There."
    path, headers, body = served.asked[1]
    assert (path, body["prompt"], body["model"]) == ("/v1/completions", "Once", "m")
    assert "X-Steering-Mask" not in headers


def test_a_refusal_is_told(served):
    served.answer = (404, {}, {"error": {"message": "there is no mask calm"}})
    with pytest.raises(InputError, match=r"404.*no mask calm"):
        generate("Where?", served.url, mask="calm")


def test_a_server_that_ignores_the_mask_is_an_error(served):
    served.answer = (200, {}, served.answer[2])
    with pytest.raises(InputError, match="which mask"):
        generate("Where?", served.url, mask="calm")


def test_no_server_and_no_text(served):
    served.answer = (200, {"X-Steering-Mask": "none"}, {"choices": []})
    with pytest.raises(InputError, match="without a text"):
        generate("Where?", served.url)
    for url in ("http://127.0.0.1:1", "http://[", "ftp://x"):
        with pytest.raises(InputError):
            generate("Where?", url)


def test_the_command(served):
    served.answer[1]["X-Trace-Run"] = "r"
    arguments = ["generate", "Where?", "--url", served.url, "--mask", "calm", "--run", "r"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout == "Here.\n"
    assert result.stderr == "mask calm@2; traced into r\n"
    assert served.asked[0][1]["X-Trace-Run"] == "r"
