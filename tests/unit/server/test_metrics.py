"""The exposition page, with the numbers of a real ring and its real writer process."""

import asyncio
import os
import re
import signal
import time

import numpy as np
import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from moescope.server import metrics, settings
from moescope.server.errors import REASONS
from moescope.server.logs import RequestLine
from moescope.server.metrics import OTHER, Counts, MoescopeCollector, serve_metrics
from moescope.server.plugin import ControlPlane
from moescope.server.settings import ServerSettings
from moescope.tracer.errors import TracerError
from moescope.tracer.format import ModelFacts, MoeShape
from moescope.tracer.ring import Rows
from moescope.tracer.ring_watch import RingWatch, joined_counts, summed_counts
from moescope.tracer.settings import Settings
from moescope.tracer.sink import RingSink
from moescope.tracer.store import read_writers

SHAPE = MoeShape((1, 2, 3), 8, 2)
FACTS = ModelFacts("m", None, "MoeForCausalLM", "float32", SHAPE, "softmax", True, "vllm 0")


@pytest.fixture
def sink(tmp_path):
    sink = RingSink(tmp_path / "store", FACTS, Settings(flush_seconds=0.05, policy="drop"))
    yield sink
    if sink._process.running():
        os.kill(sink._process.pid, signal.SIGCONT)
        sink.close()


def trace(sink, number, rows):
    """One finished request."""
    sink.send(
        {"op": "begin", "request": number, "request_id": f"r{number}", "run": "t",
         "prompt_tokens": rows}
    )  # fmt: skip
    block = Rows.empty(rows, SHAPE)
    block.request[:], block.position[:], block.token[:] = number, np.arange(rows), 7
    block.experts[:], block.weights[:] = [0, 1] * 3, 0.5
    sink.write(block)
    sink.send({"op": "finish", "request": number, "lost_rows": 0})


def until(watch, ready):
    deadline = time.monotonic() + 10
    while not ready(counts := watch.counts()):
        assert time.monotonic() < deadline, counts
        time.sleep(0.01)
    return counts


def page(rings=(), plane=None):
    """{name: [(labels, value)]} of the page, and the families, as Prometheus reads it."""
    registry = CollectorRegistry()
    registry.register(MoescopeCollector(rings, plane))
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    samples = {}
    for family in families:
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return samples, families


def answered(counts, mask=None, status=200, reason=None):
    line = RequestLine("id", "POST", "/v1/completions", status=status, mask=mask, reason=reason)
    counts.answered(line)


def test_names_by_convention(sink, make_plane):
    _, families = page([[RingWatch(sink.where)]], make_plane())
    assert {family.name for family in families} == {
        "moescope_build_info",
        *(f"moescope_{name}" for name in (
            "tokens_traced", "rows_dropped", "requests_dropped", "requests_traced", "ring_slots",
            "ring_slots_in_use", "writer_lag_seconds", "writer_up", "store_bytes", "store_files",
            "store_rows", "masks", "mask_slots", "mask_slots_in_use", "requests_steered",
            "requests_rejected")),
    }  # fmt: skip
    for family in families:
        assert re.fullmatch(r"moescope(_[a-z]+)+", family.name)
        assert family.documentation.endswith(".")
        for sample in family.samples:
            # The parser takes the suffix off a counter's family, and only off a counter's.
            assert sample.name.endswith("_total") == (family.type == "counter")
            assert not re.search(r"_(ms|milliseconds|minutes|kb|mb|mib|kib)(_|$)", sample.name)
            assert re.fullmatch(r"[a-z_]*", "".join(sample.labels))


def test_what_the_writer_does_is_seen_from_outside(sink, tmp_path):
    watch = RingWatch(sink.where)
    first = watch.counts()
    assert (first.tokens, first.up, first.lag_s, first.slots_in_use) == (0, True, 0, 0)
    for number, rows in enumerate([5, 9, 1], 1):
        trace(sink, number, rows)
    counts = until(watch, lambda now: now.rows == 15)
    sink.sync()
    [writer] = read_writers(tmp_path / "store")
    counts = watch.counts()
    assert (counts.tokens, counts.requests, counts.slots_in_use) == (15, 3, 0)
    assert (counts.rows, counts.files, counts.bytes) == (writer.rows, writer.files, writer.bytes)
    assert counts.lag_s == 0
    samples, _ = page([[watch]])
    assert samples["moescope_tokens_traced_total"] == [({}, 15)]
    assert samples["moescope_store_bytes_total"] == [({}, writer.bytes)]


def test_finished_requests_that_wait_for_their_file_are_lag(tmp_path):
    sink = RingSink(tmp_path / "slow", FACTS, Settings(flush_seconds=1000))
    watch = RingWatch(sink.where)
    trace(sink, 1, 5)
    until(watch, lambda now: now.lag_s > 0.1)
    assert (watch.counts().rows, watch.counts().slots_in_use) == (0, 0)
    sink.sync()
    assert (watch.counts().rows, watch.counts().lag_s) == (5, 0)
    sink.close()


def test_a_writer_that_hangs_or_dies_is_seen_and_the_numbers_stay(sink):
    watch = RingWatch(sink.where)
    trace(sink, 1, 5)
    until(watch, lambda now: now.rows == 5)
    os.kill(sink._process.pid, signal.SIGSTOP)
    trace(sink, 2, 4)
    one = until(watch, lambda now: now.lag_s > 0.1)
    assert (one.up, one.slots_in_use, one.rows) == (True, 4, 5)
    assert until(watch, lambda now: now.lag_s > one.lag_s + 0.05).slots_in_use == 4
    os.kill(sink._process.pid, signal.SIGKILL)
    dead = until(watch, lambda now: not now.up)
    assert (dead.tokens, dead.rows) == (9, 5)
    late = RingWatch(sink.where)  # a server that comes when the writer is gone
    assert not late.counts().up
    assert page([[late]])[0]["moescope_writer_up"] == [({}, 0)]
    watch.close()
    assert not watch.counts().up


def test_dropped_rows_are_counted_as_they_are_dropped(sink):
    watch = RingWatch(sink.where)
    os.kill(sink._process.pid, signal.SIGSTOP)
    slots = watch.counts().slots
    trace(sink, 1, slots)
    trace(sink, 2, 11)
    counts = watch.counts()
    assert (counts.tokens, counts.slots_in_use, counts.dropped_rows) == (slots, slots, 11)


def test_stages_of_a_pipeline_are_one_engine(tmp_path):
    sinks = [RingSink(tmp_path / f"{n}", FACTS, Settings(flush_seconds=0.05)) for n in range(2)]
    for sink in sinks:
        trace(sink, 1, 5)
        sink.sync()
    both = joined_counts([RingWatch(sink.where).counts() for sink in sinks])
    assert (both.tokens, both.requests, both.rows, both.files, both.up) == (5, 1, 10, 2, True)
    sinks[0].close()
    again = joined_counts([RingWatch(sinks[1].where).counts()] * 2)
    assert again.slots == 2 * RingWatch(sinks[1].where).counts().slots
    # Replicas have requests of their own.
    two = summed_counts([again, again])
    assert (two.tokens, two.requests, two.rows, two.up) == (10, 2, 20, True)
    assert (two.lag_s, two.slots) == (again.lag_s, 2 * again.slots)
    sinks[1].close()


def test_a_ring_elsewhere_is_an_error_that_says_so(sink, tmp_path):
    with pytest.raises(TracerError, match="this machine"):
        RingWatch(sink.where | {"engine": 2**22 - 1})
    with (tmp_path / "other").open("w+b") as other:
        other.write(bytes(8192))
        other.flush()
        with pytest.raises(TracerError, match="no ring"):
            RingWatch(sink.where | {"fd": other.fileno()})


def test_masks_slots_and_requests(make_plane, mask):
    plane = make_plane()
    samples, _ = page(plane=plane)
    assert samples["moescope_requests_rejected_total"] == [({"reason": r}, 0) for r in REASONS]
    assert "moescope_requests_steered_total" not in samples
    plane.registry.put(mask("calm", 1), "w")
    plane.registry.put(mask("calm", 2), "w")
    plane.registry.put(mask("storm", 3), "w")
    for key, status in [("calm@1", 200), ("calm@1", 200), ("none", 200), (None, 200),
                        ("storm@1+calm@2", 200), ("calm@2", 500), ("calm@2", None)]:  # fmt: skip
        answered(plane.counts, key, status)
    answered(plane.counts, "calm@1", 429, "no_slot")
    samples, _ = page(plane=plane)
    assert samples["moescope_masks"] == [({}, 2)]
    assert samples["moescope_mask_slots"] == [({}, 2)]
    steered = {
        labels["mask"]: value for labels, value in samples["moescope_requests_steered_total"]
    }
    assert steered == {"calm@2": 0, "storm@1": 0, "calm@1": 2, "storm@1+calm@2": 1}
    rejected = {
        labels["reason"]: value for labels, value in samples["moescope_requests_rejected_total"]
    }
    assert rejected == dict.fromkeys(REASONS, 0) | {"no_slot": 1}


def test_deleted_masks_are_forgotten_and_labels_have_a_bound(monkeypatch):
    monkeypatch.setattr(metrics, "MAX_MASKS", 3)
    counts = Counts()
    for key in ("a@1", "b@1", "b@1+a@1", "c@1", "c@1", "a@1"):
        answered(counts, key)
    assert counts.steered == {"a@1": 2, "b@1": 1, "b@1+a@1": 1, OTHER: 2}
    counts.forget(lambda key: not key.startswith("b@"))
    assert counts.steered == {"a@1": 2, OTHER: 2}
    answered(counts, "d@1")
    assert counts.steered["d@1"] == 1


def test_the_page_of_a_server_whose_ring_is_elsewhere_has_the_rest(sink, make_plane, caplog):
    collector = serve_metrics({"rings": [[sink.where | {"engine": 2**22 - 1}]]}, make_plane())
    try:
        text = generate_latest(REGISTRY).decode()
    finally:
        REGISTRY.unregister(collector)
    assert "moescope_masks 0.0" in text
    assert "moescope_tokens_traced" not in text
    assert "nothing of the tracer" in caplog.text


def test_a_server_without_control_plane_has_the_tracers_metrics(sink, monkeypatch, caplog):
    class Client:
        """vLLM's, with one worker that answers as ours do."""

        answer = {  # noqa: RUF012
            "attached": True,
            "live": 0,
            "steered": 0,
            "dropped_rows": 0,
            "silence": None,
            "ring": sink.where,
        }

        @property
        def engine_core(self):
            return self

        async def call_utility_all_async(self, *_):
            return [[self.answer]]

    monkeypatch.setattr(settings, "_given", ServerSettings(masks=None))
    before = set(REGISTRY._collector_to_names)
    trace(sink, 1, 5)
    asyncio.run(ControlPlane().init_state(Client(), None, None))
    [collector] = set(REGISTRY._collector_to_names) - before
    try:
        text = generate_latest(REGISTRY).decode()
    finally:
        REGISTRY.unregister(collector)
    assert "moescope_tokens_traced_total 5.0" in text
    assert "moescope_masks" not in text
    # A model that can't be traced is served all the same.
    Client.answer = {"reason": "it has no experts"}
    asyncio.run(ControlPlane().init_state(Client(), None, None))
    assert set(REGISTRY._collector_to_names) == before
    assert "no experts" in caplog.text


def test_under_multiprocess_mode_it_says_that_there_is_nothing(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    REGISTRY.unregister(serve_metrics({}, None))
    assert "unset PROMETHEUS_MULTIPROC_DIR" in caplog.text
