"""Load, co-activation, an expert's tokens, a request's routing: questions.sql from Python.

Every function takes a store's path or a connection of `open_store`, and a `Selection` of tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import duckdb
import pyarrow as pa

from moescope.analysis.views import ask, reading
from moescope.tracer.errors import InputError
from moescope.tracer.mask_format import number_ranges

Store = str | Path | duckdb.DuckDBPyConnection

_NAMES = ("run", "condition", "mask")


@dataclass(frozen=True, slots=True)
class Selection:
    """Which tokens count. A mask is the one in force at the token; "none" is where none was."""

    run: str | None = None
    condition: str | None = None
    mask: str | None = None
    segment: str | None = None

    @classmethod
    def parse(cls, texts: Sequence[str], segment: str | None = None) -> "Selection":
        """From texts such as "run=first" and "mask=follow"; InputError for another name."""
        found: dict[str, str] = {}
        for text in texts:
            name, equals, value = text.partition("=")
            if name not in _NAMES or not equals or name in found:
                raise InputError(
                    f"can't choose tokens by {text!r}: give NAME=VALUE, with each of the names "
                    f"{', '.join(_NAMES)} once."
                )
            found[name] = value
        return cls(segment=segment, **found)

    def filters(self) -> dict[str, str | None]:
        """The filters of the macros in questions.sql."""
        return {f"in_{name}": getattr(self, name) for name in (*_NAMES, "segment")}

    def __str__(self) -> str:
        said = [
            f"{name}={value}"
            for name in (*_NAMES, "segment")
            if (value := getattr(self, name)) is not None
        ]
        return ", ".join(said) or "all tokens"


ALL = Selection()


@dataclass(frozen=True, slots=True)
class Context:
    """A token that chose an expert, where it stands: ids before it, its own, ids after it."""

    request_id: str
    position: int
    weight: float | None
    before: list[int]
    token_id: int
    after: list[int]


def expert_load(store: Store, chosen: Selection = ALL) -> pa.Table:
    """How much of each layer's choices every expert has; also experts that no token chose.

    Columns layer, expert, count, share, load (share over the even share), gate_mass.
    """
    return _of_macro(store, chosen, "FROM expert_load({}) ORDER BY layer, expert")


def layer_load(store: Store, chosen: Selection = ALL, *, overload: float = 3) -> pa.Table:
    """One row a layer: how evenly its experts are chosen (questions.sql has the definitions).

    Columns layer, tokens, entropy (nats), evenness, effective, dead, overused, busiest,
    busiest_load.
    """
    query = "FROM layer_load({}, overload := $overload) ORDER BY layer"
    return _of_macro(store, chosen, query, overload=overload)


def coactivation(store: Store, layer: int, chosen: Selection = ALL) -> pa.Table:
    """Every pair of a layer's chosen experts, those of largest lift first.

    Columns expert, other, together, count, other_count, tokens, lift, pmi (bits).
    """
    query = "FROM coactivation($layer, {}) ORDER BY lift DESC, expert, other"
    with reading(store) as con:
        _check_place(con, layer)
        return _of_macro(con, chosen, query, layer=layer)


def even_lift(num_experts: int, top_k: int) -> float:
    """The lift of two experts of a router that chooses its k experts at random, all alike.

    P(both) = k(k-1) / (E(E-1)), P(one) = k/E: a token that took one has a place less for the other.
    """
    if num_experts < 2:
        return 0.0
    return (top_k - 1) / top_k * num_experts / (num_experts - 1)


def expert_tokens(
    store: Store,
    layer: int,
    expert: int,
    chosen: Selection = ALL,
    *,
    by: Literal["lift", "count"] = "lift",
    min_total: int = 5,
) -> pa.Table:
    """The token ids that choose an expert, by lift or by count.

    By lift, ids that occur less than `min_total` times are left out: any of them may stand out by
    chance. Columns token_id, count, total, rate, lift, mean_weight.
    """
    order = {"lift": "lift DESC, total DESC", "count": "count DESC, lift DESC"}
    if by not in order:
        raise InputError(f"can't rank tokens by {by!r}: choose lift or count.")
    query = (
        "FROM expert_tokens($layer, $expert, {}) WHERE total >= $least "
        f"ORDER BY {order[by]}, token_id"
    )
    least = min_total if by == "lift" else 1
    with reading(store) as con:
        _check_place(con, layer, expert)
        return _of_macro(con, chosen, query, layer=layer, expert=expert, least=least)


def contexts(
    store: Store,
    layer: int,
    expert: int,
    token_ids: Sequence[int],
    chosen: Selection = ALL,
    *,
    around: int = 8,
    each: int = 3,
) -> dict[int, list[Context]]:
    """Where each of these token ids chose an expert: up to `each` places of it.

    Those of largest gate weight come first; `around` tokens of the request stand on either side.
    """
    query = (
        "FROM expert_contexts($layer, $expert, $ids, at_most := $each, around := $around, {}) "
        "ORDER BY weight DESC, request_id, position"
    )
    found: dict[int, list[Context]] = {token_id: [] for token_id in token_ids}
    with reading(store) as con:
        _check_place(con, layer, expert)
        rows = _of_macro(
            con, chosen, query, layer=layer, expert=expert, ids=list(token_ids),
            each=each, around=around,
        )  # fmt: skip
    for row in rows.to_pylist():
        found[row["token_id"]].append(Context(**row))
    return found


def request_routing(store: Store, request_id: str) -> pa.Table:
    """A request's routing: columns position, token_id, segment, mask, layer, experts, weights.

    A row a token and layer; both lists are in the order of the ranks.
    """
    with reading(store) as con:
        table = ask(con, "FROM request_routing(?) ORDER BY position, layer", request_id)
        if table.num_rows == 0:
            some = ask(con, "SELECT request_id FROM requests ORDER BY request_id LIMIT 3")
            ids = ", ".join(some["request_id"].to_pylist()) or "none"
            raise InputError(
                f'no request {request_id!r} has tokens here: `moescope sql STORE "SELECT '
                f'request_id FROM requests"` lists them (the first: {ids}).'
            )
    return table


def parse_expert(text: str) -> tuple[int, int]:
    """(12, 7) of "L12E07"; InputError for anything else."""
    match = re.fullmatch(r"[Ll](\d+)[Ee](\d+)", text)
    if match is None:
        raise InputError(f"can't read the expert {text!r}: write layer and expert as L12E07.")
    return int(match[1]), int(match[2])


def read_model(store: Store) -> dict[str, Any]:
    """The row of the table `model`."""
    with reading(store) as con:
        return ask(con, "FROM model").to_pylist()[0]


def _check_place(con: duckdb.DuckDBPyConnection, layer: int, expert: int | None = None) -> None:
    model = read_model(con)
    layers, experts = model["moe_layers"], model["num_experts"]
    if layer not in layers or (expert or 0) >= experts:
        wanted = f"MoE layer {layer}" if expert is None else f"expert {expert} of layer {layer}"
        raise InputError(
            f"there is no {wanted}: the model has the MoE layers {number_ranges(layers)}, with the "
            f"experts 0 to {experts - 1}."
        )


def _of_macro(store: Store, chosen: Selection, query: str, **named: Any) -> pa.Table:
    """The rows of a query whose {} stands for the filters; InputError if no token is chosen."""
    filters = chosen.filters()
    arguments = ", ".join(f"{name} := ${name}" for name in filters)
    with reading(store) as con:
        check_chosen(con, chosen)
        return ask(con, query.format(arguments), **filters, **named)


def check_chosen(con: duckdb.DuckDBPyConnection, chosen: Selection) -> None:
    """InputError if a selection has no token."""
    filters = chosen.filters()
    arguments = ", ".join(f"{name} := ${name}" for name in filters)
    query = f"SELECT 1 FROM chosen_tokens({arguments}) LIMIT 1"
    if ask(con, query, **filters).num_rows == 0:
        names = {"segment": "tokens", "mask": "tokens", "run": "requests", "condition": "requests"}
        there = [
            f"{name}: {', '.join(map(str, values)) or 'none'}"
            for name, view in names.items()
            if getattr(chosen, name) is not None
            for values in [
                ask(con, f"SELECT DISTINCT {name} FROM {view} ORDER BY 1 LIMIT 20")[0].to_pylist()
            ]
        ]
        raise InputError(f"the store has no token with {chosen}. It has {'; '.join(there)}.")
