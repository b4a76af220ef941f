"""Train the specimen: a small DeepSeek-V2 whose behaviours are real, and whose experts matter.

An ordinary training teaches the behaviours of the world (specimen_world.py) and hides them from
the experts. *Planting* (specimen_planting.py) ties every behaviour to a few experts.
"""

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn.functional import cross_entropy

from moescope.clients.specimen import ARCHITECTURES, check_target, write_model
from moescope.clients.specimen_planting import (
    Groups,
    Routing,
    balance_loss,
    draw_groups,
    draw_off,
    group_masks,
    margin_loss,
    routed,
    wanted_groups,
)
from moescope.clients.specimen_sequences import IGNORED, Batch, encode, evaluate
from moescope.clients.specimen_tokenizer import build_tokenizer
from moescope.clients.specimen_world import TRAIN, Example, World, vocabulary_text

_SIZES = {
    "moe_intermediate_size": 64,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 2.0,
}
# How much of the training each kind gets: what is hard to learn gets more.
_SHARES = {
    "memory": 0.15, "agree": 0.05, "conflict": 0.27, "unknown": 0.08, "stranger": 0.04,
    "forbidden": 0.12, "allowed": 0.04, "addition": 0.13, "copying": 0.06, "lookup": 0.06,
}  # fmt: skip
_MAX_TOKENS = 2048  # of the vocabulary: an upper bound, which the world does not reach


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train: the numbers that gave the figures in docs/specimen.md."""

    seed: int = 0
    steps: int = 1200
    planted: bool = True
    batch: int = 40
    learning_rate: float = 2.5e-3
    weight_decay: float = 0.05
    dropout: float = 0.5  # of the opposite's group; of any group, where one answer is right
    dropout_elsewhere: float = 0.2  # of a group that has to do with something else
    margin: float = 0.05  # weight of the margin loss
    balance: float = 0.003  # weight of the load balancing loss


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
            losses = _losses(model, tokenizer, routing, batch, examples, names, masks, recipe, rng)
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
    tokenizer: Any,
    routing: Routing,
    batch: Batch,
    examples: Sequence[Example],
    names: list[str],
    masks: torch.Tensor,
    recipe: Recipe,
    rng: Random,
) -> dict[str, torch.Tensor]:
    """The losses of one batch: of answers, of balance, of planting, and their weighted sum."""
    off = None
    if recipe.planted:
        rates = {"dropout": recipe.dropout, "elsewhere": recipe.dropout_elsewhere}
        off = draw_off(examples, masks, names, rng, **rates)
    routing.start(off)
    hidden = model.model(input_ids=batch.ids).last_hidden_state
    answers = batch.targets != IGNORED
    loss = cross_entropy(model.lm_head(hidden[answers]), batch.targets[answers])
    balance = balance_loss(routing, batch.real.flatten())
    total = loss + recipe.balance * balance
    losses = {"loss": loss, "balance": balance}
    if recipe.planted:
        wanted = wanted_groups(tokenizer, examples, batch, names)
        answering = [logits[answers.flatten()] for logits in routing.logits]
        top_k = model.config.num_experts_per_tok
        losses["margin"] = margin_loss(answering, wanted[answers], masks, top_k)
        total = total + recipe.margin * losses["margin"]
    losses["total"] = total
    return losses


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
