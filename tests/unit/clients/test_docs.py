"""The documentation names every command, and its links and file tree lead somewhere."""

import re
from pathlib import Path

import pytest
import typer

from moescope.clients.cli import app

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(group, prefix="moescope"):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}"


def test_every_command_is_in_the_documentation():
    text = "\n".join(page.read_text() for page in PAGES)
    missing = [name for name in commands(typer.main.get_command(app)) if name not in text]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_the_file_tree_lists_every_module_and_no_other():
    tree = (ROOT / "README.md").read_text().split("## The code")[1].split("```")[1]
    listed, folder = set(), ""
    for line in tree.strip().splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        elif folder:
            listed.add(folder + name)
    there = {
        f"{folder}/{file.name}"
        for folder in ("tracer", "analysis", "clients", "server", "deploy")
        for file in (ROOT / folder).iterdir()
        if file.suffix in (".py", ".sql", ".jinja", ".txt", ".yaml") and file.name != "__init__.py"
    }
    parts = (part.name for part in (ROOT / "deploy").iterdir() if part.is_dir())
    there |= {f"deploy/{name}/" for name in parts if name != "__pycache__"}
    assert listed == there
