"""The engine's end and the writer process together: real processes, really killed."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from moescope.analysis.verify import store_notes
from moescope.tracer import sink as sink_module
from moescope.tracer.assemble import Traced
from moescope.tracer.errors import StoreError, TracerError
from moescope.tracer.format import Stage
from moescope.tracer.ring import TAIL, Ring
from moescope.tracer.settings import Settings
from moescope.tracer.sink import RingSink
from moescope.tracer.store import StoreWriter, committed_files, read_writers
from moescope.tracer.writer import Drafts, Writer


def begin(sink, number, prompt_tokens=4):
    return sink.send(
        {
            "op": "begin",
            "request": number,
            "request_id": f"r{number}",
            "run": "test",
            "prompt_tokens": prompt_tokens,
        }
    )


def finish(sink, number, lost_rows=0):
    return sink.send({"op": "finish", "request": number, "lost_rows": lost_rows})


def stored(path):
    """{request id: token ids} of a store, and whether each is complete."""
    tokens, requests = committed_files(path)
    rows, complete = {}, {}
    for token_file, request_file in zip(tokens, requests, strict=True):
        for row in pq.read_table(token_file, columns=["request_id", "token_id"]).to_pylist():
            rows.setdefault(row["request_id"], []).append(row["token_id"])
        table = pq.read_table(request_file)
        complete |= dict(
            zip(table["request_id"].to_pylist(), table["complete"].to_pylist(), strict=True)
        )
    return rows, complete


def test_what_is_finished_is_on_disk_after_sync(tmp_path, facts, make_rows):
    sink = RingSink(tmp_path / "s", facts, Settings())
    begin(sink, 1)
    begin(sink, 2)
    sink.write(make_rows(1, range(5)))
    sink.write(make_rows(2, range(8)))
    finish(sink, 1)
    sink.sync()
    assert stored(tmp_path / "s")[0] == {"r1": [1000 + i for i in range(5)]}
    finish(sink, 2)
    sink.close()
    assert stored(tmp_path / "s")[1] == {"r1": True, "r2": True}
    assert [writer.state for writer in read_writers(tmp_path / "s")] == ["closed"]


def test_only_the_chosen_rows_are_written(tmp_path, facts, make_rows):
    sink = RingSink(tmp_path, facts, Settings())
    begin(sink, 1)
    rows = make_rows(1, range(10))
    sink.write(rows[np.arange(0, 5)])
    finish(sink, 1)
    sink.close()
    assert stored(tmp_path)[0] == {"r1": [1000 + i for i in range(5)]}


def test_block_loses_nothing_through_a_tiny_ring(tmp_path, facts, make_rows, monkeypatch):
    monkeypatch.setattr(type(facts.shape), "row_bytes", property(lambda _: 1 << 15))  # 32 rows
    sink = RingSink(tmp_path, facts, Settings(ring_mib=1, file_rows=500))
    for number in range(1, 21):
        begin(sink, number)
        sink.write(make_rows(number, range(100)))  # a step of three times the ring
        finish(sink, number)
    sink.close()
    rows, complete = stored(tmp_path)
    assert rows == {f"r{n}": [1000 * n + i for i in range(100)] for n in range(1, 21)}
    assert all(complete.values())
    assert len(committed_files(tmp_path)[0]) > 1


def test_drop_counts_what_it_loses_and_never_waits(tmp_path, facts, make_rows, monkeypatch):
    monkeypatch.setattr(type(facts.shape), "row_bytes", property(lambda _: 1 << 15))
    sink = RingSink(tmp_path, facts, Settings(ring_mib=1, policy="drop"))
    os.kill(sink._process.pid, signal.SIGSTOP)  # the disk hangs
    begin(sink, 1)
    begin(sink, 2)
    assert sink.write(make_rows(1, range(20)))
    started = time.monotonic()
    assert not sink.write(make_rows(2, range(20)))
    assert time.monotonic() - started < 0.1
    assert sink.dropped_rows == 20
    os.kill(sink._process.pid, signal.SIGCONT)
    finish(sink, 1)
    finish(sink, 2, lost_rows=20)
    sink.close()
    rows, complete = stored(tmp_path)
    assert complete == {"r1": True, "r2": False}
    assert list(rows) == ["r1"]
    [counters] = read_writers(tmp_path)
    assert (counters.dropped_rows, counters.incomplete_requests) == (20, 1)


def test_a_request_that_can_not_even_begin_is_counted(tmp_path, facts):
    sink = RingSink(tmp_path, facts, Settings(policy="drop"))
    os.kill(sink._process.pid, signal.SIGSTOP)
    begun = 0
    while begin(sink, begun + 1):
        begun += 1
    os.kill(sink._process.pid, signal.SIGCONT)
    sink.close()
    [counters] = read_writers(tmp_path)
    assert begun > 1000
    assert counters.dropped_requests == 1


def test_a_dead_writer_stops_a_blocking_engine_with_a_reason(tmp_path, facts):
    sink = RingSink(tmp_path, facts, Settings())
    sink._process.kill()
    sink._process.wait()
    with pytest.raises(TracerError, match="writer died"):
        sink.sync()
    with pytest.raises(TracerError, match="killed"):
        sink.close()


def test_a_store_that_cannot_be_opened_is_an_error_at_the_start(tmp_path, facts):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="neither empty nor a trace store"):
        RingSink(tmp_path, facts, Settings())


def test_a_writer_that_lacks_a_package_is_an_error_at_the_start(tmp_path, facts, monkeypatch):
    """As where moescope was copied without what it needs."""
    (tmp_path / "pyarrow.py").write_text("raise ModuleNotFoundError('no pyarrow here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(TracerError, match=r"could not start.*above"):
        RingSink(tmp_path / "traces", facts, Settings())
    assert not (tmp_path / "traces").exists()


@pytest.mark.parametrize("descendants", [False, True])
def test_an_engine_killed_by_sigkill_leaves_its_finished_requests(
    tmp_path, facts, make_rows, descendants
):
    """With `descendants`: all of them are killed first, as vLLM does at the end of a server."""
    script = textwrap.dedent("""
        import os, pickle, signal, sys, time, psutil
        from pathlib import Path
        from moescope.tracer.ring import HEAD, TAIL
        from moescope.tracer.settings import Settings
        from moescope.tracer.sink import RingSink
        facts, done, running, late = pickle.loads(sys.stdin.buffer.read())
        sink = RingSink(Path(sys.argv[1]), facts, Settings())
        for n, rows in ((1, done), (2, running)):
            sink.send({"op": "begin", "request": n, "request_id": f"r{n}", "run": "x",
                       "prompt_tokens": 4})
            sink.write(rows)
        sink.send({"op": "finish", "request": 1, "lost_rows": 0})
        class OnItsWay:
            def query(self): return False
        sink.send({"op": "begin", "request": 3, "request_id": "r3", "run": "x",
                   "prompt_tokens": 4})
        sink.write(late)
        sink.reserve(2)
        sink.publish(2, OnItsWay())  # a copy that the end overtakes
        sink.send({"op": "finish", "request": 3, "lost_rows": 0})
        for child in psutil.Process().children(recursive=True) if sys.argv[2] else ():
            child.kill()
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    killed = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), "descendants" if descendants else ""],
        input=pickle.dumps(
            (facts, make_rows(1, range(9)), make_rows(2, range(7)), make_rows(3, range(6)))
        ),
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while read_writers(tmp_path)[0].state != "closed":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    rows, complete = stored(tmp_path)
    assert rows == {"r1": [1000 + i for i in range(9)], "r3": [3000 + i for i in range(6)]}
    assert complete == {"r1": True, "r3": False}
    [counters] = read_writers(tmp_path)
    assert (counters.dropped_rows, counters.unfinished_requests) == (2, 1)
    assert any("1 requests were running" in note for note in store_notes(tmp_path))


def test_rows_that_come_before_the_writer_has_looked_count_once(tmp_path, facts, make_rows):
    """The engine may write as soon as it is told that the writer runs."""
    ring, rows = Ring.create(facts.shape, 64), make_rows(1, range(5))
    traced = {"request_id": "r1", "run": "test", "prompt_tokens": 4}
    ring.send({"op": "begin", "request": 1} | traced)
    for source, target in ring.reserve(5):
        for mine, theirs in zip(ring.columns[target].columns(), rows.columns(), strict=True):
            mine[:] = theirs[source]
    ring.publish(5)
    with StoreWriter(tmp_path, facts) as store:
        writer = Writer(ring, store, facts.shape, Settings())
        ring.send({"op": "finish", "request": 1, "lost_rows": 0, "rows_before": 10})
        writer.drain()
        assert writer.assembler.num_open == 1  # five of its rows are still to come


def test_finished_requests_reach_the_disk_without_being_asked(tmp_path, facts, make_rows):
    sink = RingSink(tmp_path, facts, Settings(flush_seconds=0.2))
    begin(sink, 1)
    sink.write(make_rows(1, range(9)))
    finish(sink, 1)
    deadline = time.monotonic() + 10
    while not committed_files(tmp_path)[0]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert sink._ring.word(TAIL) == 9
    sink.close()


def test_a_global_mask_counts_from_the_row_where_it_came(tmp_path, facts, make_rows):
    sink = RingSink(tmp_path, facts, Settings())
    begin(sink, 1)
    os.kill(sink._process.pid, signal.SIGSTOP)  # so that all of it is drained at once
    sink.write(make_rows(1, range(3)))
    sink.send({"op": "mask", "mask": "a"})
    sink.write(make_rows(1, range(3, 7)))
    sink.send({"op": "mask", "mask": None})
    sink.write(make_rows(1, range(7, 9)))
    finish(sink, 1)
    os.kill(sink._process.pid, signal.SIGCONT)
    sink.close()
    [file] = committed_files(tmp_path)[0]
    assert pq.read_table(file)["mask"].to_pylist() == [None] * 3 + ["a"] * 4 + [None] * 2


def speculate(sink, number, prompt_tokens, **speculation):
    message = {"op": "begin", "request": number, "request_id": f"r{number}", "run": "test"}
    given = (speculation.get("max_tokens"), speculation.get("min_tokens", 0))
    stop_ids = speculation.get("stop_ids", [])
    more = {"prompt_tokens": prompt_tokens, "stop_ids": stop_ids, "speculation": given}
    return sink.send(message | more)


def test_drafts_in_vain_leave_no_rows(tmp_path, facts, make_rows):
    sink = RingSink(tmp_path, facts, Settings())
    speculate(sink, 1, 3)
    sink.write(make_rows(1, range(3)))
    for start, rejected in ((3, 2), (5, 3), (6, 0), (10, 3)):
        rows = make_rows(1, range(start, start + 4))
        rows.position[4 - rejected :] = -1
        sink.write(rows)
    finish(sink, 1)
    sink.close()
    rows, complete = stored(tmp_path)
    assert rows == {"r1": [1000 + i for i in range(11)]}
    assert complete == {"r1": True}


@pytest.mark.parametrize(
    ("speculation", "length"),
    [
        ({}, 12),
        ({"max_tokens": 6}, 8),  # 3 of the prompt, and 5 computed of 6 given
        ({"stop_ids": [1006]}, 6),
        ({"stop_ids": [1006], "max_tokens": 6}, 6),
        ({"stop_ids": [1006, 1010], "min_tokens": 5}, 10),  # 1006 is the fourth
        ({"stop_ids": [1002]}, 12),  # in the prompt
    ],
)
def test_what_was_accepted_behind_the_end_has_no_row(make_rows, speculation, length):
    drafts = Drafts()
    traced = Traced(1, "r1", "run", 3, stop_ids=speculation.get("stop_ids", []))
    drafts.begin(traced, speculation.get("max_tokens"), speculation.get("min_tokens", 0))
    kept = []
    for start in (0, 4, 8):
        kept += drafts.leave_out(make_rows(1, range(start, start + 4))).position.tolist()
    assert kept == list(range(length))
    drafts.finish(1)
    assert len(drafts.leave_out(make_rows(1, range(12)))) == 12


def test_a_pipeline_stage_passes_its_layers_through_the_ring(tmp_path, facts, shape, make_rows):
    stage = Stage(1, 2, shape.layers[:1])
    sink = RingSink(tmp_path, facts, Settings(), stage=stage)
    begin(sink, 1)
    rows = make_rows(1, range(5))
    routes = stage.of(shape).num_routes
    rows.experts, rows.weights = rows.experts[:, :routes], rows.weights[:, :routes]
    sink.write(rows)
    finish(sink, 1)
    sink.close()
    [file] = committed_files(tmp_path)[0]
    assert file.name.startswith("p1of2-")
    assert pq.read_table(file)["expert_ids"].to_pylist() == rows.experts.tolist()


def kill_writer(sink):
    """SIGKILL to the writer process, and wait for its end."""
    sink._process.kill()
    sink._process.wait()


def test_a_serving_engine_starts_another_writer(tmp_path, facts, make_rows):
    """What the dead one had on disk stays, what lay in the ring comes, the rest is counted."""
    sink = RingSink(tmp_path, facts, Settings(policy="drop"))
    messages = [f"r{number}" for number in range(6)]
    for number in range(1, 6):
        assert begin(sink, number)
    sink.write(make_rows(1, range(6)))
    finish(sink, 1)
    sink.sync()
    # Of request 2 the first rows are taken and not on disk; of 3 all are, finished but not written.
    sink.write(make_rows(2, range(4)))
    sink.write(make_rows(3, range(7)))
    while sink.ring.word(TAIL) < 17:
        time.sleep(0.01)
    kill_writer(sink)
    assert sink.has_stopped
    finish(sink, 3)
    sink.write(make_rows(2, range(4, 9)))
    sink.write(make_rows(4, range(5)))  # all in the ring, but its begin went with the writer
    finish(sink, 4)
    begin(sink, 6)
    sink.write(make_rows(6, range(8)))  # all in the ring, its begin too
    finish(sink, 6)
    live = [{"op": "begin", "request": n, "request_id": messages[n], "run": "test",
             "prompt_tokens": 4} for n in (2, 5)]  # fmt: skip
    assert sink.resume(live, 6)
    sink.write(make_rows(5, range(5)))
    finish(sink, 2)
    finish(sink, 5)
    sink.close()
    rows, complete = stored(tmp_path)
    assert complete == {"r1": True, "r2": False, "r5": True, "r6": True}
    assert rows["r2"] == [2000 + i for i in range(4, 9)]
    assert rows["r6"] == [6000 + i for i in range(8)]
    first, second = sorted(read_writers(tmp_path), key=lambda each: each.state, reverse=True)
    assert (first.state, second.state) == ("killed", "closed")
    assert (first.rows, first.dropped_rows, first.unfinished_requests) == (6, 11, 2)
    assert (second.rows, second.dropped_rows, second.unfinished_requests) == (18, 5, 0)


def test_every_row_is_stored_or_counted_however_often_writers_die(
    tmp_path, facts, make_rows, monkeypatch
):
    """Requests come and go meanwhile, and the global mask changes."""
    monkeypatch.setattr(sink_module, "_LOOK_EVERY_S", 0.1)  # several deaths in two seconds
    sink = RingSink(tmp_path, facts, Settings(policy="drop", flush_seconds=0.05, file_rows=200))
    rng, live, written, masks = np.random.default_rng(0), {}, {}, {}
    begins, number, deaths, mask = {}, 0, 0, None
    for step in range(600):
        if step % 60 == 59:
            mask = f"m{step}@1"
            sink.send({"op": "mask", "mask": mask})
        while len(live) < 5:
            number += 1
            assert begin(sink, number)
            begins[number] = {"op": "begin", "request": number, "request_id": f"r{number}"}
            begins[number] |= {"run": "test", "prompt_tokens": 4}
            live[number] = written[number] = 0
        for request in list(live):
            count = int(rng.integers(1, 5))
            assert sink.write(make_rows(request, range(live[request], live[request] + count)))
            masks |= {
                1000 * request + at: mask for at in range(live[request], live[request] + count)
            }
            live[request] += count
            if rng.random() < 0.1:
                written[request] = live.pop(request)
                finish(sink, request)
        time.sleep(0.002)
        if step % 97 == 50:
            kill_writer(sink)
        if sink.wants_another:
            deaths += 1
            assert sink.resume([begins[request] for request in live], number)
    for request in list(live):
        written[request] = live.pop(request)
        finish(sink, request)
    if sink.has_stopped:
        assert sink.resume([], number)
    sink.close()
    rows, complete = stored(tmp_path)
    writers = read_writers(tmp_path)
    assert deaths >= 2
    assert [each.state for each in writers].count("closed") == 1
    total = sum(written.values())
    assert sum(each.rows + each.dropped_rows for each in writers) == total
    lost = sum(each.unfinished_requests for each in writers)
    assert len(rows) + lost == number
    assert sum(complete.values()) > 0
    for request, whole in complete.items():
        if whole:
            assert len(rows[request]) == written[int(request[1:])]
    for file in committed_files(tmp_path)[0]:
        for row in pq.read_table(file, columns=["token_id", "mask"]).to_pylist():
            assert row["mask"] == masks[row["token_id"]]
