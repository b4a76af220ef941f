"""Masks for engines of four layers and sixteen experts, and the proof that one was obeyed."""

import numpy as np

from moescope.tracer.mask import Mask


def mask_of(name, seed):
    """Two experts off and one on, in every layer of the specimen."""
    rng = np.random.default_rng(seed)
    entries = []
    for layer in range(4):
        off, also_off, on = rng.permutation(16)[:3].tolist()
        entries += [
            {"layer": layer, "expert": off, "action": "deactivate"},
            {"layer": layer, "expert": also_off, "action": "deactivate"},
            {"layer": layer, "expert": on, "action": "activate"},
        ]
    return {"name": name, "entries": entries}


def violations(mask, experts):
    """Tokens that chose a deactivated expert, or did not choose an activated one."""
    count = 0
    for entry in Mask.model_validate(mask).entries:
        chosen = (experts[:, entry.layer] == entry.expert).any(-1)
        count += int((chosen == (entry.action == "deactivate")).sum())
    return count
