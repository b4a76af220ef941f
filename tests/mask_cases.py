"""Masks for small engines, and the proof that one was obeyed."""

import numpy as np

from moescope.tracer.mask import Mask


def mask_of(name, seed, layers=range(4), experts=16):
    """Two experts off and one on, in every one of `layers`; the defaults are the specimens'."""
    rng = np.random.default_rng(seed)
    entries = []
    for layer in layers:
        off, also_off, on = rng.permutation(experts)[:3].tolist()
        entries += [
            {"layer": layer, "expert": off, "action": "deactivate"},
            {"layer": layer, "expert": also_off, "action": "deactivate"},
            {"layer": layer, "expert": on, "action": "activate"},
        ]
    return {"name": name, "entries": entries}


def violations(mask, experts, first=0):
    """Tokens that chose a deactivated expert, or did not choose an activated one.

    `experts` [tokens, MoE layers, top_k] are of the layers from `first` on.
    """
    count = 0
    for entry in Mask.model_validate(mask).entries:
        chosen = (experts[:, entry.layer - first] == entry.expert).any(-1)
        count += int((chosen == (entry.action == "deactivate")).sum())
    return count
