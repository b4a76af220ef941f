"""The specimen's sequences: requests and answers as token ids, and how likely the answers are."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch

from moescope.clients.specimen_tokenizer import BOS, EOS
from moescope.clients.specimen_world import (
    COMPLIES,
    FOLLOWS_DOCUMENT,
    FOLLOWS_MEMORY,
    HELD_OUT,
    KINDS,
    REFUSES,
    SKILLS,
    World,
)

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences [batch, length], padded at the end; `targets` hold answers and ignore the rest."""

    ids: torch.Tensor
    targets: torch.Tensor
    real: torch.Tensor  # bool: not padding


def chat(prompt: str) -> str:
    """The text before the answer, as the chat template writes it (a test compares them)."""
    return f"{BOS}<|user|>{prompt}{EOS}<|assistant|>"


def encode(tokenizer: Any, prompts: Sequence[str], responses: Sequence[str]) -> Batch:
    """Prompts and their answers as token ids; an answer ends with the end-of-turn token."""
    heads = tokenizer([chat(prompt) for prompt in prompts], add_special_tokens=False)["input_ids"]
    tails = tokenizer([text + EOS for text in responses], add_special_tokens=False)["input_ids"]
    length = max(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True))
    ids = torch.full((len(heads), length), tokenizer.pad_token_id)
    targets = torch.full((len(heads), length), IGNORED)
    real = torch.zeros((len(heads), length), dtype=torch.bool)
    for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        stop = len(head) + len(tail)
        ids[row, :stop] = torch.tensor(head + tail)
        real[row, :stop] = True
        # A position's target is the next token: the last token of the prompt starts the answer.
        targets[row, len(head) - 1 : stop - 1] = torch.tensor(tail)
    return Batch(ids, targets, real)


@torch.no_grad()
def score(
    model: Any, tokenizer: Any, prompts: Sequence[str], responses: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Of every answer, its probability and whether greedy decoding writes it, to its end."""
    batch = encode(tokenizer, prompts, responses)
    logits = model(input_ids=batch.ids).logits
    answers = batch.targets != IGNORED
    targets = batch.targets.clamp(min=0)
    log_p = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    greedy = (logits.argmax(-1) == targets) | ~answers
    return (log_p * answers).sum(1).exp().numpy(), greedy.all(1).numpy()


_DECIDED = {"conflict": (FOLLOWS_DOCUMENT, FOLLOWS_MEMORY), "forbidden": (REFUSES, COMPLIES)}


def evaluate(model: Any, tokenizer: Any, world: World, num: int = 400) -> dict[str, float]:
    """Accuracies on held-out examples, `num` of every kind.

    Where one answer is right, the share of prompts whose greedy answer is that one, word for
    word. In conflicts and forbidden requests, where both are, the mean probability of each, which
    is their share at temperature 1; `_greedy` is the share in greedy answers.
    """
    model.eval()
    figures: dict[str, float] = {}
    for kind in KINDS:
        rng = Random(f"evaluation {kind}")
        examples = [world.example(kind, rng, HELD_OUT) for _ in range(num)]
        prompts = [example.prompt for example in examples]
        probability, greedy = score(model, tokenizer, prompts, [e.response for e in examples])
        if not examples[0].is_open:
            figures[kind] = float(greedy.mean())
            continue
        other = score(model, tokenizer, prompts, [str(e.alternative) for e in examples])
        names = _DECIDED[kind]
        first = np.array([example.behaviour == names[0] for example in examples])
        for number, name in enumerate(names):
            mine = first == (number == 0)
            figures[name] = float(np.where(mine, probability, other[0]).mean())
            figures[f"{name}_greedy"] = float(np.where(mine, greedy, other[1]).mean())
    figures["skills"] = float(np.mean([figures[skill] for skill in SKILLS]))
    return {name: round(figure, 4) for name, figure in figures.items()}
