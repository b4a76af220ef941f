"""Risk differences: which experts are chosen more often under one condition than another.

    RD(layer, expert) = E[A | positive] - E[A | negative]

A is whether a token selected the expert, or the gate weight that it gave. docs/statistics.md has
the definitions. The way of the data:

    rd_requests.py   which requests and which of their tokens count
    token_files.py   the tokens, read from Parquet
    counts.py        each request's count of every expert, or from the store's aggregate.py
    rd_examples.py   requests added up to conditions, and to examples
    rd_estimates.py  the columns; how sure they are says inference.py
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import duckdb
import numpy as np
import pyarrow as pa

from moescope.analysis.aggregate import read_aggregate
from moescope.analysis.rd_estimates import Experts, Source
from moescope.analysis.rd_examples import make_design
from moescope.analysis.rd_requests import (
    ALL_SEGMENTS,
    choose_requests,
    is_whole_segment,
    number_units,
    parse_positions,
    token_lengths,
)
from moescope.analysis.token_files import whole_files
from moescope.analysis.views import ask, reading, unreadable
from moescope.tracer.errors import InputError
from moescope.tracer.format import MoeShape
from moescope.tracer.object_path import StorePath, Where

if TYPE_CHECKING:
    from moescope.analysis.ray_counts import RayCounts

Estimator = Literal["token", "sequence"]

METADATA_KEY = b"moescope.rd"
DEFAULT_RESAMPLES = 2000


def risk_difference(
    store: Where | duckdb.DuckDBPyConnection,
    *,
    condition_column: str = "condition",
    positive: str,
    negative: str,
    segment: str = "response",
    estimator: Estimator = "sequence",
    gate_mass: bool = False,
    length_match: bool = False,
    run: str | None = None,
    include_incomplete: bool = False,
    positions: str | None = None,
    lead: int = 0,
    token_ids: Sequence[int] | None = None,
    exclude_token_ids: Sequence[int] | None = None,
    strata: str | None = None,
    resamples: int = DEFAULT_RESAMPLES,
    stability: int = 0,
    seed: int = 0,
    counting: "Callable[[Sequence[StorePath]], RayCounts] | None" = None,
) -> pa.Table:
    """The risk difference of every expert of every MoE layer, largest magnitude first.

    `store` is a trace store's path or a connection from `open_store`. The conditions are two
    values of `condition_column`, a column of the view `requests`. Only tokens of `segment` count
    ("all": every token), and only complete requests unless `include_incomplete`.

    The estimator "token" pools the tokens of all requests of a condition, as SteerMoE does
    (arXiv 2509.09660: p1 = a1 / (a1 + d1)); "sequence" takes the mean over requests of each
    request's rate. With `gate_mass` the rates are mean gate weights instead of frequencies; a1,
    d1, a2, d2 stay counts. With `length_match` only requests whose example has a request in both
    conditions count, each with the first K = min(L1, L2) tokens of its segment.

    `lead` takes so many tokens before the segment's first one in; `positions` ("first:8",
    "last:8", "2:10") takes a part of that; `token_ids` and `exclude_token_ids` filter what is
    left. With `strata` (a column of the requests, or FILE:COLUMN by example id) conditions are
    compared within each of its values.

    `counting` makes of the store's token files what counts them elsewhere (ray_counts.py); a
    store's aggregate, a connection and a pipeline's files are read here all the same.

    One row for each (MoE layer, expert), also experts never chosen, in the order of descending
    |rd|, then layer, then expert: layer, expert (int32); a1, d1 (int64: tokens of the positive
    condition that did and did not select the expert), a2, d2 (the same for the negative one);
    rate_positive, rate_negative, rd (float64); with `resamples` also ci_low, ci_high, p_value,
    q_value, effect (float64, null where undefined); tokens_positive, tokens_negative,
    examples_positive, examples_negative (int64: what was counted; an example is a request). The
    schema's metadata holds the settings, the counts, the ids of the examples and what was left
    out, as JSON under b"moescope.rd"; with `stability` also how far the top so many experts would
    hold with other examples.

    Raises InputError when a setting doesn't fit the store or nothing is left to compare;
    StoreError when the store can't be read.
    """
    settings: dict[str, Any] = {
        "condition_column": condition_column,
        "positive": positive,
        "negative": negative,
        "segment": segment,
        "estimator": estimator,
        "gate_mass": gate_mass,
        "length_match": length_match,
        "run": run,
        "include_incomplete": include_incomplete,
        "positions": positions,
        "lead": lead,
        "token_ids": sorted(set(token_ids)) if token_ids else None,
        "exclude_token_ids": sorted(set(exclude_token_ids)) if exclude_token_ids else None,
        "strata": strata,
        "resamples": resamples,
        "seed": seed,
    }
    _check(settings, stability)
    by_path = not isinstance(store, duckdb.DuckDBPyConnection)
    with reading(store) as con:
        if by_path:
            # Sums are exact in any order; keeping the rows' own would only cost time.
            con.execute("SET preserve_insertion_order = false").fetchall()
        model = ask(con, "SELECT * FROM model").to_pylist()[0]
        shape = MoeShape(tuple(model["moe_layers"]), model["num_experts"], model["top_k"])
        path = model["store"]
        if gate_mass and not model["weights"]:
            raise InputError(
                f"{path} has no gate weights (expert ids alone were imported): leave out gate mass."
            )
        aggregate = files = None
        # A connection covers the files of its time; the aggregate, those of now.
        if by_path:
            aggregate = read_aggregate(path) if is_whole_segment(settings) else None
            files = whole_files(path)
        elsewhere = counting(files) if counting and files and not aggregate else None
        try:
            if aggregate:
                lengths = aggregate.lengths(segment)
            elif elsewhere:
                lengths = elsewhere.lengths(settings)
            else:
                lengths = token_lengths(con, settings)
            requests = choose_requests(con, settings, lengths)
            units = number_units(requests)
            source = Source(con, units, settings, shape, aggregate, files, elsewhere)
        except duckdb.Error as error:
            raise unreadable(path, error) from error
    design = make_design(units, estimator)
    found = Experts(design, source, shape, settings)
    columns = found.estimate()
    facts: dict[str, Any] = {}
    if resamples:
        inferred, facts = found.infer(stability)
        columns |= inferred
    examples = sorted(units["example_id"].drop_null().unique().to_pylist())
    columns |= {
        f"{what}_{side}": np.full(len(columns["rd"]), total)
        for what, totals in (("tokens", found.tokens), ("examples", found.requests))
        for side, total in zip(("positive", "negative"), totals, strict=True)
    }
    order = np.lexsort((columns["expert"], columns["layer"], -np.abs(columns["rd"])))
    table = pa.table(
        {name: pa.array(values[order], from_pandas=True) for name, values in columns.items()}
    )
    facts = {
        "store": path,
        **settings,
        **{name: table[name][0].as_py() for name in table.column_names[-4:]},
        "design": design.name,
        "pairs": design.pairs,
        **({"strata_used": [s.name for s in design.strata]} if strata else {}),
        "aggregate": aggregate is not None,
        **facts,
        "examples": examples,
        "num_examples": len(examples),
        "left_out": dict(Counter(filter(None, requests["left_out"].to_pylist()))),
    }
    return table.replace_schema_metadata({METADATA_KEY: json.dumps(facts)})


def read_settings(table: pa.Table) -> dict[str, Any]:
    """The settings and counts that `risk_difference` left in a table's metadata."""
    text = (table.schema.metadata or {}).get(METADATA_KEY)
    if text is None:
        raise InputError("the table has no settings: it is not from `risk_difference`.")
    settings: dict[str, Any] = json.loads(text)
    return settings


def _check(settings: dict[str, Any], stability: int) -> None:
    """InputError for settings that fit no store."""
    if settings["estimator"] not in get_args(Estimator):
        choices = " or ".join(get_args(Estimator))
        raise InputError(f"unknown estimator {settings['estimator']!r}: choose {choices}.")
    if settings["positive"] == settings["negative"]:
        raise InputError(
            f"positive and negative are both {settings['positive']!r}: name two values of "
            f"{settings['condition_column']}."
        )
    parse_positions(settings["positions"])
    if settings["lead"] < 0:
        raise InputError(
            f"lead is {settings['lead']}: give the number of tokens before, 0 or more."
        )
    if settings["lead"] and settings["segment"] == ALL_SEGMENTS:
        raise InputError("nothing precedes segment all: name a segment, or leave lead out.")
    if settings["resamples"] and settings["resamples"] < 100:
        raise InputError(
            f"{settings['resamples']} resamples are too few for an interval: give 100 or more, or "
            "0 for no intervals."
        )
    if stability and not settings["resamples"]:
        raise InputError("stability is found by resampling: give resamples.")
