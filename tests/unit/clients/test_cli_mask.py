"""The commands through typer, and over HTTP to a small server."""

import json
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer

import commands
import pyarrow as pa
import pytest

from moescope.analysis.export import write_ranking
from moescope.clients.cli_mask import mask_app
from moescope.tracer.errors import InputError
from moescope.tracer.mask import make_mask, read_mask, write_mask

invoke = partial(commands.invoke, mask_app)


def rows(output):
    return [line.split() for line in output.splitlines() if line.strip()]


@pytest.fixture
def ranking(tmp_path):
    """Layers 3 and 4 of four experts, top-2."""
    rds = {3: [0.5, -0.4, 0.3, -0.2], 4: [0.1, -0.1, 0.0, 0.45]}
    table = pa.Table.from_pylist(
        [
            {"layer": layer, "expert": e, "a1": 5, "d1": 5, "a2": 5, "d2": 5, "rd": rd}
            for layer, values in rds.items()
            for e, rd in enumerate(values)
        ]
    )
    write_ranking(table, tmp_path / "ranking.parquet")
    return tmp_path / "ranking.parquet"


def test_from_rd_show_random_and_diff(ranking, tmp_path):
    out, control = tmp_path / "m.json", tmp_path / "r.json"
    options = ("--deactivate", 9, "--activate", 2, "--layers", "3", "--name", "doc", "--out", out)
    output = invoke("from-rd", ranking, *options)
    assert f"doc: 2 activate, 2 deactivate in 1 layers -> {out}" in output
    assert "note: deactivate: 2 instead of 9" in output
    assert read_mask(out).name == "doc"

    shown = invoke("show", out)
    assert ["3", "activate", "2", "0,", "2"] in rows(shown)
    assert ["3", "deactivate", "2", "1,", "3"] in rows(shown)
    assert "2 MoE layers (3-4) of 4 experts, top-2" in shown

    output = invoke("random", "--like", out, "--seed", 1, "--name", "c", "--out", control)
    assert f"c: 2 activate, 2 deactivate in 1 layers -> {control}" in output.replace(
        "2 deactivate, 2 activate", "2 activate, 2 deactivate"
    )
    write_mask(make_mask(name="x", mode="steermoe", entries=[]), control)
    output = invoke("diff", out, control)
    assert ["mode", "hard", "steermoe"] in rows(output)
    assert ["3", "0", "activate", "-"] in rows(output)
    assert invoke("diff", out, out) == "no difference in effect\n"


def test_from_rd_passes_every_option_on(ranking, tmp_path):
    out = tmp_path / "m.json"
    invoke(
        "from-rd", ranking, "--deactivate", 1, "--scale", 0.5, "--layers", "3-4", "--min-abs-rd",
        0.1, "--reverse", "--select", "steermoe", "--name", "m", "--out", out,
    )  # fmt: skip
    mask = read_mask(out)
    assert [str(entry) for entry in mask.entries] == ["scale 0.5"]
    assert (mask.entries[0].layer, mask.entries[0].expert) == (3, 0)
    assert mask.source is not None
    assert mask.source["selection"] == {
        "select": "steermoe", "deactivate": 1, "activate": 0, "layers": "3-4", "min_abs_rd": 0.1,
        "reverse": True,
    }  # fmt: skip
    invoke("from-rd", ranking, "--activate", 1, "--mode", "steermoe", "--name", "m", "--out", out)
    assert read_mask(out).epsilon == 0.01


def test_a_bad_file_is_an_input_error(tmp_path):
    (tmp_path / "m.json").write_text("{}")
    with pytest.raises(InputError, match=r"m\.json: name: Field required"):
        invoke("show", tmp_path / "m.json")


class Server(HTTPServer):
    """Answers what the test puts into `answers` and keeps what it was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []
        self.answer = (200, {})
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        key = self.headers.get("Authorization")
        self.server.asked.append((self.command, self.path, key, body))
        status, answer = self.server.answer
        raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    do_GET = do_PUT = do_DELETE = answer  # noqa: N815

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def mask_file(tmp_path):
    entries = [{"layer": 3, "expert": 7, "action": "deactivate"}]
    write_mask(make_mask(name="m", entries=entries), tmp_path / "m.json")
    return tmp_path / "m.json"


def test_push_list_delete(server, mask_file, monkeypatch):
    server.answer = 200, {"name": "m", "version": 2}
    assert invoke("push", mask_file, "--url", f"{server.url}/") == f"m@2 is on {server.url}/\n"
    server.answer = 200, {"data": [{"name": "m", "version": 2, "note": "[x]"}]}
    monkeypatch.setenv("MOESCOPE_ADMIN_KEY", "secret")
    assert ["m", "2", "[x]"] in rows(invoke("list", "--url", server.url))
    server.answer = 204, b""
    output = invoke("delete", "a/b", "--url", server.url, "--admin-key", "other")
    assert output == f"a/b is gone from {server.url}\n"
    assert server.asked == [
        ("PUT", "/v1/masks/m", None, mask_file.read_bytes()),
        ("GET", "/v1/masks", "Bearer secret", b""),
        ("DELETE", "/v1/masks/a%2Fb", "Bearer other", b""),
    ]


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (409, {"error": {"message": "another model"}}, r"refused \(HTTP 409\): another model$"),
        (401, {"error": {"message": "no key"}}, "no key. Give the admin key with --admin-key or"),
        (404, {"detail": "Not Found"}, r"\(HTTP 404\): it knows no such route: is it a moescope"),
        (500, b"<html>", r"\(HTTP 500\): no reason"),
        (200, b"<html>", "with HTTP 200 and no JSON object"),
        (302, {}, "with HTTP 302"),
        (200, {"masks": []}, 'without "data"'),
    ],
)
def test_what_the_server_says_is_shown(server, status, answer, message):
    server.answer = status, answer
    with pytest.raises(InputError, match=message):
        invoke("list", "--url", server.url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1", "nothing answers at http://127.0.0.1:1 .*`moescope serve`"),
        ("127.0.0.1:8000", "can't reach 127.0.0.1:8000"),
        ("http://127.0.0.1:x", "can't reach http://127.0.0.1:x: Invalid port"),
    ],
)
def test_no_server(url, message):
    with pytest.raises(InputError, match=message):
        invoke("list", "--url", url)


def test_a_key_that_no_header_holds(server):
    with pytest.raises(InputError, match="use ASCII"):
        invoke("list", "--url", server.url, "--admin-key", "schlüssel")
    with pytest.raises(InputError, match="can't reach"):
        invoke("list", "--url", server.url, "--admin-key", "a\nb")


def test_every_command_has_an_example():
    for command in mask_app.registered_commands:
        assert command.callback is not None
        assert "**Example:** `moescope mask " in (command.callback.__doc__ or "")


def test_help_does_not_import_the_libraries():
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, moescope.clients.cli_mask; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert not {"duckdb", "pyarrow", "httpx", "numpy", "pydantic"} & set(loaded)
