"""Planting: ties every behaviour of a specimen to a few experts while it is trained.

Each behaviour has experts of its own in every MoE layer. Two things tie it to them:

    conditional expert dropout   now and then the experts of the opposite behaviour can't be chosen
    a margin loss                the router is to choose the right ones, and no other planted ones

What is planted is thus known, and is the truth that an analysis has to find.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import torch
from torch.nn.functional import linear

from moescope.clients.specimen_sequences import IGNORED, Batch
from moescope.clients.specimen_world import OPPOSITE, Example

# Experts of each behaviour in every layer.
_GROUP_SIZES = {"follows_document": 1, "follows_memory": 1, "refuses": 1, "complies": 1}
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
    """[behaviours, layers, experts], true for a group's experts."""
    num_layers = len(next(iter(groups.values())))
    masks = torch.zeros((len(groups), num_layers, num_experts), dtype=torch.bool)
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


def draw_off(
    examples: Sequence[Example],
    masks: torch.Tensor,
    names: list[str],
    rng: Random,
    *,
    dropout: float,
    elsewhere: float,
) -> torch.Tensor:
    """Which experts are off in each sequence: [batch, layers, experts].

    Where a coin decided the answer, the group of the opposite is off at the rate `dropout`, and
    one that has to do with something else at the rate `elsewhere`. Where one answer is right, any
    group is, at the rate `dropout`, so that the absence of a group alone costs nothing.
    """
    off = torch.zeros((len(examples), *masks.shape[1:]), dtype=torch.bool)
    for row, example in enumerate(examples):
        dropped = []
        if example.is_open:
            pair = (str(example.behaviour), OPPOSITE[str(example.behaviour)])
            if rng.random() < dropout:
                dropped.append(pair[1])
            if rng.random() < elsewhere:
                dropped.append(rng.choice([name for name in names if name not in pair]))
        elif rng.random() < dropout:
            dropped.append(rng.choice(names))
        for name in dropped:
            off[row] |= masks[names.index(name)]
    return off


def balance_loss(routing: Routing, real: torch.Tensor) -> torch.Tensor:
    """Switch's load balancing loss: 1 a layer when every expert gets its share of tokens."""
    loss = torch.zeros(())
    for logits, chosen in zip(routing.logits, routing.chosen, strict=True):
        num_experts = logits.shape[1]
        share = torch.bincount(chosen[real].flatten(), minlength=num_experts) / chosen[real].numel()
        loss = loss + num_experts * (share * logits[real].softmax(-1).mean(0)).sum()
    return loss / len(routing.logits)


def wanted_groups(
    tokenizer: Any, examples: Sequence[Example], batch: Batch, names: list[str]
) -> torch.Tensor:
    """Which groups each token should be routed to: [batch, length, behaviours], true for wanted.

    The group of what the answer does, and no other. Where a coin decides the answer, nothing up
    to the word that shows how it fell can know: there both groups are wanted, so that either may
    be missed. Only tokens with a target count: the answer's, and the one that starts it.
    """
    wanted = torch.zeros((*batch.ids.shape, len(names)), dtype=torch.bool)
    for row, example in enumerate(examples):
        if example.behaviour is None:
            continue
        wanted[row, :, names.index(example.behaviour)] = True
        if example.alternative is not None:
            answers = [example.response, example.alternative]
            one, other = tokenizer(answers, add_special_tokens=False)["input_ids"]
            pairs = enumerate(zip(one, other, strict=False))
            shared = next((place for place, (a, b) in pairs if a != b), len(one))
            start = int((batch.targets[row] != IGNORED).nonzero()[0]) + 1
            wanted[row, : start + shared, names.index(OPPOSITE[example.behaviour])] = True
    return wanted


def margin_loss(
    routed: Sequence[torch.Tensor], wanted: torch.Tensor, masks: torch.Tensor, top_k: int
) -> torch.Tensor:
    """How far the planted experts' logits are from being chosen, or not, by a margin of 1.

    Args:
        routed: the routers' logits of every layer, [tokens, experts].
        wanted: [tokens, behaviours], the groups whose experts should be chosen.
        masks: [behaviours, layers, experts], true for a group's experts.
        top_k: experts a token.

    """
    loss = torch.zeros(())
    for layer, logits in enumerate(routed):
        groups = masks[:, layer]
        # The experts of no group, best first: what a planted expert has to pass, or not to.
        free = logits.detach()[:, ~groups.any(0)].topk(top_k, dim=-1).values
        for group, chosen in zip(groups, wanted.unbind(-1), strict=True):
            planted = logits[:, group]
            # The last but one: where two groups are wanted, two of the top k are theirs.
            low = (1 - planted + free[:, -2:-1]).clamp(min=0)[chosen]
            high = (1 + planted - free[:, -1:]).clamp(min=0)[~chosen]
            loss = loss + low.sum() / max(low.numel(), 1) + high.sum() / max(high.numel(), 1)
    return loss / len(routed)
