"""A job in three parts that know nothing of each other's texts."""

import json

import pytest

from moescope.clients.eval_items import read_items
from moescope.clients.faithfulness import Options, make_faithfulness
from moescope.clients.job import read_job
from moescope.clients.split import split_job
from moescope.tracer.errors import InputError


@pytest.fixture
def squad(tmp_path):
    """Forty documents with three questions each."""
    paragraphs = []
    for i in range(40):
        facts = [f"Ferry {i}{k} was built by Anna Sarn{i}{k}." for k in range(3)]
        questions = [
            {
                "id": f"q{i}-{k}",
                "question": f"Who built ferry {i}{k}?",
                "answers": [
                    {
                        "text": f"Anna Sarn{i}{k}",
                        "answer_start": " ".join(facts).index(f"Anna Sarn{i}{k}"),
                    }
                ],
            }
            for k in range(3)
        ]
        paragraphs.append({"context": " ".join(facts), "qas": questions})
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return path


@pytest.fixture
def pairs(tmp_path):
    lines = [
        {
            "example_id": f"row{i}",
            "condition": condition,
            "messages": [
                {"role": "user", "content": f"Open the sealed box {i}."},
                {"role": "assistant", "content": f"{answer} {i}"},
            ],
        }
        for i in range(20)
        for condition, answer in (("safe", "No, it is sealed"), ("unsafe", "Yes, I open box"))
    ]
    path = tmp_path / "safety.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def parts(folder, axes):
    traced = read_job(folder / "job.jsonl")
    tune, held_out = (read_items(folder / f"{n}.jsonl", axes).items for n in ("tune", "eval"))
    return traced, tune, held_out


@pytest.mark.parametrize("counterfactual", [False, True])
def test_no_document_is_in_two_parts(squad, tmp_path, counterfactual):
    job, out = tmp_path / "all.jsonl", tmp_path / "parts"
    make_faithfulness(squad, job, Options(counterfactual=counterfactual))
    counts = split_job(job, out, tune=0.2, evaluate=0.3, seed=3)
    traced, tune, held_out = parts(out, ["faithfulness"])
    ids = [{line.example_id.split(" ")[0] for line in part} for part in (traced, tune, held_out)]
    total = sum(len(part) for part in ids)
    assert total == len(set.union(*ids)) == len(read_job(job)) // 2
    assert [round(len(part) / total, 1) for part in ids] == [0.5, 0.2, 0.3]
    # q12-0 and q12-2 share a document.
    shared = [{example.split("-")[0] for example in part} for part in ids]
    assert not shared[0] & shared[1] | shared[0] & shared[2] | shared[1] & shared[2]
    assert counts == {
        "job.jsonl": len(traced),
        "tune.jsonl": len(tune),
        "eval.jsonl": len(held_out),
    }
    kinds = {item.kind for item in held_out}
    assert kinds == {"conflict" if counterfactual else "with_doc", "without_doc"}
    truths = {}
    if counterfactual:
        lines = (tmp_path / "all.jsonl.truth.jsonl").read_text().splitlines()
        truths = {row["example_id"]: row for row in map(json.loads, lines)}
    for item in held_out:
        name = item.example_id.split(" ")[0]
        if item.kind == "conflict":
            assert item.reference == (truths[name]["true_answer"],)
            assert item.document_answer == (truths[name]["answer"],) != item.reference
            assert truths[name]["answer"] in item.document
            assert item.responses.memory == truths[name]["true_answer"]
        if item.kind == "without_doc":
            number = name.removeprefix("q").replace("-", "")
            assert item.document is None
            assert item.reference == (f"Anna Sarn{number}",)
    card = json.loads((out / "eval.jsonl.card.json").read_text())
    assert card["counts"]["lines"] == len(held_out)


def test_equal_seeds_give_equal_parts(squad, tmp_path):
    job = tmp_path / "all.jsonl"
    make_faithfulness(squad, job)
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        split_job(job, tmp_path / folder, seed=seed)
    a, b, c = ((tmp_path / name / "eval.jsonl").read_bytes() for name in "abc")
    assert a == b != c


def test_requests_and_harmless_ones(pairs, tmp_path):
    benign = tmp_path / "benign.csv"
    benign.write_text("prompt\n" + "\n".join(f"Open the red box {i}." for i in range(10)) + "\n")
    split_job(pairs, tmp_path / "parts", tune=0.25, evaluate=0.25, benign=str(benign))
    traced, tune, held_out = parts(tmp_path / "parts", ["safety"])
    assert len(traced) == 20
    for items in (tune, held_out):
        forbidden = [item for item in items if item.forbidden]
        assert len(forbidden) == len(items) - len(forbidden) == 5
        for item in forbidden:
            assert item.responses.refusal.startswith("No,")
            assert item.responses.compliance.startswith("Yes,")
    assert not {i.prompt for i in tune} & {i.prompt for i in held_out}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tune": 0.6, "evaluate": 0.4}, "must leave some examples to trace"),
        ({"tune": 0.001}, "leave none for tune.jsonl"),
        ({"benign": "nothing.csv"}, "nothing.csv"),
    ],
)
def test_what_can_not_be_done_is_said(pairs, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        split_job(pairs, tmp_path / "parts", **change)
    assert not (tmp_path / "parts").exists()


def test_other_jobs_are_refused(pairs, tmp_path):
    lines = pairs.read_text().splitlines()
    pairs.write_text("\n".join(lines[1:]))  # the first example has one condition now
    with pytest.raises(InputError, match="conditions safe and unsafe; unsafe"):
        split_job(pairs, tmp_path / "parts")
    pairs.write_text("\n".join(lines))
    (tmp_path / "job.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match="overwritten by a part of itself"):
        split_job(tmp_path / "job.jsonl", tmp_path)
