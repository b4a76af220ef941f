"""docs/questions.md shows what the commands print."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moescope.clients.cli import app

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "questions.md").read_text()
# Those whose arguments are not left to the reader.
EXAMPLES = [
    (command, output)
    for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    for command, output in [block.removeprefix("$ moescope ").split("\n", 1)]
    if not re.search(r"[A-Z]{5}", command)
]


def words(text):
    return [line.split() for line in text.splitlines() if line.strip(" ─")]


@pytest.mark.parametrize(("command", "output"), EXAMPLES, ids=[each[0] for each in EXAMPLES])
def test_an_example(command, output, monkeypatch):
    monkeypatch.chdir(ROOT)
    printed = CliRunner().invoke(app, shlex.split(command)).output
    assert words(printed) == words(output)


def test_there_are_examples():
    assert len(EXAMPLES) >= 2
