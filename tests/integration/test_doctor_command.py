"""`moescope doctor` as people call it, with the vLLM that is installed here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

SPECIMEN = Path(__file__).parents[2] / "examples" / "specimen"


def test_this_machine_can_trace(tmp_path):
    command = [
        sys.executable,
        "-m",
        "moescope.clients.cli",
        "doctor",
        "--json",
        "--tokens-per-second",
        "10",
    ]
    command += ["--store", str(tmp_path / "traces"), "--model", str(SPECIMEN)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    statuses = {check["name"]: check["status"] for check in found["checks"]}
    assert "fail" not in statuses.values(), found
    assert (found["ok"], done.returncode) == (True, 0)
    assert statuses["seam"] == statuses["vLLM"] == statuses["plugins"] == statuses["model"] == "ok"
    assert list(tmp_path.iterdir()) == []
