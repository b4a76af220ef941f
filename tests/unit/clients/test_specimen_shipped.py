"""The trained copies in examples/ are whole, of the code's recipe, and as good as they say."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moescope.clients.specimen_planting import draw_groups
from moescope.clients.specimen_sequences import evaluate
from moescope.clients.specimen_train import Recipe
from moescope.clients.specimen_world import World

EXAMPLES = Path(__file__).parents[3] / "examples"
COPIES = [EXAMPLES / "specimen", EXAMPLES / "specimen-unplanted"]


@pytest.fixture(params=COPIES, ids=lambda folder: folder.name)
def copy(request):
    return request.param


def _about(copy):
    return json.loads((copy / "specimen.json").read_text())


def test_the_files_are_those_that_were_written(copy):
    about = _about(copy)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= about["sha256"].keys()
    for name, written in about["sha256"].items():
        assert hashlib.sha256((copy / name).read_bytes()).hexdigest() == written, name
    assert sum(file.stat().st_size for file in copy.iterdir()) <= 10e6


def test_the_recipe_is_the_code_s(copy):
    about = _about(copy)
    recipe = Recipe(seed=about["recipe"]["seed"], planted=copy.name == "specimen")
    assert about["recipe"] == asdict(recipe)
    assert about["steps_done"] == recipe.steps
    last = (copy / "training.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["step"] == recipe.steps
    planted = copy / "planted.json"
    assert planted.exists() == recipe.planted
    if recipe.planted:
        groups = draw_groups(recipe.seed, 3, 16)
        expected = {
            name: {str(n + 1): experts for n, experts in enumerate(layers)}
            for name, layers in groups.items()
        }
        assert json.loads(planted.read_text()) == expected


def test_a_planted_copy_has_the_accuracies_that_were_asked_for():
    figures = _about(COPIES[0])["accuracies"]
    assert figures["memory"] >= 0.95
    assert figures["agree"] >= 0.97
    assert figures["skills"] >= 0.95
    for name in ("follows_document", "follows_document_greedy", "refuses", "refuses_greedy"):
        assert 0.4 <= figures[name] <= 0.75, name


def test_the_accuracies_are_those_of_the_model(copy):
    about = _about(copy)
    model = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    figures = evaluate(model, tokenizer, World(about["recipe"]["seed"]), num=50)
    assert figures.keys() == about["accuracies"].keys()
    for name, recorded in about["accuracies"].items():
        assert figures[name] == pytest.approx(recorded, abs=0.15), name
