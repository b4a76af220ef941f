"""`moescope serve` with two data-parallel replicas: a change reaches both, and both trace.

A real server on the CPU. vLLM's CPU backend lacks two collectives, which `engine_process` brings.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
from engine_process import PYTHONPATH
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
        patch.setenv("PYTHONPATH", PYTHONPATH)
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
        server.wait(timeout_s=400)  # two engines start
        assert server.put("calm", *CALM).status_code == 200
        assert server.put("storm", *STORM).status_code == 200
        assert server.put("third", 6).status_code == 200
        yield server
    finally:
        server.stop()


def on(replica):
    """The header that chooses a replica, in vLLM."""
    return {"X-data-parallel-rank": f"{replica}"}


def test_a_mask_is_in_force_on_whichever_replica(server):
    for replica in REPLICAS:
        for mask in ("calm", "none"):
            headers, _ = server.complete(mask, f"{mask}-{replica}", on(replica))
            assert headers["x-steering-mask"] == {"calm": "calm@1"}.get(mask, "none")
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
            pool.submit(server.complete, None, f"running-{replica}", on(replica), max_tokens=400)
            for replica in REPLICAS
        ]
        while server.admin.get("/v1/traces").json()["live"] < 2:
            assert not any(each.done() for each in running)
        answer = server.admin.put("/v1/steering", json={"mask": "storm"})
        assert answer.json() == {"mask": "storm@1"}
        # Answered: from now on nobody is without it.
        for replica in REPLICAS:
            headers, _ = server.complete(None, f"after-{replica}", on(replica))
            assert headers["x-steering-mask"] == "storm@1"
        for each in running:
            each.result()
    names = [f"{name}-{replica}" for name in ("running", "after") for replica in REPLICAS]
    rows = server.rows(names)
    for replica in REPLICAS:
        assert not np.isin(rows[f"after-{replica}"], STORM).any()
        steered = np.array([mask == "storm@1" for mask in server.masks_of(f"running-{replica}")])
        assert len(steered) == len(PROMPT) + 400 - 1
        assert np.count_nonzero(np.diff(steered.astype(int))) == 1
        assert steered[-1]
        assert not np.isin(rows[f"running-{replica}"][steered], STORM).any()
        assert np.isin(rows[f"running-{replica}"][~steered], STORM).any()
    assert server.admin.delete("/v1/steering").json() == {"mask": None}
    for replica in REPLICAS:
        server.complete(None, f"later-{replica}", on(replica))
    rows = server.rows([f"later-{replica}" for replica in REPLICAS])
    assert all(np.isin(experts, STORM).any() for experts in rows.values())


def test_masks_change_places_while_both_replicas_run_under_others(server):
    """Two slots, three masks: a slot is used again when no replica runs a request in it."""
    deadline = time.monotonic() + 120

    def work(number):
        mask, place = ("calm", "storm", "third")[number % 3], on(number % 2)
        while True:
            try:
                headers, _ = server.complete(
                    mask, f"mixed-{number}", place, max_tokens=3 + number % 5
                )
            except openai.RateLimitError:  # the others hold both slots
                assert time.monotonic() < deadline
                time.sleep(0.05)
            else:
                return headers["x-steering-mask"] == f"{mask}@1"

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(90)))
    rows = server.rows([f"mixed-{number}" for number in range(90)])
    experts = {0: CALM, 1: STORM, 2: (6,)}
    for number in range(90):
        assert not np.isin(rows[f"mixed-{number}"], experts[number % 3]).any()
    assert server.slots_in_use() == {}


def test_the_page_of_metrics_counts_both(server):
    found = server.scrape()
    with open_store(server.store) as store:
        [(rows, requests)] = store.execute(
            "SELECT (SELECT count(*) FROM tokens), (SELECT count(*) FROM requests)"
        ).fetchall()
    assert found["moescope_writer_up", None] == 1
    assert found["moescope_tokens_traced_total", None] == rows
    assert found["moescope_requests_traced_total", None] == requests
    assert verify_store(server.store) == []
