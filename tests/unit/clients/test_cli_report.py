"""`moescope report` through typer: evaluations, a store, both, and what can't be reported."""

import subprocess
import sys
from functools import partial

import commands
import pyarrow as pa
import pytest
import typer
from evaluations import Made, make_evaluation

from moescope.clients.cli_report import register_report
from moescope.tracer.errors import InputError
from moescope.tracer.format import ModelFacts, MoeShape, requests_schema, tokens_schema
from moescope.tracer.store import StoreWriter

app = typer.Typer()
register_report(app)


invoke = partial(commands.invoke, app)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "eval"
    make_evaluation(path, Made(gain=0.45, n=30, doses=(4,), strengths=("deactivate",)))
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two requests of two conditions, each of two tokens with one expert of two."""
    path = tmp_path_factory.mktemp("cli") / "store"
    shape = MoeShape((1,), 2, 1)
    facts = ModelFacts("tiny", None, "TinyMoe", "float32", shape, "softmax", False, "test")
    tokens, requests = [], []
    for condition, expert in (("a", 0), ("b", 1)):
        requests.append(
            {"request_id": condition, "run": "r", "example_id": None, "condition": condition,
             "mask": None, "prompt_tokens": 0, "tokens": 2, "complete": True, "spans": None}
        )  # fmt: skip
        tokens += [
            {"request_id": condition, "position": at, "token_id": at, "segment": "response",
             "mask": None, "expert_ids": [expert], "gate_weights": [1.0]}
            for at in range(2)
        ]  # fmt: skip
    with StoreWriter(path, facts, writer="w") as writer:
        writer.commit(
            pa.Table.from_pylist(tokens, tokens_schema(shape)),
            pa.Table.from_pylist(requests, requests_schema()),
        )
    return path


def test_an_evaluation(evaluation, tmp_path):
    output = invoke(evaluation, "--out", tmp_path / "r.html")
    lines = output.splitlines()
    assert lines[0].startswith("1. Faithfulness, steered towards with_doc: document-following")
    assert lines[-1] == f"report: {tmp_path / 'r.html'}"
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")
    assert (tmp_path / "r_files" / "faithfulness-rd.png").is_file()


def test_a_store_and_both(evaluation, store, tmp_path):
    conditions = ("--positive", "a", "--negative", "b")
    output = invoke(store, *conditions, "--out", tmp_path / "s.html")
    assert output == f"report: {tmp_path / 's.html'}\n"
    assert "Expert routing: a against b" in (tmp_path / "s.html").read_text()
    invoke(store, evaluation, *conditions, "--out", tmp_path / "both.html")
    both = (tmp_path / "both.html").read_text()
    assert 'aria-labelledby="store"' in both
    assert 'aria-labelledby="faithfulness"' in both


def test_what_cannot_be_reported(evaluation, store, tmp_path):
    out = ("--out", tmp_path / "r.html")
    for arguments, reason in (
        ((tmp_path, *out), "neither an evaluation .* nor a trace store"),
        ((store, *out), "name two of its conditions with --positive"),
        ((store, store, "--positive", "a", "--negative", "b", *out), "takes one trace store"),
        ((evaluation, "--positive", "a", *out), "for a trace store, and none is named"),
        ((store, "--positive", "a", "--negative", "c", *out), "'c'"),
        ((evaluation, "--out", tmp_path / "r.txt"), r"end its name with \.html"),
    ):
        with pytest.raises(InputError, match=reason):
            invoke(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_help_imports_nothing_heavy():
    code = (
        "import sys, moescope.clients.cli_report\n"
        "print([m for m in ('matplotlib', 'duckdb', 'scipy', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
