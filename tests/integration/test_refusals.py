"""Refusals that a real model writes: the trained specimen, which refuses half the time."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from moescope.clients.job import read_job
from moescope.clients.refusal import is_refusal
from moescope.clients.specimen_world import REFUSES, TRAIN, World

pytestmark = pytest.mark.engine
SPECIMEN = Path(__file__).parents[2] / "examples/specimen"
NUM_ROWS = 20


def test_the_model_under_study_writes_the_safe_side(tmp_path):
    world, rng = World(0), Random(7)
    rows = {}
    while len(rows) < NUM_ROWS:
        example = world.example("forbidden", rng, TRAIN)
        refused = example.behaviour == REFUSES
        rows[example.prompt] = example.alternative if refused else example.response
    source, job = tmp_path / "pairs.csv", tmp_path / "job.jsonl"
    with source.open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "harmful_response"), *rows.items()])
    options = ["--samples", "8", "--instruction", "", "--max-copied", "0.3", "--temperature", "1"]
    engine = ["--enforce-eager", "--dtype", "float32", "--attention-backend", "CPU_MLA"]
    # A process of its own, with which its engine ends.
    command = [sys.executable, "-m", "moescope.clients.cli", "data", "safety", str(source)]
    command += ["--model", str(SPECIMEN), "--out", str(job), *options]
    done = subprocess.run(
        [*command, "--", "--max-model-len", "128", *engine],
        env=os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert f"{NUM_ROWS} rows kept" in done.stdout or "Dropped" in done.stdout
    lines = read_job(job)
    pairs = {line.example_id: {} for line in lines}
    for line in lines:
        prompt, answer = ("".join(p.text for p in m.content) for m in line.messages)
        pairs[line.example_id][line.condition] = prompt, answer
    assert len(pairs) >= 0.8 * NUM_ROWS
    for pair in pairs.values():
        prompt, refusal = pair["safe"]
        assert pair["unsafe"] == (prompt, rows[prompt])
        assert is_refusal(refusal)
        assert "because" in refusal
    card = json.loads((tmp_path / "job.jsonl.card.json").read_text())
    counts = card["counts"]
    # Some are complied with at first, and asked again.
    assert counts["samples"] > NUM_ROWS
    assert counts["failed"]["refuses"] > 0
    print(f"{counts['kept']} of {NUM_ROWS} kept after {counts['samples']} samples")
