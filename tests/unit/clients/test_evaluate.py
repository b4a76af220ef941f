"""What `moescope eval` refuses before anything is loaded."""

import fcntl
import json

import pytest
from eval_cases import choice, make_ranking, question, request, user, write_items
from typer.testing import CliRunner

from moescope.clients.cli import app
from moescope.clients.data_card import write_card
from moescope.clients.eval_arms import Dose
from moescope.clients.eval_measure import Asked, part_folder
from moescope.clients.evaluate import Plan, evaluate, read_inputs
from moescope.tracer.errors import InputError
from moescope.tracer.format import MoeShape


@pytest.fixture
def plan(tmp_path):
    def make(**changes):
        given = {
            "axis": "faithfulness",
            "items": write_items(tmp_path / "items.jsonl", [question("q1"), question("q2")]),
            "utility": write_items(tmp_path / "utility.jsonl", [choice("u1")]),
            "tune": (
                write_items(tmp_path / "tune.jsonl", [question("t1")]),
                write_items(tmp_path / "utility-tune.jsonl", [choice("t2")]),
            ),
            "ranking": make_ranking(tmp_path / "ranking.parquet"),
            "out": tmp_path / "out",
        }
        return Plan(**given | changes)

    return make


def test_sound_inputs(plan):
    inputs = read_inputs(plan())
    assert inputs.examples == ["traced"]
    assert "examples" not in inputs.settings
    assert inputs.goal.smooth == "p_document"
    assert len(inputs.steering) == 4
    one = read_inputs(plan(experts="4", strengths="deactivate", tune=()))
    assert (one.headline, one.goal) == (Dose(4, "deactivate"), None)
    named = read_inputs(plan(headline="n3/activate", tune=()))
    assert named.headline == Dose(3, "activate")
    assert named.headline in named.steering


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experts": "0"}, "--experts 0"),
        ({"strengths": "hard"}, "'hard' is no strength"),
        ({"headline": "4"}, "--headline 4"),
        ({"headline": "n4/deactivate"}, "--headline n4/deactivate and --tune both"),
        ({"tune": ()}, "several doses and no tuning items"),
        ({"judge_url": "http://x"}, "--judge-model"),
        ({"num_random": -1}, "--random -1"),
        ({"axis": "safety"}, "`axis` is 'faithfulness'"),
        ({"experts": "30"}, "the ranking gives only"),
    ],
)
def test_bad_options_are_refused(plan, changes, words):
    with pytest.raises(InputError) as error:
        read_inputs(plan(**changes))
    assert words in str(error.value)


def test_items_that_masks_were_chosen_on_are_refused(plan, tmp_path):
    traced = make_ranking(tmp_path / "traced.parquet", examples=["q2", "t1"])
    with pytest.raises(InputError, match=r"both in the ranking .* and in the evaluation \('q2'\)"):
        read_inputs(plan(ranking=traced))
    tune = write_items(tmp_path / "both.jsonl", [question("q1"), choice("t2")])
    with pytest.raises(InputError, match=r"both in .*both.jsonl and in the evaluation \('q1'\)"):
        read_inputs(plan(tune=(tune,)))
    tune = write_items(tmp_path / "both.jsonl", [question("t1"), choice("u1")])
    with pytest.raises(InputError, match=r"in the evaluation \('u1'\)"):
        read_inputs(plan(tune=(tune,)))
    # The ranking's own examples are good to tune on.
    read_inputs(plan(ranking=make_ranking(tmp_path / "fine.parquet", examples=["t1", "t2"])))


def test_a_ranking_that_does_not_say_its_examples_needs_the_job(plan, tmp_path):
    ranking = make_ranking(tmp_path / "ranking.csv")
    with pytest.raises(InputError, match="--trained-on JOB"):
        read_inputs(plan(ranking=ranking))
    job = tmp_path / "job.jsonl"
    line = {"condition": "c", "prompt": "a", "response": "b"}
    job.write_text("".join(json.dumps(line | {"example_id": n}) + "\n" for n in ("x", "y")))
    assert read_inputs(plan(ranking=ranking, trained_on=(job,))).examples == ["x", "y"]
    job.write_text(json.dumps(line | {"example_id": "q1"}) + "\n")
    with pytest.raises(InputError, match=r"\('q1'\)"):
        read_inputs(plan(ranking=ranking, trained_on=(job,)))


def test_tuning_needs_both_sides(plan, tmp_path):
    alone = write_items(tmp_path / "alone.jsonl", [question("t1")])
    with pytest.raises(InputError, match="no item has the axis utility"):
        read_inputs(plan(tune=(alone,)))
    alone = write_items(tmp_path / "alone.jsonl", [choice("t1")])
    with pytest.raises(InputError, match="no item has the axis faithfulness"):
        read_inputs(plan(tune=(alone,)))
    benign = write_items(tmp_path / "benign.jsonl", [request("r", forbidden=False)])
    with pytest.raises(InputError, match="no request is forbidden"):
        read_inputs(plan(axis="safety", items=benign, tune=()))


def test_an_evaluation_that_is_there_is_kept(plan, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "eval.json").write_text("{}")
    with pytest.raises(InputError, match="replace it by --force"):
        read_inputs(plan())
    read_inputs(plan(force=True))


class Unstarted:
    """What a runner knows before it starts; starting it fails the test."""

    max_length, top, shape = 20, 4, MoeShape((), 16, 4)

    def tokenizer(self):
        from moescope.clients.specimen_tokenizer import build_tokenizer

        return build_tokenizer(["It is the lamp of old."] * 5, 400)


def test_another_models_ranking_and_long_items_are_refused_before_loading(plan, tmp_path):
    other = make_ranking(tmp_path / "other.parquet", experts=8, top_k=2)
    with pytest.raises(InputError, match=r"8 experts a layer, top-2, .* this model has 16, top-4"):
        evaluate(plan(ranking=other, experts="1"), lambda _: Unstarted())
    long = write_items(tmp_path / "long.jsonl", [question("q1", messages=user("on " * 30, "a"))])
    with pytest.raises(InputError, match=r"line 1 \(example_id 'q1'\): needs \d+ tokens, and the"):
        evaluate(plan(items=long), lambda _: Unstarted())
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.part").exists()


def test_one_run_at_a_time(tmp_path):
    with part_folder(tmp_path / "out") as folder:
        assert folder.name == "out.part"
        with pytest.raises(InputError, match="another run writes"), part_folder(tmp_path / "out"):
            pass
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_other_items_are_other_work(plan):
    tokenizer = Unstarted().tokenizer()
    items = read_inputs(plan()).items

    def sha256(*arguments):
        return Asked.of("eval", *arguments).sha256()

    once = sha256(items, tokenizer, 8, 0)
    assert once == sha256(items, tokenizer, 8, 0)
    assert len({once, sha256(items[:2], tokenizer, 8, 0), sha256(items, tokenizer, 9, 0)}) == 3


def test_fewer_items_of_each_kind_are_spread_over_all(plan, tmp_path):
    lines = [question(f"q{n}") for n in range(10)] + [choice(f"c{n}") for n in range(2)]
    path = write_items(tmp_path / "many.jsonl", [lines[11], *lines[:11]])
    items = read_inputs(plan(items=path, utility=None)).items
    asked = Asked.of("eval", items, Unstarted().tokenizer(), 8, 0)
    thin = asked.thinned(4)
    assert [item.example_id for item in thin.items] == ["c1", "q0", "q2", "q5", "q7", "c0"]
    again = Asked.of("eval", thin.items, Unstarted().tokenizer(), 8, 0)
    assert (thin.asks, thin.places) == (again.asks, again.places)


def test_what_the_data_card_says_of_harm_is_kept(plan):
    given = plan()
    assert "benign_stand_ins" not in read_inputs(given).main.about()
    written = read_inputs(given).main.sha256
    for sha256, said in ((written, True), ("0", False)):
        write_card(given.items, benign_stand_ins=True, sha256={given.items.name: sha256})
        assert ("benign_stand_ins" in read_inputs(given).main.about()) == said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--model and --url"),
        (["--model", "m", "--url", "u"], "--model and --url"),
        (["--model", "m", "--tokenizer", "t"], "--tokenizer t goes with --url"),
        (["--url", "http://x", "--", "--max-model-len", "9"], "--max-model-len 9"),
    ],
)
def test_the_command_says_which_options_go_together(plan, options, words):
    given = plan()
    command = ["eval", "faithfulness", str(given.items), "--ranking", str(given.ranking)]
    result = CliRunner().invoke(app, [*command, "--out", str(given.out), *options])
    assert isinstance(result.exception, InputError)
    assert words in str(result.exception)


def test_no_server_is_said(plan):
    given = plan()
    command = ["eval", "faithfulness", str(given.items), "--ranking", str(given.ranking)]
    command += ["--out", str(given.out), "--url", "http://127.0.0.1:9", "--headline", "n2/activate"]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, InputError)
    assert "nothing answers at http://127.0.0.1:9" in str(result.exception)
