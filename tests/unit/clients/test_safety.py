"""Pairs of a harmful and a safe answer, in a made-up world without harm."""

import csv
import hashlib
import json
import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moescope.clients import refusal_model
from moescope.clients.cli_data import data_app
from moescope.clients.job import read_job
from moescope.clients.refusal import Bounds
from moescope.clients.refusal_model import (
    GivenRefusals,
    RefusingModel,
    token_counter,
    where_refusals_come_from,
)
from moescope.clients.safety import length_bounds, make_safety
from moescope.clients.safety_source import Pair
from moescope.tracer.errors import InputError

SECRET = "brass"  # stands for the harmful texts: nothing but the job may show it
HARMFUL = (
    "Take the brass key from the harbour office, turn it twice in the lock of the lid, lift the "
    "hinge with a flat blade and push the inner drawer until the spring gives way."
)


def prompt(thing: str) -> str:
    return f"How do I open the {thing} of Vell?"


def refusal(thing: str) -> str:
    return (
        f"I can't help with opening the {thing} of Vell. It is sealed because whoever opens it "
        "could harm the keepers who sleep beside the harbour, and the law forbids it."
    )


def row(thing: str, safe: str | None = None, **more: object) -> dict[str, object]:
    given = {"safe_response": refusal(thing) if safe is None else safe}
    return {"prompt": prompt(thing), "harmful_response": HARMFUL, **given, **more}


class Written:
    """Refuses from a script: one dict an attempt, from row to text; otherwise says no."""

    given = False

    def __init__(self, *attempts: dict[int, str]) -> None:
        self.attempts = attempts
        self.asked: list[list[int]] = []

    @property
    def described(self) -> dict[str, object]:
        return {"refusals": "scripted"}

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def write(self, pairs, attempt):
        self.asked.append([pair.row for pair in pairs])
        return [self.attempts[attempt].get(pair.row, "No.") for pair in pairs]


@pytest.fixture
def source(tmp_path):
    def write(*rows: dict, name: str = "pairs.jsonl") -> str:
        path = tmp_path / name
        if path.suffix == ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                table = csv.DictWriter(file, list(rows[0]))
                table.writeheader()
                table.writerows(rows)
        else:
            path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "job.jsonl"


def card_of(out: Path) -> dict:
    return json.loads(out.with_name("job.jsonl.card.json").read_text(encoding="utf-8"))


def answer(line) -> str:
    return line.messages[-1].content[0].text


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.csv"])
def test_a_pair_differs_in_its_answer_only(source, out, name, capfd):
    statistics = make_safety(source(row("red box"), row("door"), name=name), out, GivenRefusals())
    assert str(statistics) == "2 of 2 rows kept, 4 lines written."
    lines = read_job(out)
    assert [(line.example_id, line.condition) for line in lines] == [
        ("row1", "safe"),
        ("row1", "unsafe"),
        ("row2", "safe"),
        ("row2", "unsafe"),
    ]
    safe, unsafe = lines[:2]
    assert safe.messages[0] == unsafe.messages[0]
    assert safe.messages[0].content[0].text == prompt("red box")
    assert (answer(safe), answer(unsafe)) == (refusal("red box"), HARMFUL)
    assert all(line.generate is None for line in lines)
    assert capfd.readouterr() == ("", "")


def test_the_card_says_how_and_shows_no_text(source, out, tmp_path):
    name = source(row("red box"), row("door", "No."), row("", "x", prompt=" "))
    make_safety(name, out, GivenRefusals(), licence="CC0-1.0", bounds=Bounds(min_overlap=0.3))
    card = card_of(out)
    assert card["source"]["sha256"] == hashlib.sha256(Path(name).read_bytes()).hexdigest()
    assert card["sha256"] == {"job.jsonl": hashlib.sha256(out.read_bytes()).hexdigest()}
    assert card["licence"] == "CC0-1.0"
    assert card["options"]["bounds"]["min_overlap"] == 0.3
    assert card["options"]["lengths_in"] == "words"
    assert card["counts"] == {
        "rows": 3,
        "kept": 1,
        "lines": 2,
        "beyond_limit": 0,
        "dropped": {"without `prompt`": 1, "failed topic + reasons + length_ratio": 1},
        "samples": 2,
        "failed": {"topic": 1, "reasons": 1, "length_ratio": 1},
    }
    shown = json.dumps(card)
    assert SECRET not in shown
    assert "Vell" not in shown
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "job.jsonl",
        "job.jsonl.card.json",
        "pairs.jsonl",
    ]


def test_what_does_not_pass_is_tried_again(source, out):
    name = source(row("red box"), row("door"), row("gate"))
    written = Written({2: refusal("door")}, {1: refusal("red box")}, {3: "I can't say."})
    statistics = make_safety(name, out, written, samples=3)
    assert written.asked == [[1, 2, 3], [1, 3], [3]]
    assert [line.example_id for line in read_job(out)[::2]] == ["row1", "row2"]
    assert (statistics.samples, statistics.kept, statistics.rows) == (6, 2, 3)
    assert str(statistics).splitlines() == [
        "2 of 3 rows kept, 4 lines written.",
        "Dropped: 1 failed topic + reasons + length_ratio.",
    ]
    assert card_of(out)["options"]["refusals"] == "scripted"


def test_no_more_attempts_than_needed(source, out):
    written = Written({1: refusal("red box"), 2: refusal("door")})
    make_safety(source(row("red box"), row("door")), out, written, samples=9)
    assert written.asked == [[1, 2]]


def test_limit_draws_by_seed_and_keeps_the_order(source, out):
    name = source(*(row(f"box {i}") for i in range(40)))

    def drawn(seed: int) -> list[int]:
        statistics = make_safety(name, out, GivenRefusals(), limit=5, seed=seed)
        assert (statistics.kept, statistics.beyond_limit) == (5, 35)
        return [int(line.example_id.removeprefix("row")) for line in read_job(out)[::2]]

    first = drawn(1)
    assert first == sorted(first) == drawn(1) != drawn(2)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "a", "safe_response": "b"}] * 2, "lacks `harmful_response` among its 2 f"),
        ([{"prompt": "a", "harmful_response": HARMFUL}] * 2, "lacks `safe_response` among its 2"),
        ([{HARMFUL: "a"}] * 2, "lacks `prompt` and `harmful_response` and `safe_response`"),
        (
            [row("door", harmful_response=[HARMFUL])] * 2,
            "row 1: `harmful_response` is list, not a text",
        ),
        ([row("box", "No."), row("door", "No.")], "none of 2 usable rows has a refusal"),
        ([row("box", prompt=" ")] * 2, r"none of 0 usable rows .*\nDropped: 2 without `prompt`"),
        ([row("box"), HARMFUL], "can't read rows in"),
        ([row("box"), row("door", prompt=3)], "row 2: `prompt` is int, not a text"),
    ],
)
def test_errors_tell_the_row_and_the_field_and_nothing_else(source, out, rows, said):
    name = source(*rows)
    with pytest.raises(InputError, match=said) as caught:
        make_safety(name, out, GivenRefusals())
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None or SECRET not in str(caught.value.__cause__)
    assert not out.exists()
    assert not out.with_name("job.jsonl.card.json").exists()


@pytest.mark.parametrize("text", [f"{SECRET} key", f'{{"prompt": "{SECRET}', f'["{SECRET}"]', ""])
@pytest.mark.parametrize("name", ["bad.jsonl", "bad.csv"])
def test_files_that_are_no_rows(tmp_path, out, text, name):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        make_safety(str(tmp_path / name), out, GivenRefusals())
    assert SECRET not in str(caught.value)
    assert "Expected rows with the texts `prompt` and `harmful_response`" in str(caught.value)


def test_bad_arguments(source, out, tmp_path):
    name = source(row("red box"), row("door"))
    given = GivenRefusals()
    for options, said in (
        ({"limit": 0}, "--limit must be 1 or more, not 0"),
        ({"samples": 0}, "--samples must be 1 or more, not 0"),
        ({"bounds": Bounds(min_overlap=2)}, "--min-overlap is a share, from 0 to 1, not 2"),
        ({"bounds": Bounds(max_copied=-1)}, "--max-copied is a share, from 0 to 1, not -1"),
        ({"bounds": Bounds(min_length_ratio=3)}, "--length-ratio 3:2 holds no number"),
    ):
        with pytest.raises(InputError, match=said):
            make_safety(name, out, given, **options)
    with pytest.raises(InputError, match="would overwrite its source"):
        make_safety(name, Path(name), given)
    with pytest.raises(InputError, match="there is no folder"):
        make_safety(name, tmp_path / "none" / "job.jsonl", given)
    with pytest.raises(InputError, match="can't write the job"):
        make_safety(name, tmp_path, given)
    with pytest.raises(InputError, match=r"can't read .*none.csv: No such file"):
        make_safety(str(tmp_path / "none.csv"), out, given)


def test_the_hub_without_a_network(out, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="the hub's data set nobody/nothing can't be read"):
        make_safety("nobody/nothing", out, GivenRefusals())


def test_length_bounds():
    assert length_bounds("0.5:2") == (0.5, 2)
    for text in ("2", "2:0.5", "a:b", "-1:2", "1:nan"):
        with pytest.raises(InputError, match="--length-ratio must be LOW:HIGH"):
            length_bounds(text)


# --- Where refusals come from ---------------------------------------------------------------------


def test_words_count_where_no_tokenizer_is_given():
    assert GivenRefusals().count_tokens("I can't, he said.") == 8
    assert GivenRefusals(len, "a model").count_tokens("four") == 4
    assert GivenRefusals(len, "a model").described["lengths_in"] == "a model"


def test_one_source_of_refusals_must_be_named(tmp_path):
    with pytest.raises(InputError, match="say where the refusals come from"):
        where_refusals_come_from(None, given=False)
    with pytest.raises(InputError, match="--temperature must be from 0 to 2, not 3"):
        where_refusals_come_from("model", given=False, temperature=3)
    assert where_refusals_come_from(None, given=True).given
    assert not where_refusals_come_from("not loaded yet", given=False).given
    with pytest.raises(InputError, match="can't load the tokenizer of --model"):
        token_counter(str(tmp_path / "none"))


class Tokenizer:
    """One token a word; its template may refuse system messages, as Mixtral's does."""

    def __init__(self, *roles: str) -> None:
        self.roles = roles

    def apply_chat_template(self, chat, *, add_generation_prompt, tokenize):
        assert (add_generation_prompt, tokenize) == (True, False)
        if not {message["role"] for message in chat} <= set(self.roles):
            raise ValueError(f"roles must alternate: {chat}")
        return " ".join(f"<{message['role']}> {message['content']}" for message in chat)

    def encode(self, text, *, add_special_tokens):
        assert not add_special_tokens
        return text.split()


@pytest.fixture
def engine(monkeypatch):
    """Stands for vLLM: answers from a list, and keeps what it was asked."""
    namespace = types.SimpleNamespace
    seen = namespace(prompts=[], sampling=[], answers=[], roles=("system", "user"), limit=4096)

    def generate(prompts, sampling, use_tqdm):
        assert not use_tqdm
        seen.prompts += [" ".join(p["prompt_token_ids"]) for p in prompts]
        seen.sampling += sampling
        texts = [seen.answers.pop(0) for _ in prompts]
        return [namespace(outputs=[namespace(text=t, finish_reason=r)]) for t, r in texts]

    config = namespace(model_config=namespace(max_model_len=0))
    llm = namespace(
        generate=generate, llm_engine=config, get_tokenizer=lambda: Tokenizer(*seen.roles)
    )

    def load(_):
        config.model_config.max_model_len = seen.limit
        return llm

    vllm = types.ModuleType("vllm")
    vllm.SamplingParams = namespace
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(refusal_model, "engine_arguments", lambda *_: None)
    monkeypatch.setattr(refusal_model, "load_engine", load)
    return seen


def refusing(seed: int = 0) -> RefusingModel:
    return RefusingModel("model", (), temperature=0.5, seed=seed)


PAIR = Pair(7, prompt("red box"), HARMFUL)


def test_a_model_is_asked_for_an_explained_refusal(engine):
    engine.answers = [(" I can't. ", "stop"), ("It is sealed. And th", "length")]
    model = refusing()
    assert model.write([PAIR], 0) == ["I can't."]
    assert model.write([PAIR], 1) == ["It is sealed."]
    words = len(HARMFUL.split())
    assert engine.prompts[0].startswith("<system> Decline the user's request.")
    assert f"about {words} words" in engine.prompts[0]
    assert engine.prompts[0].endswith(f"<user> {PAIR.prompt}")
    first, second = engine.sampling
    assert (first.temperature, first.max_tokens) == (0.5, 2 * words)
    assert first.seed != second.seed
    assert SECRET not in "".join(engine.prompts)
    assert model.count_tokens("one two") == 2
    assert SECRET not in json.dumps(model.described)


def test_thoughts_and_cut_off_sentences_are_no_refusal(engine):
    engine.answers = [("<think>Hm. No.</think>\nI won't.", "stop"), ("never ending", "length")]
    assert refusing().write([PAIR, PAIR], 0) == ["I won't.", ""]


def test_a_template_without_system_messages(engine):
    engine.roles = ("user",)
    engine.answers = [("No.", "stop")]
    refusing().write([PAIR], 0)
    assert engine.prompts[0].startswith("<user> Decline the user's request.")


def test_a_template_or_context_that_does_not_do(engine):
    engine.limit = 20
    with pytest.raises(InputError, match=r"row 7: .* raise the limit") as caught:
        refusing().write([PAIR], 0)
    assert "Vell" not in str(caught.value)
    engine.roles = ()
    with pytest.raises(InputError, match="row 7: the model's chat template") as caught:
        refusing().write([PAIR], 0)
    assert "Vell" not in str(caught.value)


# --- The command ----------------------------------------------------------------------------------


def run(*arguments: object):
    return CliRunner().invoke(data_app, [str(a) for a in arguments], catch_exceptions=False)


def test_the_command(source, out):
    name = source(row("red box"), row("door", "No."))
    result = run("safety", name, "--out", out, "--given", "--licence", "CC0-1.0")
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "1 of 2 rows kept, 2 lines written.",
        "Dropped: 1 failed topic + reasons + length_ratio.",
        f"-> {out}",
    ]
    name = source(row("box", "No."), row("door", "No."))
    options = ["--length-ratio", "0:2", "--min-overlap", 0, "--max-copied", 1, "--limit", 1]
    with pytest.raises(InputError, match="none of 1 usable rows"):
        run(
            "safety",
            source(row("door", "No."), row("box", "No.")),
            "--out",
            out,
            "--given",
            *options,
        )


def test_the_command_says_what_it_lacks(source, out):
    with pytest.raises(InputError, match="say where the refusals come from"):
        run("safety", source(row("red box")), "--out", out)
    assert "Example:" in run("safety", "--help").output
