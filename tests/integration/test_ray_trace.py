"""A job on a local Ray cluster, by two engines: killed in the middle, and the store is the same."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moescope.analysis import open_store, risk_difference
from moescope.analysis.verify import verify_store
from moescope.tracer.store import committed_files, read_writers

pytest.importorskip("ray")
pytestmark = [pytest.mark.engine, pytest.mark.fleet]

# One request at a time, and so the same sums wherever it runs: rows are compared bit for bit.
ENGINE = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "1"]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "MOESCOPE_FLUSH_SECONDS": "0.5",
    "PYTHONUNBUFFERED": "1",
}
EXAMPLES = 24
LIMIT_S = 300


class Command:
    """`moescope …` as a process, with what it has said so far."""

    def __init__(self, *arguments, **environment):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moescope.clients.cli", *map(str, arguments)],
            env=os.environ | ENVIRONMENT | {"COLUMNS": "200"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout))
        self._reader.start()

    @property
    def output(self):
        return "".join(self.lines)

    def wait_until(self, there):
        deadline = time.monotonic() + LIMIT_S
        while not (found := there()):
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.01)
        return found

    def finish(self, code=0):
        assert self.process.wait(LIMIT_S) == code, self.output
        self._reader.join()
        return self.output


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Half of it generates, so that it takes a while; the other half is given."""
    path = tmp_path_factory.mktemp("job") / "job.jsonl"
    lines = []
    for number in range(EXAMPLES):
        document = {"segment": "document", "text": f"The lamp {number} is in the hall. "}
        question = {"segment": "question", "text": f"Where is lamp {number}?"}
        for condition, parts in (("with_doc", [document, question]), ("without_doc", [question])):
            line = {"example_id": f"e{number}", "condition": condition, "prompt": parts}
            if number % 2:
                line["response"] = "In the hall."
            else:
                line["generate"] = {"max_tokens": 100, "temperature": 0, "ignore_eos": True}
            lines.append(json.dumps(line))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def whole(job, specimen, tmp_path_factory):
    """The store of one engine."""
    store = tmp_path_factory.mktemp("whole") / "traces"
    Command(
        "trace", job, "--model", specimen("qwen3_moe"), "--store", store, "--", *ENGINE
    ).finish()
    return store


@pytest.fixture(scope="module")
def survived(job, specimen, tmp_path_factory):
    """The store of two replicas, both of which died on the way, and what the command said."""
    store = tmp_path_factory.mktemp("survived") / "traces"
    command = Command(
        *("trace", job, "--model", specimen("qwen3_moe"), "--store", store),
        *("--ray", "local", "--replicas", "2", "--", *ENGINE),
    )
    command.wait_until(lambda: len(replicas(command)) == 2)
    first, second = replicas(command)
    writers = writers_of(store)
    # One is killed, and its writer goes on by itself.
    command.wait_until(lambda: files_of(store, writers[first].name))
    os.kill(first, signal.SIGKILL)
    # The other one's machine is lost: the writer, too.
    command.wait_until(lambda: len(files_of(store, writers[second].name)) > 1)
    os.kill(writers[second].pid, signal.SIGKILL)
    os.kill(second, signal.SIGKILL)
    return store, command.finish(), [writers[pid].name for pid in (first, second)]


class Writer:
    def __init__(self, pid, name):
        self.pid, self.name = pid, name


def replicas(command):
    return [int(pid) for pid in re.findall(r"replica \d of 2: process (\d+)", command.output)]


def writers_of(store):
    """{process id of an engine: its writer}, as the kernel knows it."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode().split("\0")
            if "moescope.tracer.writer" not in command or str(store) not in command[3]:
                continue
            watched = (process / "fdinfo" / str(json.loads(command[3])["engine"])).read_text()
            targets = [handle.readlink() for handle in (process / "fd").iterdir()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        engine = int(re.search(r"^Pid:\s*(\d+)", watched, re.MULTILINE)[1])
        name = next(target.stem for target in targets if target.suffix == ".lock")
        found[engine] = Writer(int(process.name), name)
    return found


def files_of(store, writer):
    return list(store.glob(f"requests/{writer}-*.parquet"))


def rows(store):
    return (
        open_store(store)
        .execute(
            "SELECT run, example_id, condition, spans, prompt_tokens, complete, position, "
            "token_id, segment, expert_ids, gate_weights "
            "FROM tokens JOIN requests USING (request_id) "
            "ORDER BY example_id, condition, position"
        )
        .fetchall()
    )


def test_nothing_is_lost_or_doubled_when_replicas_die(survived, whole):
    store, output, _ = survived
    assert output.count("takes the place of") >= 2
    assert f"traced {2 * EXAMPLES} requests" in output
    assert verify_store(store) == []
    requests = open_store(store).execute("SELECT example_id, condition FROM requests").fetchall()
    assert len(requests) == len(set(requests)) == 2 * EXAMPLES
    assert rows(store) == rows(whole)


def test_what_the_dead_had_committed_is_kept(survived):
    store, _, (killed, lost) = survived
    writers = {writer.writer: writer for writer in read_writers(store)}
    assert writers[killed].state == "closed"
    assert writers[lost].state == "killed"
    assert writers[killed].requests > 0
    assert writers[lost].requests > 0
    others = [writer for name, writer in writers.items() if name not in (killed, lost)]
    assert sum(writer.requests for writer in others) > 0
    assert sum(writer.requests for writer in writers.values()) == 2 * EXAMPLES


def test_the_terminal_shows_our_own_words(survived):
    _, output, _ = survived
    assert "Traceback" not in output
    assert "(MapWorker" not in output
    assert not re.search(r"\b(WARNING|ERROR)\b", output)


def test_the_ranking_counted_by_a_cluster_is_the_same(survived):
    from moescope.analysis.ray_counts import RayCounts
    from moescope.clients.ray_cluster import ray_cluster

    store, _, _ = survived
    assert len(committed_files(store)[0]) > 3
    sides = {"positive": "with_doc", "negative": "without_doc"}
    with ray_cluster("local") as ray:
        for settings in (
            {"gate_mass": True, "length_match": True},
            {"estimator": "token", "segment": "all"},
            {"lead": 1, "positions": "first:3", "segment": "response"},
        ):
            here = risk_difference(store, **sides, **settings)
            there = risk_difference(
                store, **sides, **settings, counting=lambda files: RayCounts(ray, store, files)
            )
            assert here.equals(there, check_metadata=True)


def test_an_error_of_a_replica_is_told_as_here(tmp_path, job, specimen):
    output = Command(
        *("trace", job, "--model", specimen("qwen3_moe"), "--store", tmp_path / "s"),
        *("--ray", "local", "--replicas", "1", "--", *ENGINE, "--max-model-len", "64"),
    ).finish(code=2)
    assert "error: line 1: needs " in output
    assert "--max-model-len" in output
    assert "Traceback" not in output
    assert not (tmp_path / "s").exists()


def test_bad_options_are_named_before_anything_is_loaded(tmp_path, job):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text("raise ImportError('no such module')\n")
    for options, environment, said in (
        (["--replicas", "2"], {}, "--replicas 2 goes with --ray"),
        (["--ray", "local"], {"PYTHONPATH": str(tmp_path)}, "pip install 'moescope[ray]'"),
    ):
        command = Command(
            *("trace", job, "--model", "nowhere", "--store", tmp_path / "s", *options),
            **environment,
        )
        assert said in command.finish(code=2)
    assert not (tmp_path / "s").exists()
