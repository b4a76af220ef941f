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
        self.waited = False

    def query(self):
        return self.waited

    def synchronize(self):
        self.waited = True


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
    rows, copy = make_rows(1, range(5)), Late()
    for mines, theirs in zip(sink.reserve(5), [rows], strict=True):
        for mine, column in zip(
            sink.ring.columns[mines[1]].columns(), theirs.columns(), strict=True
        ):
            mine[:] = column
    sink.publish(5, copy)
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
