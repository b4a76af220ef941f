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


def assert_comes_and_goes(store, mask, first=0):
    """A global mask that came while requests ran, and went: all layers obey it for the same tokens.

    Those that the trace says it was in force for. Just before it came, and just after it went,
    no layer obeys it for all requests: a layer or a rank that changed in another step would.
    """
    from moescope.analysis import open_store
    from moescope.tracer.store import read_manifest

    shape = read_manifest(store).shape
    requests = (
        open_store(store)
        .execute(
            "SELECT list(mask ORDER BY position), list(expert_ids ORDER BY position) "
            "FROM tokens GROUP BY request_id"
        )
        .fetchall()
    )
    edges = []
    for names, experts in requests:
        assert set(names) == {None, mask["name"]}
        under = [index for index, name in enumerate(names) if name is not None]
        begin, end = under[0], under[-1] + 1
        assert under == list(range(begin, end))
        experts = np.array(experts).reshape(-1, len(shape.layers), shape.top_k)
        wrong = violations(mask, experts[begin:end], first)
        assert not wrong, f"{wrong} choices against {mask['name']} among {end - begin} tokens"
        edges.append(experts[[begin - 1, end]])
    for edge in np.stack(edges, axis=1):  # [requests, layers, top_k]
        for layer in shape.layers:
            of_layer = [entry for entry in mask["entries"] if entry["layer"] == layer]
            unsteered = violations(mask | {"entries": of_layer}, edge, first)
            assert unsteered, f"layer {layer} obeys {mask['name']} beside the tokens that are its"
    return len(requests)
