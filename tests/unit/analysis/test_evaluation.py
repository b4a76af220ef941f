"""The EVAL folder: written whole or not at all, and read back as it was."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moescope.analysis.evaluation import (
    ANSWERS,
    EFFECTS,
    OUTCOMES,
    read_evaluation,
    write_evaluation,
)
from moescope.tracer.errors import InputError

RANKING = pa.table({"layer": pa.array([1], pa.int32()), "rd": [0.5]}).replace_schema_metadata(
    {b"moescope.rd": b'{"examples": ["a"]}'}
)
WHAT = {"axis": "safety", "task": "request", "kind": "forbidden", "example_id": "x"}


@pytest.fixture
def parts():
    arms = [{"arm": "base", "role": "base"}, {"arm": "steered", "role": "steered"}]
    answer = {"arm": "base", **WHAT, "prompt": "Öffne!", "answer": "No.", "label": "refusal"}
    outcomes = [
        {"arm": arm["arm"], **WHAT, "split": "eval", "metric": "refused", "value": value}
        for arm, value in zip(arms, (0.0, 1.0), strict=True)
    ]
    effect = dict.fromkeys(EFFECTS.names) | {"arm": "steered", "n": 1, "verdict": "no effect"}
    return {
        "settings": {"axis": "safety", "arms": arms, "created": "heute früh"},
        "ranking": RANKING,
        "answers": pa.Table.from_pylist([answer], schema=ANSWERS),
        "outcomes": pa.Table.from_pylist(outcomes, schema=OUTCOMES),
        "effects": pa.Table.from_pylist([effect], schema=EFFECTS),
    }


def test_what_is_written_is_read_again(tmp_path, parts):
    path = tmp_path / "EVAL"
    written = write_evaluation(path, **parts)
    read = read_evaluation(path)
    assert read == written
    assert read.settings == {"format": "moescope-eval/1", **parts["settings"]}
    assert read.ranking.schema.metadata == RANKING.schema.metadata
    assert sorted(p.name for p in tmp_path.iterdir()) == ["EVAL"]
    assert sorted(p.name for p in path.iterdir()) == [
        "answers.parquet", "effects.parquet", "eval.json", "outcomes.parquet", "ranking.parquet"
    ]  # fmt: skip


def test_columns_come_in_any_order_and_integers_become_values(tmp_path, parts):
    outcomes = parts["outcomes"].select(OUTCOMES.names[::-1])
    whole = outcomes.set_column(
        outcomes.column_names.index("value"), "value", pa.array([0, 1], pa.int8())
    )
    written = write_evaluation(tmp_path / "EVAL", **parts | {"outcomes": whole})
    assert written.outcomes == parts["outcomes"]


def test_an_older_evaluation_is_replaced(tmp_path, parts):
    path = tmp_path / "EVAL"
    write_evaluation(path, **parts)
    write_evaluation(path, **parts | {"settings": parts["settings"] | {"axis": "other"}})
    assert read_evaluation(path).settings["axis"] == "other"
    assert [p.name for p in tmp_path.iterdir()] == ["EVAL"]


def test_a_failed_write_leaves_what_was_there(tmp_path, parts):
    path = tmp_path / "EVAL"
    write_evaluation(path, **parts)
    with pytest.raises(TypeError, match="JSON"):
        write_evaluation(path, **parts | {"settings": parts["settings"] | {"bad": {1, 2}}})
    assert read_evaluation(path).settings["axis"] == "safety"
    assert [p.name for p in tmp_path.iterdir()] == ["EVAL"]


def test_nothing_else_is_overwritten(tmp_path, parts):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("mine")
    folder.mkdir()
    (folder / "mine").touch()
    for path, why in (
        (file, "is a file"),
        (folder, "other things in it"),
        (file / "EVAL", "can't write"),
    ):
        with pytest.raises(InputError, match=why):
            write_evaluation(path, **parts)
    assert file.read_text() == "mine"
    assert (folder / "mine").exists()


def test_an_arm_that_nobody_describes(tmp_path, parts):
    with pytest.raises(InputError, match=r"outcomes.*'steered'"):
        write_evaluation(tmp_path / "EVAL", **parts | {"settings": {"arms": [{"arm": "base"}]}})
    assert not (tmp_path / "EVAL").exists()


def test_what_is_no_evaluation(tmp_path, parts):
    path = tmp_path / "EVAL"
    with pytest.raises(InputError, match=r"no eval\.json"):
        read_evaluation(path)
    write_evaluation(path, **parts)
    settings = json.loads((path / "eval.json").read_text())

    def refused(why):
        with pytest.raises(InputError, match=why):
            read_evaluation(path)

    (path / "eval.json").write_text(json.dumps(settings | {"format": "moescope-eval/2"}))
    refused("format 'moescope-eval/2'")
    (path / "eval.json").write_text("[]")
    refused("format None")
    (path / "eval.json").write_text("{")
    refused("damaged")
    (path / "eval.json").write_text(json.dumps(settings | {"arms": ["base"]}))
    refused("no list of arms")
    (path / "eval.json").write_text(json.dumps(settings))
    pq.write_table(parts["answers"].drop_columns("label"), path / "answers.parquet")
    refused("no column label")
    (path / "answers.parquet").write_bytes(b"PAR1")
    refused("damaged")
    (path / "answers.parquet").unlink()
    refused("damaged")
