"""Who had a request, and the wait for a writer that outlives its engine."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from moescope.clients.ray_ledger import Ledger, cause, wait_for_writers

WRITER = """
import sys, time
from pathlib import Path
from moescope.tracer.format import ModelFacts, MoeShape
from moescope.tracer.store import StoreWriter
shape = MoeShape((1,), 4, 2)
facts = ModelFacts("m", None, "a", "float32", shape, "softmax", True, "v")
writer = StoreWriter(Path(sys.argv[1]), facts, writer=sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
writer.close()
"""


@pytest.fixture
def ledger():
    """Two replicas of ten requests, with a writer each."""
    ledger = Ledger(10)
    for actor in "ab":
        number, before, _ = ledger.begin(actor, "host", 100)
        assert before == 0
        ledger.ready(number, [f"writer-{actor}"])
    return ledger


def test_a_request_that_nobody_had_is_free(ledger):
    assert ledger.claim(0, [0, 1, 2]) == []
    assert ledger.claim(1, [3, 4]) == []


def test_a_repeated_request_names_the_writers_of_the_one_before(ledger):
    ledger.claim(0, [0, 1, 2])
    assert ledger.claim(0, [0, 1, 2]) == []  # asked again, by the same process
    number, before, last = ledger.begin("a", "host", 101)
    assert (number, before) == (2, 1)
    assert "killed" in last
    ledger.ready(number, ["writer-c"])
    assert ledger.claim(number, [1, 2, 3]) == ["writer-a"]
    assert ledger.claim(number, [1, 2, 3]) == []


def test_requests_and_tokens_count_once(ledger):
    ledger.done([0, 1], [5, 6])
    ledger.done([1, 2], [6, 7])
    state = ledger.state()
    assert (state["done"], state["tokens"]) == (3, 18)


def test_the_first_fatal_error_stays(ledger):
    ledger.fatal("InputError", "the cause")
    ledger.fatal("TracerError", "what followed")
    assert ledger.state()["fatal"] == ("InputError", "the cause")


def test_a_process_that_ended_itself_says_why(ledger):
    ledger.failed(0, "OutOfMemoryError: 3 GiB")
    assert cause(ledger.state()["replicas"][0]) == "OutOfMemoryError: 3 GiB"
    assert "killed" in cause(ledger.state()["replicas"][1])


def test_waiting_ends_with_the_writers_that_were_asked_for(tmp_path):
    store = tmp_path / "traces"
    writers = {name: _start(store, name) for name in ("one", "other")}
    try:
        assert wait_for_writers(store, {"one"}, 0.0) == ["one"]
        assert sorted(wait_for_writers(store, None, 0.0)) == ["one", "other"]
        closing = threading.Timer(0.3, lambda: writers["one"].communicate("close\n"))
        closing.start()
        started = time.monotonic()
        assert wait_for_writers(store, {"one"}, 60.0) == []
        assert time.monotonic() - started >= 0.2  # and not before it closed
        closing.join()
        os.kill(writers["other"].pid, signal.SIGKILL)
        writers["other"].wait()
        assert wait_for_writers(store, None, 60.0) == []
    finally:
        for process in writers.values():
            process.kill()
            process.communicate()


def _start(store, name):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(store), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process
