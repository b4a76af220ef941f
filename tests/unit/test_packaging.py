"""The wheel holds every file that the editable install shows, and its entry points."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("tracer", "analysis", "server", "clients", "deploy")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # Built from a copy: building in place would leave an egg-info that hides the entry points.
    source = tmp_path_factory.mktemp("source")
    for name in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
        ignore = shutil.ignore_patterns("__pycache__")
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", source / "out", source], check=True)
    [path] = (source / "out").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_every_source_file_is_in_the_wheel(wheel):
    inside = {name for name in wheel.namelist() if name.startswith("moescope/")}
    there = {
        f"moescope/{file.relative_to(ROOT)}"
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*")
        if file.is_file()
        and "__pycache__" not in file.parts
        # What deploys moescope is no part of the package: it is used from the repository.
        and (folder != "deploy" or file.suffix == ".typed" or file in (ROOT / folder).glob("*.py"))
    }
    assert inside == there


def test_vllm_finds_the_plugin(wheel):
    [name] = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    text = wheel.read(name).decode()
    assert "[vllm.general_plugins]\nmoescope = moescope.tracer.plugin:register" in text
    assert "moescope = moescope.clients.cli:main" in text
