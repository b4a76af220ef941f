"""`moescope serve` with two data-parallel replicas: a change reaches both, and both trace.

A real server on the CPU. vLLM's CPU backend lacks two collectives, which `engine_process` brings.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import engine_process
import httpx
import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from servers import PROMPT, Server

from moescope.analysis import open_store
from moescope.analysis.verify import verify_store
from moescope.tracer.store import read_writers

pytestmark = pytest.mark.engine

CALM, STORM = (1, 2, 3), (4, 5)  # experts that are deactivated
REPLICAS = (0, 1)


@pytest.fixture(scope="module")
def server(specimen, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        path = [str(Path(engine_process.__file__).parent), os.environ.get("PYTHONPATH")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
        patch.setenv("ENGINE_PROCESS_COLLECTIVES", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        server = Server(
            tmp_path_factory.mktemp("replicas"),
            specimen("qwen3_moe"),
            "--data-parallel-size=2",
            "--worker-extension-cls=engine_process.Collectives",
            key="admin-key-of-the-test",
        )
    try:
        server.wait()
        assert server.put("calm", *CALM).status_code == 200
        assert server.put("storm", *STORM).status_code == 200
        assert server.put("third", 6).status_code == 200
        yield server
    finally:
        server.stop()


def ask(server, replica, mask=None, example=None, **fields):
    """The headers of a completion on one replica."""
    headers = {"X-data-parallel-rank": f"{replica}"}
    if mask is not None:
        headers["X-Steering-Mask"] = mask
    xargs = {"ignore_eos": True}
    if example is not None:
        headers["X-Trace-Run"] = "run"
        xargs["vllm_xargs"] = {"moescope_example_id": example}
    given = {"model": "specimen", "prompt": PROMPT, "max_tokens": 6, "temperature": 0} | fields
    raw = server.openai.completions.with_raw_response.create(
        **given, extra_headers=headers, extra_body=xargs
    )
    if given.get("stream"):
        for _ in raw.parse():
            pass
    return raw.headers


def masks_of(server, example):
    rows = open_store(server.store).execute(
        "SELECT tokens.mask FROM tokens JOIN requests USING (request_id) "
        "WHERE example_id = ? ORDER BY position",
        [example],
    )
    return np.array([mask for (mask,) in rows.fetchall()])


def test_a_mask_is_in_force_on_whichever_replica(server):
    for replica in REPLICAS:
        for mask in ("calm", "none"):
            said = ask(server, replica, mask, f"{mask}-{replica}")
            assert said["x-steering-mask"] == {"calm": "calm@1"}.get(mask, "none")
    rows = server.rows([f"{mask}-{replica}" for mask in ("calm", "none") for replica in REPLICAS])
    for replica in REPLICAS:
        assert not np.isin(rows[f"calm-{replica}"], CALM).any()
        assert np.isin(rows[f"none-{replica}"], CALM).any()
    assert np.array_equal(rows["none-0"], rows["none-1"])
    assert len(read_writers(server.store)) == 2
    assert server.slots_in_use() == {}


def test_the_global_mask_reaches_the_running_requests_of_both(server):
    with ThreadPoolExecutor(2) as pool:
        running = [
            pool.submit(ask, server, replica, None, f"running-{replica}", max_tokens=400)
            for replica in REPLICAS
        ]
        while server.admin.get("/v1/traces").json()["live"] < 2:
            assert not any(each.done() for each in running)
        answer = server.admin.put("/v1/steering", json={"mask": "storm"})
        assert answer.json() == {"mask": "storm@1"}
        # Answered: from now on nobody is without it.
        for replica in REPLICAS:
            said = ask(server, replica, None, f"after-{replica}")
            assert said["x-steering-mask"] == "storm@1"
        for each in running:
            each.result()
    names = [f"{name}-{replica}" for name in ("running", "after") for replica in REPLICAS]
    rows = server.rows(names)
    for replica in REPLICAS:
        assert not np.isin(rows[f"after-{replica}"], STORM).any()
        steered = masks_of(server, f"running-{replica}") == "storm@1"
        assert len(steered) == len(PROMPT) + 400 - 1
        assert np.count_nonzero(np.diff(steered.astype(int))) == 1
        assert steered[-1]
        assert not np.isin(rows[f"running-{replica}"][steered], STORM).any()
        assert np.isin(rows[f"running-{replica}"][~steered], STORM).any()
    assert server.admin.delete("/v1/steering").json() == {"mask": None}
    for replica in REPLICAS:
        ask(server, replica, None, f"later-{replica}")
    rows = server.rows([f"later-{replica}" for replica in REPLICAS])
    assert all(np.isin(experts, STORM).any() for experts in rows.values())


def test_masks_change_places_while_both_replicas_run_under_others(server):
    """Two slots, three masks: a slot is used again when no replica runs a request in it."""
    wrong = []

    def work(number):
        replica, mask = number % 2, ("calm", "storm", "third")[number % 3]
        try:
            said = ask(server, replica, mask, f"mixed-{number}", max_tokens=3 + number % 5)
        except openai.RateLimitError:
            return None
        if said["x-steering-mask"] != f"{mask}@1":
            wrong.append(number)
        return number

    with ThreadPoolExecutor(6) as pool:
        done = [number for number in pool.map(work, range(90)) if number is not None]
    assert wrong == []
    assert len(done) > 10
    rows = server.rows([f"mixed-{number}" for number in done])
    experts = {0: CALM, 1: STORM, 2: (6,)}
    assert {number % 3 for number in done} == set(experts)
    for number in done:
        assert not np.isin(rows[f"mixed-{number}"], experts[number % 3]).any()
    assert server.slots_in_use() == {}


def test_the_page_of_metrics_counts_both(server):
    names = {"moescope_tokens_traced_total", "moescope_writer_up", "moescope_requests_traced_total"}
    page = httpx.get(f"{server.url}/metrics").text
    found = {
        sample.name: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name in names
    }
    with open_store(server.store) as store:
        [(rows, requests)] = store.execute(
            "SELECT (SELECT count(*) FROM tokens), (SELECT count(*) FROM requests)"
        ).fetchall()
    assert found["moescope_writer_up"] == 1
    # One token more on each: the one that proved it.
    assert found["moescope_tokens_traced_total"] == rows
    assert found["moescope_requests_traced_total"] == requests
    assert verify_store(server.store) == []
