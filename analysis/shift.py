"""Two runs, conditions or masks compared: where did the choices of each layer go? (shift.sql)"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from moescope.analysis.questions import Selection, Store, check_chosen
from moescope.analysis.views import ask, reading
from moescope.tracer.errors import InputError

Array = NDArray[np.float64]

RELABELLINGS = 200


@dataclass(frozen=True, slots=True)
class Shift:
    """What `compare` found; its tables' columns are those of shift.sql.

    `layers` has in addition `by_chance` and `p_value` (null where there are too few requests) and,
    of tokens that both sides have, `same_experts` (the part of them that chose the same set) and
    `kept` (the mean part of the chosen experts that stayed). `replaced` says which experts took a
    lost one's place on those tokens: layer, lost, gained, tokens.
    """

    layers: pa.Table
    experts: pa.Table
    replaced: pa.Table
    pairs: int
    paired_tokens: int


def compare(
    store: Store,
    a: Selection,
    b: Selection,
    *,
    segment: str | None = None,
    relabellings: int = RELABELLINGS,
    seed: int = 0,
) -> Shift:
    """How routing shifts from side `a` to side `b`, layer by layer and expert by expert.

    Two samples of the same routing differ too: `by_chance` is the mean total variation when the
    requests fall to the sides at random, and `p_value` how often that is at least as large as what
    was found (counting the found one itself). Requests that pair (shift.sql says when) swap sides
    within their pair, others are shuffled.

    Raises InputError when the sides are the same, or one of them has no token.
    """
    sides = (replace(a, segment=segment), replace(b, segment=segment))
    if sides[0] == sides[1]:
        raise InputError(f"both sides are {a}: name two runs, conditions or masks.")
    filters = {
        f"{name}_{side}": getattr(chosen, name)
        for name in ("run", "condition", "mask")
        for side, chosen in zip("ab", sides, strict=True)
    } | {"in_segment": segment}
    arguments = ", ".join(f"{name} := ${name}" for name in filters)
    with reading(store) as con:
        for side in sides:
            check_chosen(con, side)
        experts = ask(con, f"FROM expert_shift({arguments}) ORDER BY layer, expert", **filters)
        layers = ask(con, f"FROM layer_shift({arguments}) ORDER BY layer", **filters)
        kept = ask(con, f"FROM kept_experts({arguments}) ORDER BY layer", **filters)
        replaced = ask(
            con,
            f"FROM replaced_experts({arguments}) ORDER BY layer, lost, tokens DESC, gained",
            **filters,
        )
        pairs = ask(
            con,
            f"SELECT DISTINCT request_a, request_b FROM paired_tokens({arguments}) ORDER BY ALL",
            **filters,
        )
        counts = [_request_counts(con, side) for side in sides]
    chance = _by_chance(counts, pairs, layers.num_rows, relabellings, seed)
    found = layers["total_variation"].to_numpy()
    nothing = pa.nulls(layers.num_rows, pa.float64())
    for name, values in (
        ("by_chance", nothing if chance is None else pa.array(chance.mean(axis=0))),
        ("p_value", nothing if chance is None else pa.array(_p_values(chance, found))),
        ("same_experts", kept["same_experts"] if kept.num_rows else nothing),
        ("kept", kept["kept"] if kept.num_rows else nothing),
    ):
        layers = layers.append_column(name, values)
    tokens = kept["tokens"][0].as_py() if kept.num_rows else 0
    return Shift(layers, experts, replaced, pairs.num_rows, tokens)


def _request_counts(
    con: duckdb.DuckDBPyConnection, chosen: Selection
) -> tuple[list[str], NDArray[np.int64]]:
    """(request ids, [requests, layers, experts] of choices) of a side, in order of ids."""
    filters = chosen.filters()
    arguments = ", ".join(f"{name} := ${name}" for name in filters)
    table = ask(
        con,
        "SELECT request_id, layer, expert, count(*) AS count "
        f"FROM chosen_routes({arguments}) GROUP BY ALL",
        **filters,
    )
    [model] = ask(con, "FROM model").to_pylist()
    ids = pc.unique(table["request_id"]).sort()
    at = pc.index_in(table["request_id"], value_set=ids).to_numpy()
    layers = np.searchsorted(model["moe_layers"], table["layer"].to_numpy())
    counts = np.zeros((len(ids), len(model["moe_layers"]), model["num_experts"]), np.int64)
    counts[at, layers, table["expert"].to_numpy()] = table["count"].to_numpy()
    return ids.to_pylist(), counts


def _by_chance(
    sides: Sequence[tuple[list[str], NDArray[np.int64]]],
    partners: pa.Table,
    num_layers: int,
    relabellings: int,
    seed: int,
) -> Array | None:
    """[relabellings, layers]: total variation with requests on either side at random.

    None when a side has less than four requests, or the sides share one.
    """
    (ids_a, counts_a), (ids_b, counts_b) = sides
    if min(len(ids_a), len(ids_b)) < 4 or set(ids_a) & set(ids_b):
        return None
    rng = np.random.default_rng(seed)
    counts = np.concatenate([counts_a, counts_b]).astype(np.float64)
    place = {name: at for at, name in enumerate([*ids_a, *ids_b])}
    pairs = np.array(
        [
            (place[row["request_a"]], place[row["request_b"]])
            for row in partners.to_pylist()
            if row["request_a"] in place and row["request_b"] in place
        ],
        dtype=np.int64,
    ).reshape(-1, 2)
    alone = np.setdiff1d(np.arange(len(counts)), pairs)
    alone_in_b = int((alone >= len(ids_a)).sum())
    total, flat = counts.sum(axis=0), counts.reshape(len(counts), -1)
    found = np.empty((relabellings, num_layers))
    for draw in range(relabellings):
        in_b = np.zeros(len(counts))
        in_b[pairs[np.arange(len(pairs)), rng.integers(0, 2, len(pairs))]] = 1
        in_b[rng.permutation(alone)[:alone_in_b]] = 1
        on_b = (in_b @ flat).reshape(total.shape)
        shares = [side / side.sum(axis=1, keepdims=True) for side in (total - on_b, on_b)]
        found[draw] = np.abs(shares[1] - shares[0]).sum(axis=1) / 2
    return found


def _p_values(chance: Array, found: Array) -> Array:
    """How often chance gives what was found or more, that one counted (Phipson, Smyth 2010)."""
    slack = 1e-12  # sums in another order
    return (1 + (chance >= found - slack).sum(axis=0)) / (1 + len(chance))
