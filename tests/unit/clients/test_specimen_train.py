import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from moescope.clients.cli import app
from moescope.clients.specimen_planting import draw_groups
from moescope.clients.specimen_sequences import evaluate
from moescope.clients.specimen_tokenizer import build_tokenizer
from moescope.clients.specimen_train import Recipe, build_model, make_trained_specimen, train
from moescope.clients.specimen_world import World, vocabulary_text
from moescope.tracer.errors import InputError

TOKENIZER = build_tokenizer(vocabulary_text(), 2048)
WORLD = World(0)
GROUPS = draw_groups(0, 3, 16)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "m"
    make_trained_specimen(folder, Recipe(steps=3, batch=4), num_evaluated=10)
    return folder


def test_training_lowers_the_loss():
    model, log = build_model(TOKENIZER, 0), []
    recipe = Recipe(steps=16, batch=16)
    assert train(model, TOKENIZER, WORLD, GROUPS, recipe, log=log, every=5) == 16
    assert [line["step"] for line in log] == [5, 10, 15, 16]
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    assert {"balance", "margin", "seconds"} <= log[0].keys()
    assert train(model, TOKENIZER, WORLD, GROUPS, recipe, seconds=0.0) == 1


def test_the_folder_is_a_model(folder):
    about = json.loads((folder / "specimen.json").read_text())
    assert (about["format"], about["steps_done"]) == ("moescope-specimen/1", 3)
    assert about["recipe"]["seed"] == 0
    assert {"model.safetensors", "tokenizer.json"} <= about["sha256"].keys()
    planted = json.loads((folder / "planted.json").read_text())
    assert planted["refuses"] == {str(n + 1): e for n, e in enumerate(GROUPS["refuses"])}
    assert (folder / "training.jsonl").read_text().count("\n") == 1
    assert (folder / "model.safetensors").stat().st_size < 10e6
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert evaluate(model, tokenizer, WORLD, num=10) == about["accuracies"]


def test_equal_seeds_give_equal_bytes(tmp_path, folder):
    make_trained_specimen(tmp_path / "again", Recipe(steps=3, batch=4), num_evaluated=10)
    for file in folder.iterdir():
        if file.name != "training.jsonl":  # it holds times
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("moescope.clients.specimen_train.evaluate", lambda *_, **__: {"memory": 1})
    arguments = ["specimen", "train", str(tmp_path / "m"), "--steps", "1", "--unplanted"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "memory 100.0%" in result.output
    about = json.loads((tmp_path / "m" / "specimen.json").read_text())
    assert not about["recipe"]["planted"]
    assert not (tmp_path / "m" / "planted.json").exists()
    with pytest.raises(InputError, match="not empty"):
        make_trained_specimen(tmp_path / "m", Recipe(steps=1))
