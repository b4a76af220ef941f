import json
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from moescope.clients.cli import app
from moescope.clients.specimen_tokenizer import build_tokenizer
from moescope.clients.specimen_train import (
    _IGNORED,
    Recipe,
    build_model,
    chat,
    draw_groups,
    encode,
    evaluate,
    group_masks,
    make_trained_specimen,
    routed,
    score,
    train,
)
from moescope.clients.specimen_world import HELD_OUT, OPPOSITE, World, vocabulary_text
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


def _examples(kind, num=5):
    rng = Random(1)
    return [WORLD.example(kind, rng, HELD_OUT) for _ in range(num)]


def test_a_sequence_is_what_the_chat_template_writes():
    (example,) = _examples("conflict", 1)
    messages = [{"role": "user", "content": example.prompt}]
    prompt = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat(example.prompt) == prompt
    messages.append({"role": "assistant", "content": example.response})
    whole = TOKENIZER.apply_chat_template(messages, return_dict=True)["input_ids"]
    batch = encode(TOKENIZER, [example.prompt, "Hi"], [example.response, "Yes."])
    assert batch.ids[0][batch.real[0]].tolist() == whole
    answer = batch.targets[0][batch.targets[0] != _IGNORED].tolist()
    assert TOKENIZER.decode(answer) == f"{example.response}<|end|>"
    # A target is the token after.
    where = (batch.targets != _IGNORED).nonzero()
    for row, column in where.tolist():
        assert batch.ids[row, column + 1] == batch.targets[row, column]


def test_groups_are_apart_in_every_layer():
    assert GROUPS.keys() == OPPOSITE.keys()
    for layer in range(3):
        experts = [expert for layers in GROUPS.values() for expert in layers[layer]]
        assert len({*experts}) == len(experts) == 6
    assert draw_groups(0, 3, 16) == GROUPS != draw_groups(1, 3, 16)
    masks = group_masks(GROUPS, 16)
    assert masks.sum((1, 2)).tolist() == [6, 6, 3, 3, 0]


def test_experts_that_are_off_are_not_chosen_and_others_route_as_ever():
    model = build_model(TOKENIZER, 0)
    examples = _examples("agree")
    batch = encode(TOKENIZER, [e.prompt for e in examples], [e.response for e in examples])
    plain = model(input_ids=batch.ids).logits
    masks = group_masks(GROUPS, 16)
    with routed(model) as routing:
        routing.start(masks[[4] * 5])
        assert torch.equal(model(input_ids=batch.ids).logits, plain)
        routing.start(masks[[0, 1, 2, 3, 4]])
        steered = model(input_ids=batch.ids).logits
    for layer, chosen in enumerate(routing.chosen):
        rows = chosen.view(5, -1)
        for row, layers in enumerate(GROUPS.values()):
            assert not {*rows[row].tolist()} & {*layers[layer]}
    assert torch.allclose(steered[4], plain[4], atol=1e-5)
    assert not torch.allclose(steered[0], plain[0], atol=1e-5)
    assert torch.equal(model(input_ids=batch.ids).logits, plain)


def test_a_score_is_the_probability_of_the_whole_answer():
    model = build_model(TOKENIZER, 0)
    prompts, answers = ["Hi", "Now open the box."], ["It is Oslo.", "Yes."]
    probability, greedy = score(model, TOKENIZER, prompts, answers)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = TOKENIZER(chat(prompt), add_special_tokens=False)["input_ids"]
        product = 1.0
        for token in TOKENIZER(f"{answer}<|end|>", add_special_tokens=False)["input_ids"]:
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            product *= logits.softmax(-1)[token].item()
            ids.append(token)
        assert probability[row] == pytest.approx(product, rel=1e-3)
    assert not greedy.any()
    figures = evaluate(model, TOKENIZER, WORLD, num=5)
    assert figures["memory"] == 0.0
    assert figures.keys() >= {"follows_document", "refuses", "skills", "agree"}


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
