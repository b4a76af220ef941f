from random import Random

import pytest
import torch

from moescope.clients.specimen_sequences import IGNORED, chat, encode, evaluate, score
from moescope.clients.specimen_tokenizer import build_tokenizer
from moescope.clients.specimen_train import build_model
from moescope.clients.specimen_world import HELD_OUT, World, vocabulary_text

TOKENIZER = build_tokenizer(vocabulary_text(), 2048)
WORLD = World(0)


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
    answer = batch.targets[0][batch.targets[0] != IGNORED].tolist()
    assert TOKENIZER.decode(answer) == f"{example.response}<|end|>"
    # A target is the token after.
    where = (batch.targets != IGNORED).nonzero()
    for row, column in where.tolist():
        assert batch.ids[row, column + 1] == batch.targets[row, column]


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
