"""Two replicas behind Ray Serve, as people start them, with processes that are killed."""

import json
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import httpx
import numpy as np
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from replicas import CLI, Replicas
from servers import PROMPT

from moescope.analysis import open_store

pytestmark = [pytest.mark.engine, pytest.mark.fleet]

ADMIN = "admin-key-of-the-test"
LEASE_S = 3


@pytest.fixture(scope="module")
def fleet(specimen, tmp_path_factory):
    fleet = Replicas(tmp_path_factory.mktemp("fleet"), specimen("qwen3_moe"), key=ADMIN)
    try:
        fleet.wait()
        yield fleet
    finally:
        fleet.stop()


def everywhere(answer):
    """Whether a change reached both replicas."""
    replicas = answer.json()["replicas"]
    return answer.status_code == 200 and len(replicas["reached"]) == replicas["expected"] == 2


def masks_of(fleet, examples):
    """What the store says of each of these requests: the masks of its tokens."""
    rows = open_store(fleet.store).execute(
        "SELECT example_id, list(DISTINCT coalesce(tokens.mask, 'none')) FROM tokens "
        "JOIN requests USING (request_id) GROUP BY ALL"
    )
    found = dict(rows.fetchall())
    return {example: found[example] for example in examples}


def metric(fleet, name):
    """{replica: value}."""
    page = httpx.get(f"{fleet.url}/metrics").text
    samples = [s for f in text_string_to_metric_families(page) for s in f.samples]
    return {s.labels["replica"]: s.value for s in samples if s.name == name}


def test_a_mask_and_a_global_change_reach_both(fleet):
    assert everywhere(fleet.put("calm", 1, 2, 3))
    assert everywhere(fleet.put("storm", 4, 5))
    with ThreadPoolExecutor(8) as pool:
        headers = list(pool.map(lambda n: fleet.complete("calm", f"calm{n}")[0], range(24)))
    assert {header["x-steering-mask"] for header in headers} == {"calm@1"}
    assert everywhere(fleet.admin.put("/v1/steering", json={"mask": "storm"}))
    with ThreadPoolExecutor(8) as pool:
        headers = list(pool.map(lambda n: fleet.complete(None, f"global{n}")[0], range(24)))
    assert {header["x-steering-mask"] for header in headers} == {"storm@1"}
    assert everywhere(fleet.admin.delete("/v1/steering"))
    rows = fleet.rows([f"{kind}{n}" for kind in ("calm", "global") for n in range(24)])
    for example, experts in rows.items():
        assert not np.isin(experts, [1, 2, 3] if "calm" in example else [4, 5]).any()
    # Both have served, and each has its own files in the one store.
    traced = metric(fleet, "moescope_requests_traced_total")
    assert len(traced) == 2
    assert min(traced.values()) > 0
    assert sum(traced.values()) >= 48
    writers = {f.name.split("-")[0] for f in (fleet.store / "tokens").glob("[!.]*.parquet")}
    assert len(writers) >= 2


def test_requests_see_one_version_while_the_mask_changes(fleet):
    """Version v switches the experts 2v and 2v + 1 off; requests come all the time."""
    assert everywhere(fleet.put("flip", 2, 3))
    known, stop = [1], []

    def ask(worker):
        asked = []
        while not stop or len(asked) < 5:
            example, least = f"flip{worker}-{len(asked)}", known[-1]
            headers, _ = fleet.complete("flip", example)
            asked.append((example, least, headers["x-steering-mask"]))
        return asked

    with ThreadPoolExecutor(8) as pool:
        workers = [pool.submit(ask, worker) for worker in range(8)]
        try:
            for version in range(2, 8):
                time.sleep(0.4)
                answer = fleet.put("flip", 2 * version, 2 * version + 1)
                assert everywhere(answer), answer.text
                assert answer.json()["version"] == version
                known.append(version)
            time.sleep(0.4)
        finally:
            stop.append(True)
        asked = [item for worker in workers for item in worker.result()]
    assert len(asked) >= 40
    rows = fleet.rows([example for example, _, _ in asked])
    masks = masks_of(fleet, rows)
    for example, least, key in asked:
        version = int(key.removeprefix("flip@"))
        assert version >= least, "a version that was replaced before the request was sent"
        assert masks[example] == [key]
        assert not np.isin(rows[example], [2 * version, 2 * version + 1]).any()
    assert len({key for _, _, key in asked}) > 3


def test_no_request_begins_under_a_global_mask_that_was_replaced(fleet):
    for name, experts in {"left": (8, 9), "right": (10, 11)}.items():
        assert everywhere(fleet.put(name, *experts))
    assert everywhere(fleet.admin.put("/v1/steering", json={"mask": "left"}))
    in_force, stop = ["left@1"], []

    def ask(worker):
        asked = []
        while not stop or len(asked) < 5:
            example, before = f"global-{worker}-{len(asked)}", len(in_force)
            headers, _ = fleet.complete(None, example)
            asked.append((example, before, len(in_force), headers["x-steering-mask"]))
        return asked

    with ThreadPoolExecutor(8) as pool:
        workers = [pool.submit(ask, worker) for worker in range(8)]
        try:
            for name in ("right", "left") * 3:
                time.sleep(0.3)
                answer = fleet.admin.put("/v1/steering", json={"mask": name})
                assert everywhere(answer), answer.text
                in_force.append(f"{name}@1")
            time.sleep(0.3)
        finally:
            stop.append(True)
        asked = [item for worker in workers for item in worker.result()]
    assert everywhere(fleet.admin.delete("/v1/steering"))
    rows = fleet.rows([example for example, *_ in asked])
    masks = masks_of(fleet, rows)
    assert len(asked) >= 40
    for example, before, after, key in asked:
        # From what was in force when it was sent, to a change that was not answered at its end.
        allowed = in_force[before - 1 : after + 1]
        assert {key, *masks[example]} <= set(allowed)
        for mask, off in {"left@1": (8, 9), "right@1": (10, 11)}.items():
            if masks[example] == [mask]:
                assert not np.isin(rows[example], off).any()


def test_streams_come_bit_by_bit_and_one_that_is_closed_frees_its_slot(fleet):
    stream = fleet.openai.completions.with_raw_response.create(
        model="specimen",
        prompt=PROMPT,
        max_tokens=2000,
        stream=True,
        extra_body={"ignore_eos": True},
        extra_headers={"X-Steering-Mask": "calm", "X-Trace-Run": "streamed"},
    )
    assert stream.headers["x-steering-mask"] == "calm@1"
    assert stream.headers["x-trace-run"] == "streamed"
    assert len(stream.headers.get_list("x-request-id")) == 1
    with closing(stream.parse()) as events:
        for _ in range(3):
            next(iter(events))
        assert fleet.slots_in_use() == {"calm@1": 1}  # it runs while we read
    deadline = time.monotonic() + 20
    while fleet.slots_in_use():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_refusals_are_those_of_a_single_server(fleet):
    for mask, error, words in (
        ("nobody", openai.NotFoundError, "no mask nobody"),
        ("calm@7", openai.NotFoundError, "no version 7"),
        ("calm@x", openai.UnprocessableEntityError, "names no mask"),
    ):
        with pytest.raises(error, match=words):
            fleet.complete(mask)
    assert httpx.get(f"{fleet.url}/v1/masks").status_code == 401
    assert fleet.put("many", *range(13), layers=[2]).status_code == 422
    signature = {"moe_layers": [0], "num_experts": 16, "top_k": 4}
    assert fleet.put("other", 1, layers=[0], signature=signature).status_code == 409
    moe = fleet.admin.get("/v1/moe").json()
    assert (moe["moe_layers"], moe["slots"]["total"]) == ([0, 1, 2, 3], 4)


def test_a_run_is_started_on_both_and_the_coordinator_may_die(fleet):
    assert everywhere(fleet.admin.post("/v1/traces/monday/start"))
    [coordinator] = fleet.processes("ray::Coordinator")
    coordinator.kill()
    # Replicas know what is in force: requests pass, or wait until they may.
    headers = [fleet.insist(lambda: fleet.complete("calm")[0]) for _ in range(12)]
    assert {(h["x-steering-mask"], h["x-trace-run"]) for h in headers} == {("calm@1", "monday")}
    fleet.wait()
    assert everywhere(fleet.put("after", 6))
    assert {fleet.complete("after")[0]["x-steering-mask"] for _ in range(8)} == {"after@1"}
    answer = fleet.admin.post("/v1/traces/monday/stop")
    assert everywhere(answer)
    assert answer.json()["live"] == 0
    traces = fleet.admin.get("/v1/traces").json()
    [monday] = [run for run in traces["runs"] if run["run"] == "monday"]
    assert (monday["requests"], monday["incomplete"]) == (20, 0)
    assert {fleet.complete()[0]["x-trace"] for _ in range(8)} == {"off"}


def test_a_replica_that_hangs_is_named_and_catches_up(fleet):
    before = fleet.wait()
    hangs = fleet.processes("ray::ServeReplica:moescope:replica")[0]
    hangs.suspend()
    try:
        answer = None
        while answer is None:
            # Serve sends a request there too, where it waits; the next one goes to the other.
            with suppress(httpx.ReadTimeout):
                answer = fleet.admin.put("/v1/steering", json={"mask": "storm"}, timeout=10)
        assert answer.status_code == 207
        assert answer.json()["mask"] == "storm@1"
        [missing] = answer.json()["replicas"]["not_reached"]
        assert f"for {LEASE_S} s" in missing["why"]
    finally:
        hangs.resume()
    assert fleet.wait() == before  # it was not started anew
    assert {fleet.complete()[0]["x-steering-mask"] for _ in range(16)} == {"storm@1"}


def test_a_replica_that_is_killed_comes_back_with_all_masks(fleet):
    before = fleet.wait()
    server = fleet.processes("moescope.clients.cli serve")[0]
    os.kill(server.pid, signal.SIGKILL)
    fleet.wait(1)
    answer = fleet.put("calm", 7)  # a second version
    assert answer.status_code == 207
    assert answer.json()["key"] == "calm@2"
    [dead] = answer.json()["replicas"]["not_reached"]
    assert dead["why"] == "its server was ended by SIGKILL"
    assert fleet.admin.put("/v1/steering", json={"mask": "calm"}).status_code == 207
    # The other one serves on, and under what is new.
    assert {fleet.complete()[0]["x-steering-mask"] for _ in range(8)} == {"calm@2"}
    assert len(fleet.wait() & before) == 1
    examples = [f"back{n}" for n in range(24)]
    traced = metric(fleet, "moescope_requests_traced_total")
    with ThreadPoolExecutor(8) as pool:
        headers = list(pool.map(lambda example: fleet.complete(None, example)[0], examples))
    assert {header["x-steering-mask"] for header in headers} == {"calm@2"}
    served = metric(fleet, "moescope_requests_traced_total")
    assert min(served[replica] - traced[replica] for replica in served) > 0
    for experts in fleet.rows(examples).values():
        assert not np.isin(experts, [7]).any()
    assert fleet.complete("calm@1")[0]["x-steering-mask"] == "calm@1"
    log = [json.loads(line) for line in (fleet.masks / "audit.jsonl").open()]
    assert [line["after"] for line in log if line["what"] == "put"][-1] == "calm@2"
    assert all(line["who"].startswith("key:") for line in log)


def test_an_actor_that_is_killed_takes_its_engine_along(fleet):
    fleet.wait()
    actor = fleet.processes("ray::ServeReplica:moescope:replica")[0]
    engine = actor.children(recursive=True)
    assert any("moescope.clients.cli" in " ".join(process.cmdline()) for process in engine)
    actor.kill()
    _, alive = psutil.wait_procs([p for p in engine if "tracer.writer" not in p.cmdline()], 60)
    assert alive == []


def test_others_need_a_key_and_bad_arguments_are_told_before_ray_starts(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "MOESCOPE_ADMIN_KEY"}
    for options, words in (
        (["--host", "0.0.0.0"], "set an admin key"),
        (["--", "--port", "1"], "--port is no option"),
        (["--address", "127.0.0.1:1"], "no Ray answers at 127.0.0.1:1"),
    ):
        command = [*CLI, "m", "--masks", str(tmp_path), *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
