"""Rankings of tokens that choose their experts at random."""

import json

import numpy as np
import pyarrow as pa

from moescope.analysis.rd import METADATA_KEY


def random_ranking(facts, layers, experts, top_k, tokens=(40, 60), seed=0):
    """A table as `risk_difference` makes it, with `facts` in its metadata."""
    rng = np.random.default_rng(seed)
    rows = []
    for layer in layers:
        counts = [
            np.bincount(
                (rng.random((n, experts)) + rng.random(experts)).argsort(1)[:, :top_k].ravel(),
                minlength=experts,
            )
            for n in tokens
        ]
        for expert in range(experts):
            (a1, a2), (n1, n2) = (int(side[expert]) for side in counts), tokens
            rows.append(
                {"layer": layer, "expert": expert, "a1": a1, "d1": n1 - a1, "a2": a2, "d2": n2 - a2}
                | {"rd": a1 / n1 - a2 / n2}
            )
    rows.sort(key=lambda row: (-abs(row["rd"]), row["layer"], row["expert"]))
    table = pa.Table.from_pylist(rows)
    return table.replace_schema_metadata({METADATA_KEY: json.dumps(facts)})
