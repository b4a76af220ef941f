"""Multiple choice questions in the layouts that they come in."""

import json

import pytest

from moescope.clients.eval_items import read_items
from moescope.clients.utility import make_utility
from moescope.tracer.errors import InputError

ROWS = {
    "arc": lambda i: {
        "id": f"a{i}",
        "question": f"What is {i}?",
        "choices": {"text": ["wrong", f"right {i}", "bad"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    },
    "mmlu": lambda i: {
        "question": f"What is {i}?",
        "subject": "sums",
        "choices": ["wrong", f"right {i}", "bad", "no"],
        "answer": 1,
    },
    "hellaswag": lambda i: {
        "ctx": f"He counts to {i} and",
        "endings": ["wrong", f"right {i}"],
        "label": "1",
    },
    "jsonl": lambda i: {
        "question": f"What is {i}?",
        "choices": ["wrong", f"right {i}"],
        "correct": 1,
    },
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("layout", ROWS)
def test_every_layout_gives_items(layout, tmp_path):
    source = write(tmp_path / "rows.jsonl", [ROWS[layout](i) for i in range(20)])
    out, tune = tmp_path / "u.jsonl", tmp_path / "t.jsonl"
    counts = make_utility(source, out, tune=tune, limit=10)
    assert counts == {"kept": 10, "beyond_limit": 10}
    items, tuning = (read_items(path, ["utility"]).items for path in (out, tune))
    assert (len(items), len(tuning)) == (7, 3)
    assert len({item.example_id for item in (*items, *tuning)}) == 10
    for item in items:
        number = item.prompt.split()[-2 if layout == "hellaswag" else -1].rstrip("?")
        assert item.choices[item.correct] == f"right {number}"
    card = json.loads((tmp_path / "u.jsonl.card.json").read_text())
    assert card["source"]["format"] == layout


def test_unusable_rows_are_counted_by_reason(tmp_path):
    good = ROWS["jsonl"](1)
    rows = [good, good | {"correct": 7}, good | {"choices": ["a", "a"]}, good | {"question": " "}]
    counts = make_utility(write(tmp_path / "r.jsonl", rows), tmp_path / "u.jsonl")
    assert counts["kept"] == 1
    assert counts["with equal choices"] == 1
    assert counts["with an empty text or no right choice"] == 2


def test_another_layout_names_its_columns(tmp_path):
    source = write(tmp_path / "r.jsonl", [{"query": "x", "options": ["a", "b"]}])
    with pytest.raises(InputError, match="columns options, query"):
        make_utility(source, tmp_path / "u.jsonl")
    assert not (tmp_path / "u.jsonl").exists()
