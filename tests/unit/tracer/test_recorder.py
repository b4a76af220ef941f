"""The recorder on the CPU; its work in engines is in tests/integration."""

import time

import numpy as np
import pytest
import torch

from moescope.tracer.recorder import Recorder
from moescope.tracer.request import TraceRequest
from moescope.tracer.settings import Settings
from moescope.tracer.sink import RingSink
from moescope.tracer.store import committed_files


class Late:
    """The end of a copy that nobody has waited for yet."""

    def __init__(self):
        self.arrived = self.waited = False

    def query(self):
        return self.arrived

    def synchronize(self):
        self.arrived = self.waited = True


def publish_late(sink, rows):
    """Put rows into the ring whose copy is under way; returns its end."""
    [(_, target)] = sink.reserve(len(rows))
    for mine, column in zip(sink.ring.columns[target].columns(), rows.columns(), strict=True):
        mine[:] = column
    copy = Late()
    sink.publish(len(rows), copy)
    return copy


def test_steps_of_others_let_the_last_rows_go(tmp_path, facts, make_rows):
    """A server that is never idle, and traces one request."""
    recorder = Recorder(facts, 64, torch.device("cpu"))
    sink = RingSink(tmp_path, facts, Settings(flush_seconds=0.1))
    recorder.attach(sink)
    recorder.silent_layers = []
    recorder.begin("a", TraceRequest(), 4, stop_ids=[])
    copy = publish_late(sink, make_rows(1, range(5)))
    recorder.finish({"a"})
    copy.arrived = True
    recorder.end_step(["b"], np.ones(1, np.int32), torch.zeros(1), torch.zeros(1))
    deadline = time.monotonic() + 20
    while not committed_files(tmp_path)[0] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(committed_files(tmp_path)[0]) == 1
    assert not copy.waited
    recorder.detach()


@pytest.mark.parametrize("another_runs", [False, True])
def test_at_rest_the_last_rows_are_let_go(tmp_path, facts, make_rows, another_runs):
    """An idle server has no next step that would see that the copy is done."""
    recorder = Recorder(facts, 64, torch.device("cpu"))
    sink = RingSink(tmp_path, facts, Settings(flush_seconds=0.1))
    recorder.attach(sink)
    recorder.silent_layers = []
    recorder.begin("a", TraceRequest(), 4, stop_ids=[])
    if another_runs:
        recorder.begin("b", TraceRequest(), 4, stop_ids=[])
    copy = publish_late(sink, make_rows(1, range(5)))
    recorder.finish({"a"})
    recorder.rest()
    assert copy.waited == (not another_runs)  # while others run, the host must not wait
    deadline = time.monotonic() + (0.5 if another_runs else 20)
    while not committed_files(tmp_path)[0] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(committed_files(tmp_path)[0]) == int(not another_runs)
    recorder.finish({"b"})
    recorder.detach()
    assert np.array([len(files) for files in committed_files(tmp_path)]).min() >= 1
