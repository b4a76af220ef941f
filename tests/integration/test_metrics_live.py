"""A live server's /metrics and log lines, against what its trace store holds."""

import json
import os
import signal
import time
from pathlib import Path

import httpx
import openai
import pytest
from servers import PROMPT, Server

from moescope.analysis import open_store
from moescope.tracer.store import committed_files, read_writers

pytestmark = pytest.mark.engine

ADMIN, INFERENCE = "admin-key-of-the-test", "inference-key"
SECRET = "Where is the silver lamp of the test?"


@pytest.fixture(scope="module")
def server(specimen, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOESCOPE_LOG_FORMAT", "json")
        patch.setenv("MOESCOPE_RING_MIB", "1")
        folder = tmp_path_factory.mktemp("measured")
        server = Server(
            folder,
            specimen("qwen3_moe"),
            "--disable-uvicorn-access-log",
            key=ADMIN,
            api_key=INFERENCE,
        )
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def scrape_until(server, ready):
    deadline = time.monotonic() + 30
    while not ready(found := server.scrape()):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def steps(before, after):
    """What grew, by how much; gauges are left out."""
    counters = {key for key in after if key[0].endswith("_total")}
    grown = {key: after[key] - before.get(key, 0) for key in counters}
    return {key: step for key, step in grown.items() if step}


def lines(server):
    """Our log lines."""
    text = server.log.read_text()
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def ask(server, mask=None, run=None, request_id=None, extra_body=None, **fields):
    headers = {"X-Steering-Mask": mask, "X-Trace-Run": run, "X-Request-Id": request_id}
    return server.openai.completions.with_raw_response.create(
        **{"model": "specimen", "prompt": PROMPT, "max_tokens": 6} | fields,
        extra_headers={name: value for name, value in headers.items() if value is not None},
        extra_body={"ignore_eos": True} | (extra_body or {}),
    )


def writer_of(server):
    """The writer process, by its command line."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        mine = str(server.store).encode() in command and b"/bin/sh" not in command
        if mine and b"moescope.tracer.writer" in command:
            return int(process.name)
    raise AssertionError("there is no writer")


def test_what_was_served_is_what_is_counted_and_stored(server):
    assert "vllm:" in httpx.get(f"{server.url}/metrics").text
    server.put("calm", 1, 2, 3)
    server.put("storm", 4, 5)
    before = server.scrape()
    assert before["moescope_masks", None] == 2
    assert before["moescope_mask_slots", None] == 2
    assert before["moescope_writer_up", None] == 1
    assert before["moescope_requests_steered_total", "calm@1"] == 0

    for _ in range(2):
        ask(server, run="plain")
    for _ in range(3):
        ask(server, "calm", run="steered")
    ask(server, "storm")
    ask(server, "none")
    ask(server, run="plain", prompt=[PROMPT, [5, 6]])
    server.admin.put("/v1/steering", json={"mask": "storm"})
    ask(server, run="under")
    server.admin.delete("/v1/steering")
    stream = server.openai.completions.create(
        model="specimen", prompt=PROMPT, max_tokens=400, stream=True,
        extra_headers={"X-Steering-Mask": "calm"}, extra_body={"ignore_eos": True},
    )  # fmt: skip
    next(iter(stream))
    assert server.scrape()["moescope_mask_slots_in_use", None] == 1
    stream.close()

    rows = 2 * 9 + 3 * 9 + (9 + 7) + 9
    after = scrape_until(server, lambda now: now["moescope_store_rows_total", None] == rows)
    with open_store(server.store) as con:
        [(stored,)] = con.execute("SELECT count(*) FROM tokens").fetchall()
        [(requests,)] = con.execute("SELECT count(*) FROM requests").fetchall()
        [(steered,)] = con.execute("SELECT count(*) FROM requests WHERE mask = 'calm@1'").fetchall()
    assert (stored, requests, steered) == (rows, 8, 3)
    tokens, committed = committed_files(server.store)
    grown = steps(before, after)
    assert grown == {
        ("moescope_tokens_traced_total", None): stored,
        ("moescope_requests_traced_total", None): requests,
        ("moescope_store_rows_total", None): stored,
        ("moescope_store_files_total", None): len(committed),
        ("moescope_store_bytes_total", None): sum(f.stat().st_size for f in [*tokens, *committed]),
        ("moescope_requests_steered_total", "calm@1"): steered + 1,
        ("moescope_requests_steered_total", "storm@1"): 2,
    }
    idle = scrape_until(server, lambda now: not now["moescope_mask_slots_in_use", None])
    assert idle["moescope_writer_lag_seconds", None] == 0
    assert idle["moescope_ring_slots_in_use", None] == 0
    server.put("brief", 1)
    ask(server, "brief")
    assert server.scrape()["moescope_requests_steered_total", "brief@1"] == 1
    server.admin.delete("/v1/masks/brief")
    assert ("moescope_requests_steered_total", "brief@1") not in server.scrape()


def test_every_refusal_is_counted_by_its_reason(server):
    server.put("calm", 1, 2, 3)
    before = server.scrape()
    with pytest.raises(openai.NotFoundError):
        ask(server, "nobody")
    for mask in ("calm@x", "calm storm"):
        with pytest.raises(openai.UnprocessableEntityError):
            ask(server, mask)
    signature = {"moe_layers": [0], "num_experts": 16, "top_k": 4}
    assert server.put("other", 1, layers=[0], signature=signature).status_code == 409
    assert httpx.get(f"{server.url}/v1/masks").status_code == 401  # from vLLM: not ours to count
    inference = {"Authorization": f"Bearer {INFERENCE}"}
    assert httpx.get(f"{server.url}/v1/masks", headers=inference).status_code == 401
    assert server.admin.post("/v1/traces/x/stop").status_code == 404
    with pytest.raises(openai.BadRequestError, match="moescope_spans"):
        ask(server, extra_body={"vllm_xargs": {"moescope_spans": "[[1"}})
    wrong = {"content": b"{", "headers": inference | {"Content-Type": "application/json"}}
    assert httpx.post(f"{server.url}/v1/completions", **wrong).status_code == 400
    assert httpx.post(
        f"{server.url}/tokenize", json={}, headers={"X-Steering-Mask": "calm"}
    ).status_code == 422  # fmt: skip
    assert steps(before, server.scrape()) == {
        ("moescope_requests_rejected_total", reason): count
        for reason, count in {
            "unknown": 2, "invalid": 3, "other_model": 1, "unauthorized": 1, "vllm": 2
        }.items()
    }  # fmt: skip


def test_no_free_slot_is_a_reason(server):
    for name in ("calm", "storm", "third"):
        server.put(name, 6)
    before = server.scrape()
    streams = [
        server.openai.completions.create(
            model="specimen", prompt=PROMPT, max_tokens=3000, stream=True,
            extra_headers={"X-Steering-Mask": mask}, extra_body={"ignore_eos": True},
        )
        for mask in ("calm", "storm")
    ]  # fmt: skip
    try:
        assert server.scrape()["moescope_mask_slots_in_use", None] == 2
        with pytest.raises(openai.RateLimitError):
            ask(server, "third")
    finally:
        for stream in streams:
            stream.close()
    assert steps(before, server.scrape())["moescope_requests_rejected_total", "no_slot"] == 1


def test_a_request_has_one_line_whose_id_is_in_the_answer_and_in_the_store(server):
    server.put("calm", 1, 2, 3)
    given = ask(server, "calm", run="logged", request_id="mine-1")
    assert given.headers["x-request-id"] == "mine-1"
    made = ask(server, run="logged").headers["x-request-id"]
    named = ask(server, run="logged", extra_body={"request_id": "in-the-body"})
    assert named.headers["x-request-id"] == "in-the-body"
    chat = server.openai.chat.completions.with_raw_response.create(
        model="specimen",
        messages=[{"role": "user", "content": SECRET}],
        max_tokens=2,
        extra_headers={"X-Trace-Run": "logged", "X-Request-Id": "mine-2"},
    )
    answer = server.openai.responses.with_raw_response.create(
        model="specimen",
        input=SECRET,
        max_output_tokens=2,
        extra_headers={"X-Trace-Run": "logged", "X-Request-Id": "mine-3"},
    )
    assert chat.headers["x-request-id"] == "mine-2"
    assert answer.parse().id == "resp_mine-3"
    with pytest.raises(openai.NotFoundError):
        ask(server, "nobody", request_id="mine-4", prompt=SECRET)
    ids = ["mine-1", made, "in-the-body", "mine-2", "mine-3"]
    deadline = time.monotonic() + 30
    while True:
        with open_store(server.store) as con:
            found = con.execute("SELECT request_id FROM requests WHERE run = 'logged'").fetchall()
        if len(found) == len(ids):
            break
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    begins = ("cmpl-mine-1-", f"cmpl-{made}-", "cmpl-in-the-body-", "chatcmpl-mine-2-",
              "resp_mine-3")  # fmt: skip
    for begin in begins:
        assert sum(row[0].startswith(begin) for row in found) == 1, (begin, found)

    logged = lines(server)
    of = {i: [line for line in logged if line.get("request_id") == i] for i in [*ids, "mine-4"]}
    assert [len(entries) for entries in of.values()] == [1] * 6
    [line] = of["mine-1"]
    assert line | {"time": 0, "duration_s": 0} == {
        "time": 0,
        "level": "INFO",
        "message": "request",
        "request_id": "mine-1",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "duration_s": 0,
        "mask": given.headers["x-steering-mask"],
        "run": "logged",
    }
    assert line["duration_s"] > 0
    [refused] = of["mine-4"]
    assert (refused["level"], refused["status"], refused["reason"]) == ("WARNING", 404, "unknown")
    assert "nobody" in refused["detail"]
    changes = [entry for entry in logged if entry["message"] == "change"]
    put = next(entry for entry in changes if entry["mask"] == "calm@1")
    assert put["what"] == "mask put"
    assert put["who"].startswith("key:")
    [request] = [
        entry
        for entry in logged
        if entry["message"] == "request" and entry.get("request_id") == put["request_id"]
    ]
    assert (request["path"], request["who"]) == ("/v1/masks/calm", put["who"])
    # No text of anyone, no key, and no line for a page that machines read all day.
    text = server.log.read_text()
    assert not any(secret in text for secret in (SECRET, "silver lamp", ADMIN, INFERENCE))
    assert not any(entry.get("path") in ("/metrics", "/health") for entry in logged)


def test_a_writer_that_hangs_and_one_that_dies_are_seen(server):
    writer = writer_of(server)
    before = scrape_until(server, lambda now: now["moescope_ring_slots_in_use", None] == 0)
    os.kill(writer, signal.SIGSTOP)
    lengths = [4000] * 6
    for number, length in enumerate(lengths):
        prompt = [10 + (number + i) % 800 for i in range(length)]
        ask(server, run="hung", prompt=prompt, max_tokens=1)
    hung = scrape_until(server, lambda now: now["moescope_writer_lag_seconds", None] > 0.5)
    assert hung["moescope_writer_up", None] == 1
    grown = steps(before, hung)
    traced = grown["moescope_tokens_traced_total", None]
    dropped = grown["moescope_rows_dropped_total", None]
    assert traced + dropped == sum(lengths)
    assert dropped > 0
    assert hung["moescope_ring_slots_in_use", None] == traced
    assert traced <= hung["moescope_ring_slots", None]
    os.kill(writer, signal.SIGCONT)
    scrape_until(server, lambda now: steps(before, now).get(
        ("moescope_store_rows_total", None)) == traced)  # fmt: skip
    scrape_until(server, lambda now: now["moescope_writer_lag_seconds", None] == 0)
    [counters] = read_writers(server.store)
    assert counters.dropped_rows == server.scrape()["moescope_rows_dropped_total", None]

    os.kill(writer, signal.SIGKILL)
    dead = scrape_until(server, lambda now: now["moescope_writer_up", None] == 0)
    assert dead["moescope_store_rows_total", None] == counters.rows

    def asked_again(now):  # the engine starts another writer, if it has something to do
        ask(server, run="again")
        return now["moescope_writer_up", None] == 1

    scrape_until(server, asked_again)
    ask(server, run="after")
    more = scrape_until(
        server, lambda now: now["moescope_store_rows_total", None] >= counters.rows + 9
    )
    assert more["moescope_tokens_traced_total", None] > dead["moescope_tokens_traced_total", None]
