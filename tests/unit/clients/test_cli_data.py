import sys
import types
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from moescope.clients.cli_data import data_app, specimen_app
from moescope.clients.faithfulness import DEFAULT_INSTRUCTION, Options
from moescope.clients.job import read_job
from moescope.tracer.errors import InputError

SQUAD = """{"data": [{"paragraphs": [{"context": "Vell has lamps and bells.", "qas": [
{"id": "1", "question": "What has Vell?", "answers": [{"text": "lamps", "answer_start": 9}]},
{"id": "2", "question": "What else?", "answers": [{"text": "bells", "answer_start": 19}]},
{"id": "3", "question": "What not?", "answers": []}]}]}]}"""


def run(app: typer.Typer, *arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture
def specimens(monkeypatch):
    """Stands for the module that makes models, which needs torch and seconds."""
    calls = []
    module = types.ModuleType("moescope.clients.specimen")
    module.ARCHITECTURES = {"deepseek_v2": {}, "olmoe": {}}
    module.make_specimen = lambda directory, **options: calls.append((directory, options))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("moescope.clients.specimen", module, raising=False)
    return calls


def test_faithfulness(tmp_path):
    source, out = tmp_path / "squad.json", tmp_path / "job.jsonl"
    source.write_text(SQUAD)
    result = run(data_app, "faithfulness", "--format", "squad", source, "--out", out)
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "2 of 3 questions kept, 4 lines written.",
        "Skipped: 1 unanswerable.",
        f"-> {out}",
    ]
    assert read_job(out)[0].messages[0].content[0].text.startswith(DEFAULT_INSTRUCTION)


def test_faithfulness_options_reach_it(tmp_path):
    source, out = tmp_path / "squad.json", tmp_path / "job.jsonl"
    source.write_text(SQUAD)
    options = ["--limit", 1, "--seed", 3, "--instruction", "Speak."]
    run(data_app, "faithfulness", source, "--out", out, *options)
    lines = read_job(out)
    assert len(lines) == 2
    assert lines[0].messages[0].content[0].text.startswith("Speak.\n")


def test_every_option_of_faithfulness_has_its_place(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "moescope.clients.faithfulness.make_faithfulness",
        lambda *arguments, **more: calls.append((arguments, more)),
    )
    given = "--format nq --limit 3 --seed 4 --instruction closed --distractors 2 --counterfactual"
    more = "--document-order random --max-doc-tokens 9 --tokenizer T --licence L"
    run(data_app, "faithfulness", "a/b@c", "--out", "job", *given.split(), *more.split())
    options = Options(
        file_format="nq",
        limit=3,
        seed=4,
        instruction="closed",
        distractors=2,
        counterfactual=True,
        document_order="random",
        max_doc_tokens=9,
        tokenizer="T",
    )
    assert calls == [(("a/b@c", Path("job"), options), {"licence": "L"})]


def test_errors_are_left_to_the_main_program(tmp_path):
    with pytest.raises(InputError, match="can't read"):
        run(data_app, "faithfulness", tmp_path / "none.json", "--out", tmp_path / "job.jsonl")


def test_another_format_is_refused(tmp_path):
    result = run(data_app, "faithfulness", "x", "--out", tmp_path / "j", "--format", "csv")
    assert result.exit_code == 2


def test_specimen(tmp_path, specimens):
    target = tmp_path / "model"
    result = run(specimen_app, "make", target, "--arch", "olmoe", "--seed", 5, "--force")
    assert result.exit_code == 0
    assert f"olmoe specimen -> {target}" in result.output
    assert specimens == [(target, {"arch": "olmoe", "seed": 5, "force": True})]


def test_an_unknown_architecture_is_answered_with_the_list(tmp_path, specimens):
    with pytest.raises(InputError, match=r"architecture 'gpt2'; --arch takes .* deepseek_v2, olm"):
        run(specimen_app, "make", tmp_path / "model", "--arch", "gpt2")
    assert specimens == []


@pytest.mark.parametrize(("app", "command"), [(data_app, "faithfulness"), (specimen_app, "make")])
def test_help_teaches_with_an_example(app, command):
    result = run(app, command, "--help")
    assert "Example:" in result.output
    assert "moescope" in result.output


def test_the_command_alone_shows_its_help():
    assert "faithfulness" in run(data_app).output
    assert "make" in run(specimen_app).output


def test_the_architectures_named_in_the_help_exist():
    specimen = pytest.importorskip("moescope.clients.specimen")
    assert {"deepseek_v2", "qwen3_moe", "olmoe", "mixtral"} <= set(specimen.ARCHITECTURES)
