"""Routers, logits and masks for tests of steered routing, and ten lines of reference."""

import numpy as np
import torch

from moescope.tracer.format import MoeShape
from moescope.tracer.mask import ACTIVATE, DEACTIVATE, RouterSpec, compile_mask, make_mask
from moescope.tracer.reroute import SteerTables

EXPERTS, TOP_K, GROUPS = 16, 4, 4
SHAPE = MoeShape((3, 4), EXPERTS, TOP_K)
LAYER = 1  # the second MoE layer, number 4

FAMILIES = {
    "softmax": RouterSpec("softmax", renormalize=False),
    "softmax renormalized": RouterSpec("softmax", renormalize=True),
    "softmax with bias": RouterSpec("softmax", True, correction_bias=True, scaling=1.5),
    "grouped softmax": RouterSpec("softmax", False, GROUPS, 2, scaling=16.0),
    "grouped softmax renormalized": RouterSpec("softmax", True, GROUPS, 3),
    "grouped softmax with bias": RouterSpec("softmax", False, GROUPS, 2, True),
    "sigmoid": RouterSpec("sigmoid", renormalize=False),
    "sigmoid with bias": RouterSpec("sigmoid", True, correction_bias=True, scaling=2.5),
    "grouped sigmoid": RouterSpec("sigmoid", True, GROUPS, 1),
    "grouped sigmoid with bias": RouterSpec("sigmoid", True, GROUPS, 2, True, 2.5),
    "sqrtsoftplus with bias": RouterSpec("sqrtsoftplus", True, correction_bias=True, scaling=1.5),
}
SCORES_64 = {
    "softmax": lambda x: np.exp(x - x.max()) / np.exp(x - x.max()).sum(),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "sqrtsoftplus": lambda x: np.sqrt(np.logaddexp(0, x)),
}
SCORES_32 = {
    "softmax": lambda x: torch.softmax(x, -1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda x: torch.nn.functional.softplus(x).sqrt(),
}


# Ten lines of reference: one token, plain Python.


def reference_choice(scores, action, spec, priority):
    """The experts of a token; `scores` are what it chooses by, ties go by ascending `priority`."""
    size = EXPERTS // spec.num_groups
    usable = [e for e in range(EXPERTS) if action[e] != DEACTIVATE]

    def group_key(group):
        best = sorted((scores[e] for e in usable if e // size == group), reverse=True)
        score = sum(best[: 2 if spec.correction_bias else 1], np.float32(0)) if best else -np.inf
        return -score, min(priority[group * size : (group + 1) * size])

    groups = sorted(range(spec.num_groups), key=group_key)[: spec.topk_groups]
    tier = {e: 0 if action[e] == ACTIVATE else 1 + (e // size not in groups) for e in usable}
    return sorted(usable, key=lambda e: (tier[e], -scores[e], priority[e]))[:TOP_K]


def reference_weights(edited, ids, scale, spec, renormalise):
    """The gate weights in float64: the router's own, then the factors."""
    gate = SCORES_64[spec.scoring](edited.astype(np.float64))[ids]
    gate = (gate / gate.sum() if spec.renormalize else gate) * spec.scaling
    scaled = gate * scale[ids]
    return scaled * gate.sum() / scaled.sum() if renormalise and scaled.sum() > 1e-37 else scaled


def choice_scores(edited, spec, correction):
    """What a router chooses by, float32 [n, E]: softmax of logits keeps their order."""
    if spec.scoring == "softmax" and spec.num_groups == 1 and correction is None:
        return edited.numpy()
    scores = SCORES_32[spec.scoring](edited)
    return (scores if correction is None else scores + correction).numpy()


# Random inputs, all from a seed.


def random_logits(rng, tokens=4):
    kind = rng.choice(["smooth", "ties", "wide", "flat"])
    logits = rng.normal(size=(tokens, EXPERTS)) * {"wide": 30}.get(kind, 2)
    if kind == "ties":
        logits = np.round(logits)
    if kind == "flat":
        logits = np.zeros_like(logits) - 0.0 * rng.choice([-1, 1], logits.shape)
    return torch.tensor(logits, dtype=torch.float32)


def random_correction(rng, spec):
    if not spec.correction_bias:
        return None
    return torch.tensor(rng.choice([-2.0, -0.5, 0.0, 1.0], EXPERTS), dtype=torch.float32)


def plain_routing(logits, spec, correction, rng):
    """Routing without masks, as vLLM gives it: ties broken and experts ordered at random."""
    ids = [
        rng.permutation(reference_choice(row, np.zeros(EXPERTS), spec, rng.permutation(EXPERTS)))
        for row in choice_scores(logits, spec, correction)
    ]
    weights = [
        reference_weights(row, chosen, np.ones(EXPERTS), spec, False)
        for row, chosen in zip(logits.numpy(), ids, strict=True)
    ]
    return (
        torch.tensor(np.array(weights), dtype=torch.float32),
        torch.tensor(np.array(ids), dtype=torch.int32),
    )


def random_mask(rng, *, steermoe=False, biases=True):
    entries = []
    for layer in SHAPE.layers:
        order = rng.permutation(EXPERTS).tolist()
        active, off = rng.integers(0, TOP_K + 1), rng.integers(0, EXPERTS - TOP_K + 1)
        off = min(off, EXPERTS - active)
        on, out = order[:active], order[EXPERTS - off :]
        entries += [{"layer": layer, "expert": e, "action": "activate"} for e in on]
        entries += [{"layer": layer, "expert": e, "action": "deactivate"} for e in out]
        if not steermoe:
            for e in order[: EXPERTS - off]:
                if rng.random() < 0.3:
                    value = float(rng.choice([0.0, 0.5, 3.0]))
                    entries.append({"layer": layer, "expert": e, "action": "scale", "value": value})
                if biases and rng.random() < 0.3:
                    value = float(rng.normal() * 4)
                    entries.append({"layer": layer, "expert": e, "action": "bias", "value": value})
    fields = {"mode": "steermoe"} if steermoe else {"renormalise": bool(rng.random() < 0.5)}
    return make_mask(name="random", entries=entries, **fields)


def tables_with(*masks, max_tokens=64):
    """Tables whose slot 0 is empty and whose slots 1, 2, ... hold the masks."""
    tables = SteerTables(SHAPE, 1 + len(masks), max_tokens)
    for slot, mask in enumerate(masks, start=1):
        tables.set_slot(slot, compile_mask(mask, SHAPE))
    return tables
