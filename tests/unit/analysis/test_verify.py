"""A good store, damaged in one way at a time: `verify_store` says so, and nothing else."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moescope.analysis.verify import store_notes, verify_store
from moescope.tracer.errors import StoreError
from moescope.tracer.format import Stage, requests_schema, tokens_schema
from moescope.tracer.store import StoreWriter

NAN, MINUS = np.float16("nan"), np.float16(-1)


@pytest.fixture
def store(maker, tmp_path):
    """Two pairs of files, of two requests each; q0 to q3 have 4 tokens, q3 is incomplete."""
    requests = [
        maker.request(
            f"q{number}",
            ["prompt", "prompt", "response", "response"],
            number,
            spans=[{"segment": "prompt", "start": 0, "stop": 2}],
            complete=number < 3,
        )
        for number in range(4)
    ]
    return maker.write(tmp_path / "s", requests, per_file=2)


def rewrite(store, name, schema, change):
    """Change the rows of the second pair's file."""
    file = store / name / "w-000002.parquet"
    rows = pq.read_table(file).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema), file)


def test_a_sound_store(store):
    assert verify_store(store) == []
    assert store_notes(store) == []


def test_an_empty_store(maker, tmp_path):
    assert verify_store(maker.write(tmp_path / "s", [])) == []


def test_not_a_store(tmp_path):
    with pytest.raises(StoreError):
        verify_store(tmp_path)


def put(column, value, *, row=1):
    """A damage: rows[row][column] = value, or value(what was there)."""

    def change(rows):
        old = rows[row][column]
        rows[row][column] = value(old) if callable(value) else value

    return change


def item(at, value):
    return lambda old: [*old[:at], value, *old[at + 1 :]]


# Rows of the tokens file: 0 to 3 of q2, 4 to 7 of q3. Lists: layers 1, 3, 4 of two routes each.
@pytest.mark.parametrize(
    ("check", "request_id", "change"),
    [
        ("orphan rows", "new", lambda rows: [row.update(request_id="new") for row in rows[:4]]),
        ("scattered rows", "q2", lambda rows: rows.append(rows.pop(3))),
        ("positions", "q2", put("position", 2, row=1)),
        ("gaps", "q2", put("position", 4, row=3)),
        ("gaps", "q3", put("position", -1, row=4)),
        ("list length", "q2", put("expert_ids", lambda old: old[:-1])),
        ("list length", "q2", put("gate_weights", lambda old: [*old, old[-1]])),
        ("expert range", "q2", put("expert_ids", item(3, 8))),
        ("expert twice", "q2", put("expert_ids", lambda old: [old[1], *old[1:]])),
        ("weight", "q2", put("gate_weights", item(5, NAN))),
        ("weight", "q2", put("gate_weights", item(5, MINUS))),
        ("weight order", "q2", put("gate_weights", lambda old: [old[1], old[0], *old[2:]])),
    ],
)
def test_damaged_tokens(store, maker, check, request_id, change):
    rewrite(store, "tokens", tokens_schema(maker.shape), change)
    found = {problem.check: problem for problem in verify_store(store)}
    # The file's size has changed, and renamed rows leave a request without any.
    assert set(found) - {"counters", "row count"} == {check}
    assert found[check].request == request_id
    assert found[check].file == "tokens/w-000002.parquet"
    assert "trace again" in str(found[check])


@pytest.mark.parametrize(
    ("check", "request_id", "change"),
    [
        ("row count", "q2", put("tokens", 5, row=0)),
        ("row count", "q3", put("tokens", 0, row=1)),
        ("prompt length", "q2", put("prompt_tokens", 5, row=0)),
        ("spans", "q2", put("spans", [{"segment": "doc", "start": 1, "stop": 5}], row=0)),
        ("spans", "q3", put("spans", [{"segment": "doc", "start": 2, "stop": 1}], row=1)),
        ("orphan rows", "q2", lambda rows: rows.pop(0)),
        ("request twice", "q0", put("request_id", "q0", row=0)),
    ],
)
def test_damaged_requests(store, check, request_id, change):
    rewrite(store, "requests", requests_schema(), change)
    found = {problem.check: problem for problem in verify_store(store)}
    also = {"counters"} | ({"orphan rows", "row count"} if check == "request twice" else set())
    assert set(found) - also == {check}
    assert found[check].request == request_id


def test_a_problem_counts_the_tokens_it_concerns(store, maker):
    def change(rows):
        for row in rows[2:7]:
            row["expert_ids"][3] = 9

    rewrite(store, "tokens", tokens_schema(maker.shape), change)
    problem = next(found for found in verify_store(store) if found.check == "expert range")
    assert "request q2: expert range: at position 2, layer 3 (and 4 more such)" in str(problem)


def test_a_file_twice_under_two_names(store):
    for folder in ("tokens", "requests"):
        shutil.copy(store / folder / "w-000001.parquet", store / folder / "w-000003.parquet")
    found = {problem.check: problem for problem in verify_store(store)}
    assert set(found) == {"counters", "request twice"}
    assert found["request twice"].count == 2
    assert "files 2 there, 3 in the files" in found["counters"].what


def test_files_that_lack_or_cannot_be_read(store):
    (store / "tokens" / "w-000001.parquet").unlink()
    file = store / "requests" / "w-000002.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    found = {problem.check: problem.file for problem in verify_store(store)}
    assert found.pop("counters") == "writers/w.json"
    assert found == {
        "missing tokens": "requests/w-000001.parquet",
        "unreadable": "requests/w-000002.parquet",
    }


def test_damage_in_the_middle_of_a_file(store):
    file = store / "tokens" / "w-000002.parquet"
    data = file.read_bytes()
    file.write_bytes(data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :])
    found = {problem.check: problem.file for problem in verify_store(store)}
    assert found["unreadable"] == "tokens/w-000002.parquet"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop_columns(["mask"]), "column mask is missing"),
        (
            lambda table: table.set_column(1, "position", table["position"].cast(pa.int64())),
            "column position is int64, not int32",
        ),
        (lambda table: table.append_column("more", table["position"]), "has the columns"),
    ],
)
def test_other_columns(store, change, message):
    file = store / "tokens" / "w-000002.parquet"
    pq.write_table(change(pq.read_table(file)), file)
    problem = verify_store(store)[0]
    assert (problem.check, problem.file) == ("schema", "tokens/w-000002.parquet")
    assert message in problem.what


@pytest.mark.parametrize("key", ["files", "rows", "requests", "incomplete_requests", "bytes"])
def test_counters(store, key):
    file = store / "writers" / "w.json"
    counters = json.loads(file.read_text())
    file.write_text(json.dumps(counters | {key: counters[key] + 1}))
    (problem,) = verify_store(store)
    assert (problem.check, problem.file) == ("counters", "writers/w.json")
    assert f"{key} {counters[key] + 1:,} there, {counters[key]:,} in the files" in problem.what
    file.write_text(json.dumps(counters | {key: counters[key] + 1, "state": "open"}))
    assert verify_store(store) == []


def test_writers_that_lack_or_cannot_be_read(store):
    file = store / "writers" / "w.json"
    file.write_text("{")
    assert [problem.check for problem in verify_store(store)] == ["writers"]
    file.unlink()
    (problem,) = verify_store(store)
    assert "the writer has 2 files" in problem.what


def test_notes(store, maker):
    file = store / "writers" / "w.json"
    counters = json.loads(file.read_text())
    file.write_text(json.dumps(counters | {"state": "killed", "dropped_rows": 1234}))
    shutil.copy(store / "tokens" / "w-000001.parquet", store / "tokens" / "x-000001.parquet")
    with StoreWriter(store, maker.facts(), writer="v"):
        notes = "\n".join(store_notes(store))
        assert verify_store(store) == []
    assert "x-000001.parquet is not committed" in notes
    assert "writer v is still open" in notes
    assert "writer w was killed" in notes
    assert "dropped 1,234 rows; 1 of its requests are incomplete" in notes


def test_a_sound_pipeline(maker, tmp_path):
    path = maker.write_stages(tmp_path, maker.random_requests(5, 4), (1, 2))
    assert verify_store(path) == []
    assert store_notes(path) == []


def test_a_request_that_lacks_a_stage(maker, tmp_path):
    maker.write_stages(tmp_path, [maker.request("q", ["prompt"])], (1, 2), writer="a")
    maker.write_stages(tmp_path, [maker.request("r", ["prompt"])], (1, 2), writer="b")
    for file in tmp_path.rglob("p1of2-b*"):
        file.unlink()
    (problem,) = verify_store(tmp_path)
    assert (problem.check, problem.request) == ("missing stage", "r")
    assert "is in 1 of 2 pipeline stages" in str(problem)
    # Its writer is still at it, as far as one can see.
    with StoreWriter(tmp_path, maker.facts(), stage=Stage(1, 2, (1,))):
        assert verify_store(tmp_path) == []


def test_a_request_that_is_in_a_stage_twice_or_in_two_pipelines(maker, tmp_path):
    requests = [maker.request("q", ["prompt"])]
    for path, sizes in ((tmp_path / "twice", (1, 2)), (tmp_path / "other", (1, 1, 1))):
        maker.write_stages(path, requests, (1, 2), writer="a")
        maker.write_stages(path, requests, sizes, writer="b")
        assert [problem.check for problem in verify_store(path)] == ["request twice"]


def test_lists_of_another_stage(maker, tmp_path):
    path = maker.write_stages(tmp_path, [maker.request("q", ["prompt"] * 2)], (1, 2))
    one, two = (path / "tokens" / f"p{number}of2-w-000001.parquet" for number in (1, 2))
    shutil.copy(two, one)
    assert {problem.check for problem in verify_store(path)} == {"list length", "counters"}
