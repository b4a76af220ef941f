import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moescope.tracer.assemble import Assembler, Traced
from moescope.tracer.errors import StoreError
from moescope.tracer.format import MoeShape, Stage, tokens_schema
from moescope.tracer.store import (
    StoreWriter,
    committed_files,
    read_manifest,
    read_writers,
    stage_of,
)


@pytest.fixture
def tables(shape, make_rows):
    def make(*numbers):
        assembler = Assembler(shape)
        for number in numbers:
            assembler.begin(Traced(number, f"r{number}", "run", 3))
            assembler.add(make_rows(number, range(5)))
            assembler.finish(number, 0)
        return assembler.take()

    return make


def test_what_is_committed_is_read_back_by_plain_parquet(tmp_path, facts, tables):
    with StoreWriter(tmp_path / "s", facts) as store:
        store.commit(*tables(1, 2))
        store.commit(*tables(3))
    assert read_manifest(tmp_path / "s") == facts
    tokens, requests = committed_files(tmp_path / "s")
    assert [pq.read_table(file).num_rows for file in tokens] == [10, 5]
    assert pa.concat_tables([pq.read_table(f) for f in requests])["request_id"].to_pylist() == [
        "r1",
        "r2",
        "r3",
    ]
    [counters] = read_writers(tmp_path / "s")
    assert (counters.state, counters.files, counters.rows, counters.requests) == (
        "closed",
        2,
        15,
        3,
    )
    assert counters.bytes == sum(file.stat().st_size for file in tokens + requests)
    assert not list((tmp_path / "s").rglob(".*"))


def test_two_writers_share_a_store_and_leave_each_other_alone(tmp_path, facts, tables):
    with StoreWriter(tmp_path, facts) as one, StoreWriter(tmp_path, facts) as two:
        one.commit(*tables(1))
        two.commit(*tables(2))
        with StoreWriter(tmp_path, facts) as three:
            three.commit(*tables(3))
        assert sorted(w.state for w in read_writers(tmp_path)) == ["closed", "open", "open"]
        one.commit(*tables(4))
    assert len(committed_files(tmp_path)[0]) == 4


def test_writers_that_begin_one_store_at_once_all_write_there(tmp_path, facts):
    with ThreadPoolExecutor(8) as pool:
        for attempt in range(40):
            path = tmp_path / f"s{attempt}"
            together = Barrier(8)

            def begin(path=path, together=together):
                together.wait()
                StoreWriter(path, facts).close()

            for each in [pool.submit(begin) for _ in range(8)]:
                each.result()
            assert [each.state for each in read_writers(path)] == ["closed"] * 8
            assert not list(path.rglob(".*"))


def test_another_model_or_another_folder_is_refused(tmp_path, facts):
    StoreWriter(tmp_path / "s", facts).close()
    other = dataclasses.replace(facts, shape=MoeShape((1, 2), 8, 2))
    with pytest.raises(StoreError, match=r"another model.*moe_layers"):
        StoreWriter(tmp_path / "s", other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(StoreError, match="neither empty nor a trace store"):
        StoreWriter(tmp_path / "mine", facts)
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        StoreWriter(tmp_path / "file", facts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "not a trace store"),
        ("{", "damaged"),
        ('{"format_version": 99}', "format version 99"),
        ('{"format_version": 1, "model": {}}', "lacks"),
    ],
)
def test_an_unreadable_manifest_says_what_to_do(tmp_path, text, message):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match=message):
        read_manifest(tmp_path)


def test_a_killed_writer_is_mended_by_the_next(tmp_path, facts, tables):
    """A process really dies between the tokens file and its twin."""
    StoreWriter(tmp_path, facts).close()
    script = textwrap.dedent("""
        import os, pickle, signal, sys
        from pathlib import Path
        import moescope.tracer.store as store
        facts, first, second = pickle.loads(sys.stdin.buffer.read())
        writer = store.StoreWriter(Path(sys.argv[1]), facts, writer="victim")
        writer.commit(*first)
        write = writer._write
        def die(folder, name, table):
            if folder == "requests":
                os.kill(os.getpid(), signal.SIGKILL)
            return write(folder, name, table)
        writer._write = die
        writer.commit(*second)
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        input=pickle.dumps((facts, tables(1, 2), tables(3))),
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    orphan = tmp_path / "tokens" / "victim-000002.parquet"
    assert orphan.exists()
    assert [file.name for file in committed_files(tmp_path)[0]] == ["victim-000001.parquet"]
    # The counters of the crash may be behind; the next writer counts anew.
    counters_file = tmp_path / "writers" / "victim.json"
    counters = json.loads(counters_file.read_text())
    counters_file.write_text(json.dumps(counters | {"rows": 0, "files": 0}))

    StoreWriter(tmp_path, facts).close()
    assert not orphan.exists()
    victim = next(w for w in read_writers(tmp_path) if w.writer == "victim")
    assert (victim.state, victim.files, victim.rows, victim.requests) == ("killed", 1, 10, 2)
    assert not list((tmp_path / "writers").glob("*.lock"))


def test_a_missing_tokens_file_is_an_error_of_the_reader(tmp_path, facts, tables):
    with StoreWriter(tmp_path, facts) as store:
        store.commit(*tables(1))
    committed_files(tmp_path)[0][0].unlink()
    with pytest.raises(StoreError, match="is missing"):
        committed_files(tmp_path)


def test_a_pipeline_stage_writes_its_layers_only(tmp_path, facts, shape, tables):
    stage = Stage(2, 2, shape.layers[1:])
    tokens, requests = tables(1)
    routes = stage.of(shape).num_routes
    for name in ("expert_ids", "gate_weights"):
        field = tokens_schema(stage.of(shape)).field(name)
        lists = pa.array([row[-routes:] for row in tokens[name].to_pylist()], field.type)
        tokens = tokens.set_column(tokens.schema.get_field_index(name), field, lists)
    with StoreWriter(tmp_path, facts, writer="w", stage=stage) as store:
        store.commit(tokens, requests)
    assert read_manifest(tmp_path).shape == shape
    [file] = committed_files(tmp_path)[0]
    assert (file.name, stage_of(file.name)) == ("p2of2-w-000001.parquet", (2, 2))
    [counters] = read_writers(tmp_path)
    assert (counters.writer, counters.layers) == ("p2of2-w", [2, 5])


def test_one_that_has_all_layers_says_nothing_of_them(tmp_path, facts):
    StoreWriter(tmp_path, facts, writer="w").close()
    assert "layers" not in json.loads((tmp_path / "writers" / "w.json").read_text())
    assert stage_of("w-000001.parquet") == stage_of("p1of-w") == (1, 1)


def in_a_small_tmpfs(disk, *command):
    """Run a command with a disk of one MiB, mounted where only that process sees it."""
    mount = 'mount -t tmpfs -o size=1m small "$0" && exec "$@"'
    apart = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    if subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    return subprocess.run(
        [*apart, "sh", "-c", mount, disk, *command], capture_output=True, text=True
    )


def test_a_full_disk_is_waited_for(tmp_path, facts, tables):
    (tmp_path / "disk").mkdir()
    (tmp_path / "given").write_bytes(pickle.dumps((facts, tables(*range(40)))))
    code = """
        import pickle, sys, threading, time
        from pathlib import Path
        from moescope.tracer.store import StoreWriter, committed_files, read_writers

        disk, (facts, tables) = Path(sys.argv[2]), pickle.load(open(sys.argv[1], "rb"))
        store = StoreWriter(disk / "s", facts, writer="w")
        ballast = (disk / "ballast").open("wb", buffering=0)
        try:
            while True:
                ballast.write(bytes(4096))
        except OSError:
            pass
        timer = threading.Timer(2.0, (disk / "ballast").unlink)
        timer.start()
        ballast.close()
        store.commit(*tables)
        assert not timer.is_alive()
        store.close()
        [counters] = read_writers(disk / "s")
        assert (counters.files, counters.rows) == (1, 200), counters
        assert len(committed_files(disk / "s")[0]) == 1
        impatient = StoreWriter(disk / "s", facts, writer="x", patience_s=0)
        with (disk / "ballast").open("wb", buffering=0) as ballast:
            try:
                while True:
                    ballast.write(bytes(4096))
            except OSError:
                pass
        impatient.commit(*tables)
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    disk = str(tmp_path / "disk")
    done = in_a_small_tmpfs(disk, sys.executable, str(script), str(tmp_path / "given"), disk)
    assert "there is no room for" in done.stderr
    assert "Trying again for" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("moescope.tracer.errors.StoreError: could not")
