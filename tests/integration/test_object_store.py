"""Stores in object storage: real servers on loopback, and writers that are killed for real."""

import dataclasses
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from engine_process import ONE_PROCESS, finish, start
from object_servers import GcsServer, S3Server
from typer.testing import CliRunner

from moescope.analysis import open_store, risk_difference
from moescope.analysis.info import store_info
from moescope.analysis.verify import store_notes, verify_store
from moescope.clients.cli import app
from moescope.tracer.assemble import Assembler, Traced
from moescope.tracer.errors import StoreError
from moescope.tracer.format import ModelFacts, MoeShape
from moescope.tracer.object_path import store_path
from moescope.tracer.ring import Rows
from moescope.tracer.store import (
    StoreWriter,
    committed_files,
    living_writers,
    read_manifest,
    read_writers,
)

EXAMPLES = Path(__file__).parents[2] / "examples"
SHAPE = MoeShape((1, 2, 5), num_experts=64, top_k=6)
FACTS = ModelFacts("toy", None, "ToyMoE", "float32", SHAPE, "softmax", False, "test")
CONDITIONS = ("with", "without")


def tables(first, count, tokens=20):
    """The (tokens, requests) of some requests, with routing at random."""
    assembler, rng = Assembler(SHAPE), np.random.default_rng(first)
    for number in range(first, first + count):
        example, condition = f"x{number // 2}", CONDITIONS[number % 2]
        assembler.begin(
            Traced(number, f"r{number}", "run", 5, example_id=example, condition=condition)
        )
        rows = Rows.empty(tokens, SHAPE)
        rows.request[:], rows.position[:] = number, np.arange(tokens)
        rows.token[:] = rng.integers(0, 1 << 30, tokens)
        chosen = rng.random((tokens, 3, 64)).argsort(axis=2)[..., :6]
        rows.experts[:] = chosen.reshape(rows.experts.shape)
        weights = -np.sort(-rng.random((tokens, 3, 6)).astype(np.float16), axis=2)
        rows.weights[:] = weights.reshape(rows.weights.shape)
        assembler.add(rows)
        assembler.finish(number, 0)
    return assembler.take()


def write(place):
    with StoreWriter(place, FACTS, writer="w") as store:
        store.commit(*tables(0, 6))
        store.commit(*tables(6, 4))


@pytest.fixture(scope="module")
def s3():
    server = S3Server()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
    server.close()


@pytest.fixture
def bucket(s3, request):
    name = f"b{abs(hash(request.node.name))}"
    s3.client.create_bucket(Bucket=name)
    yield name
    s3.hook = None


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    path = tmp_path_factory.mktemp("here") / "traces"
    write(path)
    return path


def same_answers(place, here):
    for view in ("tokens", "requests", "activation", "routing"):
        query = f"FROM {view} ORDER BY ALL"
        there = open_store(place).execute(query).fetchall()
        assert there == open_store(here).execute(query).fetchall()
        assert there
    assert read_manifest(place) == read_manifest(here)
    assert read_writers(place) == read_writers(here)
    about = store_info(place)
    assert about == store_info(here)
    assert verify_store(place) == []
    assert store_notes(place) == []


def test_a_store_in_s3_answers_as_one_here(s3, bucket, here):
    place = f"s3://{bucket}/some/traces"
    write(place)
    same_answers(place, here)
    # Nothing but what docs/format.md names: no folders' markers, no locks, nothing aside.
    assert sorted(s3.names(bucket)) == [
        "some/traces/manifest.json",
        "some/traces/requests/w-000001.parquet",
        "some/traces/requests/w-000002.parquet",
        "some/traces/tokens/w-000001.parquet",
        "some/traces/tokens/w-000002.parquet",
        "some/traces/writers/w.json",
    ]


def test_a_whole_bucket_can_be_a_store(bucket, here):
    write(f"s3://{bucket}")
    same_answers(f"s3://{bucket}", here)


def test_a_store_in_gcs_answers_as_one_here(here, monkeypatch):
    server = GcsServer()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    try:
        write("gs://bucket/traces")
        same_answers("gs://bucket/traces", here)
        with pytest.raises(StoreError, match="no bucket 'other'"):
            write("gs://other/traces")
    finally:
        server.close()


def test_rankings_are_the_same(bucket, here):
    place = f"s3://{bucket}/traces"
    write(place)
    given = {"positive": "with", "negative": "without", "segment": "response", "resamples": 100}
    of_here = risk_difference(here, **given)
    assert of_here.num_rows == 3 * 64
    assert risk_difference(place, **given).equals(of_here)
    assert risk_difference(open_store(place), **given).equals(of_here)


def test_commands_take_the_url(bucket, here):
    place = f"s3://{bucket}/traces"
    write(place)
    rank = ("--positive", "with", "--negative", "without", "--no-intervals")
    expert = ("experts", "show", "L01E07")
    for command in (
        ("store", "info", place),
        ("store", "verify", place),
        ("sql", place, "SELECT layer, expert, count FROM activation ORDER BY ALL"),
        ("load", place),
        ("coactivation", place, "--layer", "2"),
        ("request", place, "r3"),
        ("compare", place, "--a", "condition=with", "--b", "condition=without"),
        (*expert, place),
        ("rd", place, *rank),
    ):
        there = CliRunner().invoke(app, command)
        assert there.exit_code == 0, (command, there.output, there.exception)
        of_here = CliRunner().invoke(app, [str(here) if c == place else c for c in command])
        assert there.output.replace(place, str(here)) == of_here.output


def test_an_aggregate_lies_with_the_store(s3, bucket, here):
    place = f"s3://{bucket}/traces"
    write(place)
    made = CliRunner().invoke(app, ["store", "aggregate", place])
    assert made.exit_code == 0, (made.output, made.exception)
    assert "traces/activation.parquet" in s3.names(bucket)
    given = {"positive": "with", "negative": "without", "resamples": 0}
    assert risk_difference(place, **given).equals(risk_difference(here, **given))


def test_writers_that_begin_one_store_at_once_all_write_there(bucket):
    place, together = f"s3://{bucket}/traces", threading.Barrier(6)

    def begin(number):
        together.wait()
        with StoreWriter(place, FACTS) as store:
            store.commit(*tables(10 * number, 2))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(begin, range(6)))
    assert [each.state for each in read_writers(place)] == ["closed"] * 6
    assert open_store(place).execute("SELECT count(*) FROM requests").fetchone() == (12,)
    assert verify_store(place) == []


def test_another_models_store_is_refused_also_when_it_came_meanwhile(bucket):
    place = f"s3://{bucket}/traces"
    other = dataclasses.replace(FACTS, shape=MoeShape((1, 2, 5), 32, 6))
    with StoreWriter(place, FACTS) as store:
        with pytest.raises(StoreError, match=r"another model.*num_experts"):
            StoreWriter(place, other)
        # As if the other had looked for the manifest before we wrote ours.
        manifest = store_path(place) / "manifest.json"
        manifest.write_bytes(
            manifest.read_bytes().replace(b'"num_experts": 64', b'"num_experts": 32')
        )
        with pytest.raises(StoreError, match="another model"):
            store.commit(*tables(0, 2))
    assert committed_files(place) == ([], [])


def test_what_is_no_store_is_left_alone(s3, bucket):
    s3.client.put_object(Bucket=bucket, Key="mine/thesis.tex", Body=b"precious")
    with pytest.raises(StoreError, match="neither empty nor a trace store"):
        StoreWriter(f"s3://{bucket}/mine", FACTS)
    with pytest.raises(StoreError, match="is a file"):
        StoreWriter(f"s3://{bucket}/mine/thesis.tex", FACTS)
    with pytest.raises(StoreError, match="not a trace store"):
        open_store(f"s3://{bucket}/mine")
    assert s3.names(bucket) == {"mine/thesis.tex": 8}


WRITER = textwrap.dedent("""
    import pickle, sys
    from moescope.tracer.store import StoreWriter
    place, facts, pairs = pickle.loads(sys.stdin.buffer.read())
    writer = StoreWriter(place, facts, writer="victim")
    for pair in pairs:
        writer.commit(*pair)
""")


def killed(place, pairs, reached):
    """Run a writer in a process of its own, and kill it when `reached` is set."""
    process = subprocess.Popen([sys.executable, "-c", WRITER], stdin=subprocess.PIPE)
    process.stdin.write(pickle.dumps((place, FACTS, pairs)))
    process.stdin.close()
    assert reached.wait(60)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def test_a_writer_killed_in_mid_upload_leaves_no_half_file(s3, bucket):
    place = f"s3://{bucket}/traces"
    reached, go_on = threading.Event(), threading.Event()

    def hold(environ):
        if "partNumber=2" in environ["QUERY_STRING"]:
            reached.set()
            go_on.wait(60)

    s3.hook = hold
    large = tables(10, 100, tokens=3000)
    killed(place, [tables(0, 2), large], reached)
    go_on.set()
    s3.hook = None
    # The first part had arrived, and is no object.
    assert s3.unfinished(bucket) == ["traces/tokens/victim-000002.parquet"]
    assert sorted(s3.names(bucket)) == [
        "traces/manifest.json",
        "traces/requests/victim-000001.parquet",
        "traces/tokens/victim-000001.parquet",
        "traces/writers/victim.json",
    ]
    assert verify_store(place) == []
    assert open_store(place).execute("SELECT count(*) FROM requests").fetchone() == (2,)
    assert living_writers(place) == ["victim"]  # for five minutes
    with StoreWriter(place, FACTS, writer="next") as store:
        store.commit(*large)
    assert verify_store(place) == []
    assert open_store(place).execute("SELECT count(*) FROM requests").fetchone() == (102,)


def test_a_writer_killed_between_the_two_files_of_a_pair_leaves_one_that_nobody_reads(s3, bucket):
    place, reached, never = f"s3://{bucket}/traces", threading.Event(), threading.Event()

    def hold(environ):
        if "requests/victim-000002" in environ["PATH_INFO"]:
            reached.set()
            never.wait(20)
            return "503 Slow Down"
        return None

    s3.hook = hold
    killed(place, [tables(0, 2), tables(2, 2)], reached)
    s3.hook = None
    never.set()
    assert "traces/tokens/victim-000002.parquet" in s3.names(bucket)
    assert "traces/requests/victim-000002.parquet" not in s3.names(bucket)
    assert verify_store(place) == []
    assert open_store(place).execute("SELECT count(*) FROM requests").fetchone() == (2,)
    [uncommitted, still_open] = store_notes(place)
    assert "tokens/victim-000002.parquet is not committed" in uncommitted
    assert "victim is still open" in still_open
    # A writer that lives can't be told from it, so the next one takes nothing away.
    StoreWriter(place, FACTS).close()
    assert "traces/tokens/victim-000002.parquet" in s3.names(bucket)


@pytest.mark.parametrize("status", ["403 Forbidden", "500 Internal Server Error"])
def test_an_upload_one_of_whose_parts_fails_is_no_object(s3, bucket, status):
    place = f"s3://{bucket}/traces"
    store = StoreWriter(place, FACTS, writer="w", patience_s=0)
    s3.hook = lambda environ: status if "partNumber=2" in environ["QUERY_STRING"] else None
    with pytest.raises(StoreError, match=r"could not write .*tokens/w-000001"):
        store.commit(*tables(0, 100, tokens=3000))
    s3.hook = None
    store.close()
    assert sorted(s3.names(bucket)) == ["traces/manifest.json", "traces/writers/w.json"]


def test_a_writer_waits_for_a_server_that_is_away_for_a_while(s3, bucket, caplog):
    place, failed = f"s3://{bucket}/traces", []

    def away(environ):
        if environ["REQUEST_METHOD"] == "PUT" and len(failed) < 5:
            failed.append(environ["PATH_INFO"])
            return "503 Service Unavailable"
        return None

    with StoreWriter(place, FACTS) as store:
        s3.hook = away
        store.commit(*tables(0, 2))
    # pyarrow tries three times by itself.
    assert len(failed) == 5
    assert "Trying again" in caplog.text
    assert "rows wait in the ring" in caplog.text
    assert verify_store(place) == []
    assert open_store(place).execute("SELECT count(*) FROM tokens").fetchone() == (40,)


def test_one_that_stays_away_is_an_error_that_says_what_is_lost(s3, bucket):
    store = StoreWriter(f"s3://{bucket}/traces", FACTS, patience_s=3)
    store.commit(*tables(0, 2))
    s3.hook = lambda _: "503 Service Unavailable"
    with pytest.raises(StoreError, match=r"could not write .* in \d+ s: .*not written are lost"):
        store.commit(*tables(2, 2))
    s3.hook = None
    store.close()


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_is_not_there():
    place = "s3://no-such-bucket/traces"
    for use in (open_store, store_info, verify_store, lambda place: StoreWriter(place, FACTS)):
        with pytest.raises(StoreError, match=r"no bucket 'no-such-bucket' at http://127.*create"):
            use(place)


def test_credentials_that_are_refused(s3, bucket):
    place = f"s3://{bucket}/traces"
    write(place)
    s3.hook = lambda _: "403 Forbidden"
    for use in (open_store, store_info, verify_store, lambda place: StoreWriter(place, FACTS)):
        with pytest.raises(StoreError, match=r"refuses access.*AWS_ACCESS_KEY_ID"):
            use(place)


def test_a_server_that_is_not_there(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StoreError, match=r"can't reach http://127.0.0.1:1"):
        StoreWriter("s3://bucket/traces", FACTS)


def test_a_network_that_fails_is_not_taken_for_damage(s3, bucket):
    place = f"s3://{bucket}/traces"
    write(place)
    s3.hook = lambda environ: "503 Slow Down" if "/tokens/" in environ["PATH_INFO"] else None
    with pytest.raises(StoreError, match=r"tokens/w-000001.parquet: .*503"):
        verify_store(place)
    with pytest.raises(StoreError, match="can't be read"):
        same_answers(place, place)


def test_damage_is_found(s3, bucket):
    place = f"s3://{bucket}/traces"
    write(place)
    key = "traces/tokens/w-000002.parquet"
    whole = s3.client.get_object(Bucket=bucket, Key=key)["Body"].read()
    s3.client.put_object(Bucket=bucket, Key=key, Body=whole[: len(whole) // 2])
    [problem, counters] = verify_store(place)
    assert (problem.check, problem.file) == ("unreadable", "tokens/w-000002.parquet")
    assert counters.check == "counters"
    s3.client.delete_object(Bucket=bucket, Key=key)
    with pytest.raises(StoreError, match=rf"s3://{bucket}/{key} is missing"):
        committed_files(place)


def test_files_are_plain_parquet(s3, bucket):
    write(f"s3://{bucket}/traces")
    tokens, _ = committed_files(f"s3://{bucket}/traces")
    assert [pq.read_table(file.open_input()).num_rows for file in tokens] == [120, 80]
    sizes = s3.names(bucket)
    assert [file.stat().st_size for file in tokens] == [
        sizes[file.key.partition("/")[2]] for file in tokens
    ]


@pytest.mark.engine
def test_a_job_is_traced_into_s3_as_into_a_folder_and_finished_there(bucket, specimen, tmp_path):
    job, query = (
        tmp_path / "job.jsonl",
        (
            "SELECT example_id, condition, position, token_id, segment, expert_ids, gate_weights "
            "FROM tokens JOIN requests USING (request_id) ORDER BY ALL"
        ),
    )

    def moescope(*arguments):
        command = [sys.executable, "-m", "moescope.clients.cli", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return " ".join(done.stdout.split())

    questions = ("data", "faithfulness", "--format", "squad", EXAMPLES / "questions.json")
    moescope(*questions, "--limit", 5, "--out", job)
    given = ("--model", specimen("qwen3_moe"), "--", "--enforce-eager", "--dtype", "float32")
    rows = []
    for place in (f"s3://{bucket}/traces", tmp_path / "traces"):
        said = moescope("trace", job, "--store", place, *given, "--max-model-len", 1024)
        assert "traced 10 requests" in said
        assert "0 incomplete, 0 rows dropped" in said
        assert verify_store(place) == []
        rows.append(open_store(place).execute(query).fetchall())
    assert rows[0] == rows[1]
    place = f"s3://{bucket}/traces"
    [writer] = read_writers(place)
    assert (writer.state, writer.rows) == ("closed", len(rows[0]))
    # What is done is read from there, and nothing is loaded.
    said = moescope("trace", job, "--store", place, *given, "--max-model-len", 1024)
    assert "traced 0 requests, 0 tokens; 10 done before" in said


@pytest.mark.engine
@pytest.mark.usefixtures("s3")
def test_an_engine_looks_for_the_bucket_before_it_loads_a_model(specimen, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(
        specimen("qwen3_moe"), model, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin*")
    )
    job = {"model": str(model), "options": {}, "prompts": [], "rounds": []}
    given = ONE_PROCESS | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with pytest.raises(AssertionError, match="Cannot find any model weights"):
        finish(start(job, **given))
    with pytest.raises(AssertionError, match="StoreError: there is no bucket 'no-such-bucket'"):
        finish(start(job, **given, MOESCOPE_STORE="s3://no-such-bucket/traces"))
