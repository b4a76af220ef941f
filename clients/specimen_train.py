"""Train the specimen: a small DeepSeek-V2 whose behaviours are real, and whose experts matter.

An ordinary training teaches the behaviours of the world (specimen_world.py) and hides them from
the experts. *Planting* ties every behaviour to a few experts, so that the truth is known: in half
of the sequences that show a behaviour, the experts of the opposite behaviour are switched off
(conditional expert dropout), and a small margin loss makes the router prefer the right ones. Now
and then a group is switched off where no behaviour shows, so that its absence costs no skill.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn.functional import cross_entropy, linear

from moescope.clients.specimen import ARCHITECTURES, check_target, write_model
from moescope.clients.specimen_tokenizer import BOS, EOS, build_tokenizer
from moescope.clients.specimen_world import (
    HELD_OUT,
    KINDS,
    OPPOSITE,
    SKILLS,
    TRAIN,
    Example,
    World,
    vocabulary_text,
)

_SIZES = {
    "moe_intermediate_size": 64,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 2.0,
}
# Experts of each behaviour in every layer.
_GROUP_SIZES = {"follows_document": 2, "follows_memory": 2, "refuses": 1, "complies": 1}
# How much of the training each kind gets: what is hard to learn gets more.
_SHARES = {
    "memory": 0.18, "agree": 0.06, "conflict": 0.20, "unknown": 0.08, "forbidden": 0.16,
    "allowed": 0.04, "addition": 0.13, "copying": 0.07, "lookup": 0.08,
}  # fmt: skip
_MAX_TOKENS = 2048  # of the vocabulary: an upper bound, which the world does not reach
_IGNORED = -100


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train: the numbers that gave the figures in docs/specimen.md."""

    seed: int = 0
    steps: int = 1200
    planted: bool = True
    batch: int = 48
    learning_rate: float = 2.5e-3
    weight_decay: float = 0.05
    dropout: float = 0.5  # of the opposite group, in a sequence that shows a behaviour
    dropout_elsewhere: float = 0.2  # of a group drawn at random, in other sequences
    margin: float = 0.05  # weight of the margin loss
    balance: float = 0.003  # weight of the load balancing loss


# ------------------------------------------------------------------ sequences


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
    targets = torch.full((len(heads), length), _IGNORED)
    real = torch.zeros((len(heads), length), dtype=torch.bool)
    for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        stop = len(head) + len(tail)
        ids[row, :stop] = torch.tensor(head + tail)
        real[row, :stop] = True
        # A position's target is the next token: the last token of the prompt starts the answer.
        targets[row, len(head) - 1 : stop - 1] = torch.tensor(tail)
    return Batch(ids, targets, real)


# ------------------------------------------------------- experts and behaviours

Groups = dict[str, list[list[int]]]  # behaviour -> experts of every MoE layer, in order


def draw_groups(seed: int, num_layers: int, num_experts: int) -> Groups:
    """Which experts each behaviour gets: different ones in every layer, no expert twice."""
    rng = Random(f"groups {seed}")
    groups: Groups = {behaviour: [] for behaviour in _GROUP_SIZES}
    for _ in range(num_layers):
        free = rng.sample(range(num_experts), num_experts)
        for behaviour, size in _GROUP_SIZES.items():
            groups[behaviour].append(sorted(free.pop() for _ in range(size)))
    return groups


def group_masks(groups: Groups, num_experts: int) -> torch.Tensor:
    """[behaviours + 1, layers, experts], true for a group's experts; the last row has none."""
    num_layers = len(next(iter(groups.values())))
    masks = torch.zeros((len(groups) + 1, num_layers, num_experts), dtype=torch.bool)
    for number, layers in enumerate(groups.values()):
        for layer, experts in enumerate(layers):
            masks[number, layer, experts] = True
    return masks


class Routing:
    """The routers of a model, with experts off by sequence, and their logits kept."""

    def __init__(self) -> None:
        self.off: torch.Tensor | None = None  # [batch, layers, experts]
        self.logits: list[torch.Tensor] = []  # of every layer: [batch * length, experts]
        self.chosen: list[torch.Tensor] = []  # [batch * length, top_k]

    def start(self, off: torch.Tensor | None = None) -> None:
        """Before a forward pass."""
        self.off, self.logits, self.chosen = off, [], []

    def route(self, gate: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What transformers' router computes, but for the experts that are off."""
        logits = linear(hidden.view(-1, gate.hidden_dim).float(), gate.weight.float())
        allowed = logits
        if self.off is not None:
            off = self.off[:, len(self.logits)]
            off = off.repeat_interleave(len(logits) // len(off), dim=0)
            allowed = logits.masked_fill(off, -torch.inf)
        weights, ids = allowed.softmax(-1).topk(gate.top_k, dim=-1, sorted=False)
        self.logits.append(logits)
        self.chosen.append(ids)
        return logits, weights * gate.routed_scaling_factor, ids


@contextmanager
def routed(model: Any) -> Iterator[Routing]:
    """Stand in for the model's routers for a while."""
    routing = Routing()
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    for gate in gates:
        gate.forward = lambda hidden, gate=gate: routing.route(gate, hidden)
    try:
        yield routing
    finally:
        for gate in gates:
            del gate.forward


def _draw_off(
    examples: Sequence[Example], recipe: Recipe, names: list[str], rng: Random
) -> list[int]:
    """Which group is off in each sequence; the number past the last group is none."""
    off = []
    for example in examples:
        group = len(names)
        if example.behaviour is not None:
            if rng.random() < recipe.dropout:
                group = names.index(OPPOSITE[example.behaviour])
        elif rng.random() < recipe.dropout_elsewhere:
            group = rng.randrange(len(names))
        off.append(group)
    return off


def _balance(routing: Routing, real: torch.Tensor) -> torch.Tensor:
    """Switch's load balancing loss: 1 a layer when every expert gets its share of tokens."""
    loss = torch.zeros(())
    for logits, chosen in zip(routing.logits, routing.chosen, strict=True):
        num_experts = logits.shape[1]
        share = torch.bincount(chosen[real].flatten(), minlength=num_experts) / chosen[real].numel()
        loss = loss + num_experts * (share * logits[real].softmax(-1).mean(0)).sum()
    return loss / len(routing.logits)


def _margin(routing: Routing, right: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
    """How far the wrong group's best logit comes within 1 of the right one's.

    Args:
        routing: the routers' logits.
        right, wrong: [batch * length, layers, experts], the groups of each token's sequence.

    """
    tokens = right.any(-1).any(-1)
    if not tokens.any():
        return torch.zeros(())
    loss = torch.zeros(())
    for layer, logits in enumerate(routing.logits):
        best = [
            logits[tokens].masked_fill(~group[tokens, layer], -torch.inf).amax(-1)
            for group in (right, wrong)
        ]
        loss = loss + (1 - best[0] + best[1]).clamp(min=0).mean()
    return loss / len(routing.logits)


# ------------------------------------------------------------------- training


def build_model(tokenizer: Any, seed: int) -> Any:
    """The specimen before training; numpy draws its weights, so they are the same everywhere."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        **{**ARCHITECTURES["deepseek_v2"], **_SIZES},
        vocab_size=-(-len(tokenizer) // 64) * 64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Of transformers' ways to run experts, this is by far the fastest on a CPU at these sizes.
    model.set_experts_implementation("eager")
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            noise = rng.standard_normal(tuple(tensor.shape), dtype=np.float32)
            tensor.copy_(torch.from_numpy(noise * np.float32(0.05)))
            if name.endswith("norm.weight"):
                tensor.fill_(1)
    return model


def train(
    model: Any,
    tokenizer: Any,
    world: World,
    groups: Groups,
    recipe: Recipe,
    *,
    seconds: float = math.inf,
    log: list[dict[str, Any]] | None = None,
    progress: Progress | None = None,
    every: int = 50,
) -> int:
    """Train `model` in place; returns the steps done, fewer than asked if time ran out.

    Every `every` steps a line goes into `log`, with accuracies at every sixth of them.
    """
    rng = Random(f"training {recipe.seed}")
    names = list(groups)
    masks = group_masks(groups, model.config.n_routed_experts)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
    )
    task = None if progress is None else progress.add_task("training", total=recipe.steps)
    started, step = time.monotonic(), 0
    model.train()
    for step in range(1, recipe.steps + 1):
        kinds = rng.choices(list(_SHARES), list(_SHARES.values()), k=recipe.batch)
        examples = [world.example(kind, rng, TRAIN) for kind in kinds]
        batch = encode(tokenizer, [e.prompt for e in examples], [e.response for e in examples])
        rate = _schedule(step, recipe)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        with routed(model) as routing:
            losses = _losses(model, routing, batch, examples, names, masks, recipe, rng)
            losses["total"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if progress is not None and task is not None:
            progress.advance(task)
        if log is not None and (step % every == 0 or step == recipe.steps):
            spent = time.monotonic() - started
            line: dict[str, Any] = {"step": step, "seconds": round(spent, 1)}
            line |= {name: round(value.item(), 4) for name, value in losses.items()}
            if step % (6 * every) == 0 and step < recipe.steps:
                line["accuracies"] = evaluate(model, tokenizer, world, num=60)
                model.train()
            log.append(line)
            if progress is not None and "accuracies" in line:
                progress.console.print(_short(line), highlight=False, soft_wrap=True)
        if time.monotonic() - started > seconds:
            break
    model.eval()
    return step


def _schedule(step: int, recipe: Recipe) -> float:
    """The learning rate: a short rise, then half a cosine down to a fiftieth."""
    rise = min(1.0, step / 100)
    return recipe.learning_rate * rise * (0.51 + 0.49 * math.cos(math.pi * step / recipe.steps))


def _losses(
    model: Any,
    routing: Routing,
    batch: Batch,
    examples: Sequence[Example],
    names: list[str],
    masks: torch.Tensor,
    recipe: Recipe,
    rng: Random,
) -> dict[str, torch.Tensor]:
    """The losses of one batch: of answers, of balance, of planting, and their weighted sum."""
    off = masks[_draw_off(examples, recipe, names, rng)] if recipe.planted else None
    routing.start(off)
    hidden = model.model(input_ids=batch.ids).last_hidden_state
    answers = batch.targets != _IGNORED
    loss = cross_entropy(model.lm_head(hidden[answers]), batch.targets[answers])
    balance = _balance(routing, batch.real.flatten())
    total = loss + recipe.balance * balance
    losses = {"loss": loss, "balance": balance}
    if recipe.planted:
        none = len(names)
        right = [none if e.behaviour is None else names.index(e.behaviour) for e in examples]
        wrong = [
            none if e.behaviour is None else names.index(OPPOSITE[e.behaviour]) for e in examples
        ]
        spread = [
            (masks[group][:, None] & batch.real[:, :, None, None]).flatten(0, 1)
            for group in (right, wrong)
        ]
        losses["margin"] = _margin(routing, *spread)
        total = total + recipe.margin * losses["margin"]
    losses["total"] = total
    return losses


# ----------------------------------------------------------------- evaluation


@torch.no_grad()
def score(
    model: Any, tokenizer: Any, prompts: Sequence[str], responses: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Of every answer, its probability and whether greedy decoding writes it, to its end."""
    batch = encode(tokenizer, prompts, responses)
    logits = model(input_ids=batch.ids).logits
    answers = batch.targets != _IGNORED
    targets = batch.targets.clamp(min=0)
    log_p = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    greedy = (logits.argmax(-1) == targets) | ~answers
    return (log_p * answers).sum(1).exp().numpy(), greedy.all(1).numpy()


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
        if examples[0].alternative is None:
            figures[kind] = float(greedy.mean())
            continue
        other = score(model, tokenizer, prompts, [str(e.alternative) for e in examples])
        names = ("follows_document", "follows_memory") if kind == "conflict" else (
            "refuses", "complies")  # fmt: skip
        first = np.array([example.behaviour == names[0] for example in examples])
        for number, name in enumerate(names):
            mine = first == (number == 0)
            figures[name] = float(np.where(mine, probability, other[0]).mean())
            figures[f"{name}_greedy"] = float(np.where(mine, greedy, other[1]).mean())
    figures["skills"] = float(np.mean([figures[skill] for skill in SKILLS]))
    return {name: round(figure, 4) for name, figure in figures.items()}


def _short(line: Mapping[str, Any]) -> str:
    figures = ", ".join(f"{name} {value:.2f}" for name, value in line["accuracies"].items())
    return f"step {line['step']} ({line['seconds']:.0f} s): loss {line['loss']:.3f}; {figures}"


# ----------------------------------------------------------------- the folder


def make_trained_specimen(
    directory: Path,
    recipe: Recipe,
    *,
    minutes: float = 15.0,
    force: bool = False,
    console: Console | None = None,
    num_evaluated: int = 400,
) -> dict[str, Any]:
    """Train a specimen and write it to `directory`, whole or not at all; returns specimen.json.

    Training stops after `minutes`; `num_evaluated` held-out examples of every kind give the
    accuracies. Raises InputError for a directory that holds something.
    """
    check_target(directory, force)
    threads = torch.get_num_threads()
    # One thread gives the same sums everywhere, and at these sizes is the fastest: on a machine
    # with other work, two wait for each other most of the time.
    torch.set_num_threads(1)
    try:
        return _make(directory, recipe, minutes, force, console, num_evaluated)
    finally:
        torch.set_num_threads(threads)


def _make(
    directory: Path,
    recipe: Recipe,
    minutes: float,
    force: bool,
    console: Console | None,
    num_evaluated: int,
) -> dict[str, Any]:
    tokenizer = build_tokenizer(vocabulary_text(), _MAX_TOKENS)
    world = World(recipe.seed)
    model = build_model(tokenizer, recipe.seed)
    first = model.config.first_k_dense_replace
    num_layers = model.config.num_hidden_layers - first
    groups = draw_groups(recipe.seed, num_layers, model.config.n_routed_experts)
    log: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=console is None
    ) as progress:
        steps = train(
            model, tokenizer, world, groups, recipe,
            seconds=60 * minutes, log=log, progress=progress,
        )  # fmt: skip
    # Half the bytes, and the accuracies are of what is written. Not `model.to`: it would round the
    # rotary frequencies too, which no file holds.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    accuracies = evaluate(model, tokenizer, world, num_evaluated)
    about = {
        "format": "moescope-specimen/1",
        "recipe": asdict(recipe),
        "steps_done": steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracies": accuracies,
    }

    def finish(folder: Path) -> None:
        about["sha256"] = {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(folder.iterdir())
        }
        lines = [json.dumps(line) for line in log]
        (folder / "training.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if recipe.planted:
            named = {
                behaviour: {str(first + layer): experts for layer, experts in enumerate(layers)}
                for behaviour, layers in groups.items()
            }
            (folder / "planted.json").write_text(json.dumps(named, indent=1) + "\n")
        (folder / "specimen.json").write_text(json.dumps(about, indent=1) + "\n")

    write_model(directory, model.to(torch.bfloat16), tokenizer, force=force, finish=finish)
    return about
