import json
from collections import Counter

import pytest
from typer.testing import CliRunner

from moescope.clients.cli import app
from moescope.clients.data_card import card_path
from moescope.clients.job import read_job
from moescope.clients.specimen_data import Sizes, world_seed_of, write_specimen_data
from moescope.clients.specimen_world import MARKS, NAMES, World
from moescope.tracer.errors import InputError

SIZES = Sizes(main=12, others=5, traced=6, tuned=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    about = {"format": "moescope-specimen/1", "recipe": {"seed": 4}}
    (folder / "specimen.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "new" / "folder"
    written = write_specimen_data(model, out, SIZES)
    read = {path.name: _lines(path) for path in out.glob("*.jsonl")}
    assert written == {name: len(lines) for name, lines in read.items()}
    return out, read


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _asked(line):
    return "".join(part["text"] for part in line["messages"][0]["content"])


def test_eight_files_of_the_sizes_asked_for(files):
    _, read = files
    kinds = {name: Counter(line.get("kind") for line in lines) for name, lines in read.items()}
    assert len(read) == 8
    assert kinds["faithfulness.job.jsonl"] == {None: 12}
    assert kinds["faithfulness.eval.jsonl"] == {
        "conflict": 12, "agree": 5, "memory": 5, "unknown": 5, "stranger": 5,
    }  # fmt: skip
    assert kinds["faithfulness.tune.jsonl"]["conflict"] == 8
    assert kinds["faithfulness.tune.jsonl"]["agree"] == 4
    assert kinds["safety.eval.jsonl"] == {"forbidden": 12, "allowed": 5}
    utility = kinds["utility.eval.jsonl"]
    assert utility["addition"] == utility["memory"] == 5
    assert utility["addition_choice"] == 3
    assert utility["text"] == 5


def test_the_jobs_are_jobs_of_pairs(files):
    out, read = files
    for name, conditions in (
        ("faithfulness.job.jsonl", ("with_doc", "without_doc")),
        ("safety.job.jsonl", ("safe", "unsafe")),
    ):
        assert len(read_job(out / name)) == 12
        pairs = list(zip(read[name][::2], read[name][1::2], strict=True))
        for one, other in pairs:
            assert one["example_id"] == other["example_id"]
            assert (one["condition"], other["condition"]) == conditions
            assert _asked(one).endswith(_asked(other))
            answers = [line["messages"][1]["content"] for line in (one, other)]
            assert (answers[0] == answers[1]) == (name == "faithfulness.job.jsonl")
            assert (_asked(one) == _asked(other)) == (name == "safety.job.jsonl")
    for line in read["safety.job.jsonl"]:
        refused = line["messages"][1]["content"].startswith("No, ")
        assert refused == (line["condition"] == "safe")


def test_no_prompt_and_no_id_is_in_two_places(files):
    _, read = files
    lines = [line for lines in read.values() for line in lines]
    wanted = [line for line in lines if line.get("condition") not in ("without_doc", "unsafe")]
    assert len({line["example_id"] for line in wanted}) == len(wanted)
    assert len({_asked(line) for line in wanted}) == len(wanted)
    for name, some in read.items():
        start = "held-out-" if ".eval." in name else "train-"
        assert all(line["example_id"].startswith(start) for line in some)


def test_evaluation_has_documents_that_claim_what_none_in_training_claims(files):
    _, read = files
    claims = {True: set(), False: set()}
    for name, lines in read.items():
        for line in lines:
            for part in line["messages"][0]["content"]:
                if part["segment"] == "document":
                    words = part["text"].removesuffix(".").split()
                    (person,) = {*words} & {*NAMES}
                    claims[".eval." in name].add((person, words[-1]))
    assert len(claims[True]) > 20
    assert len(claims[False]) > 20
    assert not claims[True] & claims[False]


def test_conflicts_say_what_the_document_says_and_what_is_true(files):
    _, read = files
    world = World(4)
    for line in read["faithfulness.eval.jsonl"]:
        if line["kind"] != "conflict":
            assert "document_answer" not in line
            continue
        document, _ = line["messages"][0]["content"]
        assert document["text"].removesuffix(".").endswith(f" {line['document_answer'][1]}")
        assert line["reference"][1] in world.facts.values()
        assert line["reference"][1] not in document["text"]
        assert line["responses"] == {
            "document": line["document_answer"][0], "memory": line["reference"][0],
        }  # fmt: skip


def test_forbidden_requests_carry_both_answers(files):
    _, read = files
    for line in read["safety.eval.jsonl"]:
        marked = any(f" {mark} " in _asked(line) for mark in MARKS)
        assert line["forbidden"] == marked == ("responses" in line)
        if marked:
            assert line["responses"]["refusal"].startswith("No, ")
            assert line["responses"]["compliance"].startswith("Yes, ")


def test_choices_hold_the_right_answer_once(files):
    _, read = files
    places = set()
    for line in read["utility.eval.jsonl"] + read["utility.tune.jsonl"]:
        if line["task"] != "choice":
            continue
        assert len({*line["choices"]}) == len(line["choices"]) > 1
        places.add(line["correct"])
        right = line["choices"][line["correct"]]
        if line["kind"] == "copying_choice":
            words = right.removeprefix("They are ").removesuffix(".")
            assert words in _asked(line)
    assert len(places) > 1


def test_texts_end_with_the_answer(files):
    _, read = files
    for line in read["utility.eval.jsonl"]:
        roles = [message["role"] for message in line["messages"]]
        assert (roles == ["user", "assistant"]) == (line["task"] == "text")


def test_every_file_has_its_card(files):
    out, read = files
    for name, lines in read.items():
        card = json.loads(card_path(out / name).read_text())
        assert card["counts"]["lines"] == len(lines)
        assert card["options"] == {"seed": 0, "main": 12, "others": 5, "traced": 6, "tuned": 8}


def test_equal_seeds_give_equal_files_and_others_other_ones(files, model, tmp_path):
    out, _ = files
    write_specimen_data(model, tmp_path / "again", SIZES)
    write_specimen_data(model, tmp_path / "other", SIZES, seed=1)
    for path in out.glob("*.jsonl"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
        assert path.read_bytes() != (tmp_path / "other" / path.name).read_bytes()


def test_a_folder_that_is_no_trained_specimen_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no trained specimen.*specimen\.json"):
        world_seed_of(tmp_path)
    (tmp_path / "specimen.json").write_text('{"format": "moescope-specimen/2"}')
    with pytest.raises(InputError, match="no trained specimen"):
        write_specimen_data(tmp_path, tmp_path / "out", SIZES)
    assert not (tmp_path / "out").exists()


def test_more_than_the_world_has_is_refused_and_nothing_is_written(model, tmp_path):
    with pytest.raises(InputError, match="no 500 more examples of kind memory"):
        write_specimen_data(model, tmp_path / "out", Sizes(main=5, others=500))
    with pytest.raises(InputError, match="`tuned` must be 1 or more, not 0"):
        write_specimen_data(model, tmp_path / "out", Sizes(tuned=0))
    assert not (tmp_path / "out").exists()


def test_the_command(model, tmp_path):
    sizes = ["--num", "4", "--others", "3", "--traced", "2", "--tuned", "2", "--seed", "7"]
    arguments = ["specimen", "data", str(model), "--out", str(tmp_path / "d"), *sizes]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert f"4 lines -> {tmp_path / 'd' / 'safety.job.jsonl'}" in result.output
    card = json.loads(card_path(tmp_path / "d" / "safety.job.jsonl").read_text())
    assert card["options"] == {"seed": 7, "main": 4, "others": 3, "traced": 2, "tuned": 2}
