"""`moescope trace` as its users run it: a real process, killed for real, and run again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moescope.analysis import open_store
from moescope.analysis.verify import verify_store
from moescope.tracer.store import read_writers

pytestmark = pytest.mark.engine

EXAMPLES = Path(__file__).parents[2] / "examples"
ENGINE = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "1024"]


def start(*arguments, **environment):
    command = [sys.executable, "-m", "moescope.clients.cli", *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*arguments, code=0, **environment):
    process = start(*arguments, **environment)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def keyed(store):
    """Rows by (example, condition) with what must be equal in two runs of a job."""
    rows = open_store(store).execute(
        "SELECT example_id, condition, position, token_id, segment, expert_ids, gate_weights "
        "FROM tokens JOIN requests USING (request_id) ORDER BY ALL"
    )
    return rows.fetchall()


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    path = tmp_path_factory.mktemp("job") / "job.jsonl"
    run("data", "faithfulness", "--format", "squad", EXAMPLES / "questions.json", "--out", path)
    return path


@pytest.fixture(scope="module")
def whole(job, specimen, tmp_path_factory):
    """The store of an uninterrupted run."""
    store = tmp_path_factory.mktemp("whole") / "traces"
    output = run(
        *("trace", job, "--model", specimen("qwen3_moe"), "--store", store, "--", *ENGINE),
    )
    assert "traced 120 requests" in output.replace("\n", " ")
    return store


def test_every_line_is_traced_whole_with_its_segments(whole):
    assert verify_store(whole) == []
    connection = open_store(whole)
    assert connection.execute(
        "SELECT condition, count(*), count(*) FILTER (complete) FROM requests GROUP BY 1 ORDER BY 1"
    ).fetchall() == [("with_doc", 60, 60), ("without_doc", 60, 60)]
    # Teacher forcing: the same question and answer, token for token, on both sides.
    both = connection.execute(
        "SELECT example_id, segment, list(token_id ORDER BY position) AS tokens, condition "
        "FROM tokens JOIN requests USING (request_id) "
        "WHERE segment IN ('question', 'response') GROUP BY ALL ORDER BY 1, 2, 4"
    ).fetchall()
    assert len(both) == 60 * 2 * 2
    for one, other in zip(both[::2], both[1::2], strict=True):
        assert one[:3] == other[:3]


def test_running_it_again_does_nothing(whole, job, specimen):
    before = keyed(whole)
    output = run("trace", job, "--model", specimen("qwen3_moe"), "--store", whole, "--", *ENGINE)
    assert "120 done before" in output.replace("\n", " ")
    assert keyed(whole) == before


def test_a_killed_job_is_finished_by_running_it_again(whole, job, specimen, tmp_path):
    arguments = (
        *("trace", job, "--model", specimen("qwen3_moe"), "--store", tmp_path / "s", "--"),
        # Hundreds of steps, so that it is killed in the middle also on a busy machine.
        *(*ENGINE, "--max-num-seqs", "2", "--max-num-batched-tokens", "16"),
    )
    settings = {"MOESCOPE_FLUSH_SECONDS": "0.1"}
    process = start(*arguments, **settings)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "s").glob("requests/*.parquet")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # The writer outlives the job for a moment, and ends by itself.
    while any(writer.state == "open" for writer in read_writers(tmp_path / "s")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert verify_store(tmp_path / "s") == []
    done = len(keyed_requests(tmp_path / "s"))
    assert 0 < done < 120
    output = run(*arguments, **settings).replace("\n", " ")
    assert f"{done} done before" in output
    assert verify_store(tmp_path / "s") == []
    assert_equal_rows(keyed(tmp_path / "s"), keyed(whole))


def keyed_requests(store):
    return open_store(store).execute("SELECT example_id, condition FROM requests").fetchall()


def assert_equal_rows(got, expected):
    assert [row[:5] for row in got] == [row[:5] for row in expected]
    differ = sum(
        sorted(one[5]) != sorted(other[5]) for one, other in zip(got, expected, strict=True)
    )
    # Another batch size is another order of float sums: near-ties may fall the other way.
    assert differ <= 0.001 * len(expected)
    np.testing.assert_allclose([r[6] for r in got], [r[6] for r in expected], atol=2e-3)


def test_a_bad_line_is_named_before_anything_is_loaded(tmp_path):
    job = tmp_path / "job.jsonl"
    job.write_text('{"example_id": "a", "condition": "b", "prompt": "x", "respnse": "y"}\n')
    started = time.monotonic()
    output = run("trace", job, "--model", "nowhere", "--store", tmp_path / "s", code=2)
    assert time.monotonic() - started < 10
    assert "line 1" in output
    assert "respnse" in output
    assert "Traceback" not in output
    assert not (tmp_path / "s").exists()


def test_too_long_a_line_is_named_and_nothing_is_written(tmp_path, job, specimen):
    options = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "64")
    model = specimen("qwen3_moe")
    output = run(
        *("trace", job, "--model", model, "--store", tmp_path / "s", "--", *options), code=2
    )
    assert "line " in output
    assert "--max-model-len" in output
    assert not (tmp_path / "s").exists()


def test_replicas_of_one_process_are_refused_and_nothing_is_written(tmp_path, job, specimen):
    output = run(
        *("trace", job, "--model", specimen("qwen3_moe"), "--store", tmp_path / "traces", "--"),
        *("--data-parallel-size", "2"),
        code=2,
    )
    assert "--data-parallel-size 2" in output
    assert "--ray local --replicas 2" in " ".join(output.split())
    assert not (tmp_path / "traces").exists()


def test_another_text_under_the_same_name_is_refused(whole, job, specimen, tmp_path):
    changed = tmp_path / "job.jsonl"
    text = job.read_text().splitlines()
    changed.write_text(text[0].replace("?", " then?") + "\n")
    output = run(
        *("trace", changed, "--model", specimen("qwen3_moe"), "--store", whole, "--", *ENGINE),
        code=2,
    )
    assert "holds another text" in output.replace("\n", " ")


def test_free_generation_counts_to_the_response(tmp_path, specimen):
    job = tmp_path / "job.jsonl"
    job.write_text(
        '{"example_id": "a", "condition": "free", "messages": [{"role": "user", "content": '
        '"Where is the lamp?"}], "generate": {"max_tokens": 9, "temperature": 0, '
        '"ignore_eos": true}}\n'
    )
    model = specimen("qwen3_moe")
    run("trace", job, "--model", model, "--store", tmp_path / "s", "--", *ENGINE)
    counts = dict(
        open_store(tmp_path / "s")
        .execute("SELECT segment, count(*) FROM tokens GROUP BY 1")
        .fetchall()
    )
    assert counts["response"] == 8  # the ninth was sampled and never computed
    assert counts["question"] > 3
    assert counts["template"] > 0
