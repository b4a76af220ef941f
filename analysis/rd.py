"""Risk differences: which experts are chosen more often under one condition than another.

    RD(layer, expert) = E[A | positive] - E[A | negative]

A is whether a token selected the expert, or the gate weight that it gave. docs/statistics.md has
the definitions; the sums are in rd_requests.sql and rd_rates.sql.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from moescope.analysis.views import open_store, read_sql, unreadable
from moescope.tracer.errors import InputError

Estimator = Literal["token", "sequence"]

METADATA_KEY = b"moescope.rd"
ALL_SEGMENTS = "all"
NO_TOKEN = "no token in the segment"  # as in rd_requests.sql


def risk_difference(
    store: str | Path | duckdb.DuckDBPyConnection,
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

    One row for each (MoE layer, expert), also experts never chosen, in the order of descending
    |rd|, then layer, then expert: layer, expert (int32); a1, d1 (int64: tokens of the positive
    condition that did and did not select the expert), a2, d2 (the same for the negative one);
    rate_positive, rate_negative, rd (float64); tokens_positive, tokens_negative,
    examples_positive, examples_negative (int64: what was counted; an example is a request). The
    schema's metadata holds the settings, the counts and what was left out, as JSON under
    b"moescope.rd".

    Raises InputError when a setting doesn't fit the store or nothing is left to compare;
    StoreError when the store can't be read.
    """
    if estimator not in get_args(Estimator):
        choices = " or ".join(get_args(Estimator))
        raise InputError(f"unknown estimator {estimator!r}: choose {choices}.")
    if positive == negative:
        raise InputError(
            f"positive and negative are both {positive!r}: name two values of {condition_column}."
        )
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
    }
    with _cursor(store) as con:
        path = _query(con, "SELECT store FROM model")["store"][0].as_py()
        try:
            requests = _choose_requests(con, settings)
            con.register("rd_requests", requests)
            bound = ("gate_mass", "length_match", "segment")
            table = _query(con, read_sql("rd_rates"), {name: settings[name] for name in bound})
        except duckdb.Error as error:
            raise unreadable(path, error) from error
    facts = {
        "store": path,
        **settings,
        **{name: table[name][0].as_py() for name in table.column_names[-4:]},
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


@contextmanager
def _cursor(
    store: str | Path | duckdb.DuckDBPyConnection,
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection of our own to the store, so that what we register is gone afterwards."""
    if isinstance(store, duckdb.DuckDBPyConnection):
        with closing(store.cursor()) as con:
            yield con
    else:
        with closing(open_store(store)) as con:
            yield con


def _query(
    con: duckdb.DuckDBPyConnection, sql: str, parameters: dict[str, Any] | None = None
) -> pa.Table:
    return con.sql(sql, params=parameters).to_arrow_table()


def _choose_requests(con: duckdb.DuckDBPyConnection, settings: dict[str, Any]) -> pa.Table:
    """The requests of both conditions, as rd_requests.sql says; InputError if they can't do."""
    column = settings["condition_column"]
    columns = [row[0] for row in con.execute("DESCRIBE requests").fetchall()]
    if column not in columns:
        raise InputError(
            f"unknown condition column {column!r}; the requests have: {', '.join(columns)}."
        )
    sql = read_sql("rd_requests").replace("{condition}", f'"{column}"')
    bound = {name: value for name, value in settings.items() if f"${name}" in sql}
    requests = _query(con, sql, bound)
    for value, positive in ((settings["positive"], True), (settings["negative"], False)):
        side = requests.filter(pc.equal(requests["positive"], positive))
        if side.num_rows == 0:
            raise _no_requests(con, settings, value)
        if side["left_out"].null_count == 0:
            raise _all_left_out(con, settings, value, side)
    repeated = requests.filter(requests["repeated"])
    if repeated.num_rows:
        example = repeated["example_id"][0].as_py()
        same = repeated.filter(pc.equal(repeated["example_id"], example))
        raise InputError(
            f"length matching pairs one request of each condition, but example {example!r} has "
            f"several: {', '.join(same['request_id'].to_pylist())}. Choose one run "
            f"({', '.join(sorted(set(same['run'].to_pylist())))}), or compare without length "
            "matching."
        )
    return requests


def _no_requests(
    con: duckdb.DuckDBPyConnection, settings: dict[str, Any], value: str
) -> InputError:
    column, run = settings["condition_column"], settings["run"]
    runs = _counts(con, "SELECT run FROM requests")
    if run is not None and run not in runs:
        return InputError(f"no request is of run {run!r}; the runs are: {_listing(runs)}.")
    values = _counts(
        con,
        f'SELECT "{column}"::VARCHAR FROM requests WHERE $run IS NULL OR run = $run',
        {"run": run},
    )
    return InputError(f"no request has {column} = {value!r}; there are: {_listing(values)}.")


def _all_left_out(
    con: duckdb.DuckDBPyConnection, settings: dict[str, Any], value: str, side: pa.Table
) -> InputError:
    reasons = Counter(side["left_out"].to_pylist())
    if NO_TOKEN in reasons:
        segments = _counts(con, "SELECT segment FROM tokens")
        if settings["segment"] not in segments:
            return InputError(
                f"no token is in segment {settings['segment']!r}; the segments and their tokens "
                f"are: {_listing(segments)}, or {ALL_SEGMENTS} for every token."
            )
    return InputError(
        f"every request with {settings['condition_column']} = {value!r} is left out "
        f"({_listing(reasons)}). Requests are paired by example_id when length matching, and "
        "incomplete ones count only with include_incomplete."
    )


def _counts(
    con: duckdb.DuckDBPyConnection, sql: str, parameters: dict[str, Any] | None = None
) -> dict[str | None, int]:
    """How often each value of a query's only column occurs."""
    query = f"SELECT value, count(*) FROM ({sql}) AS t(value) GROUP BY value ORDER BY value"
    return dict(con.execute(query, parameters).fetchall())


def _listing(counts: dict[str | None, int]) -> str:
    named = (f"{'NULL' if value is None else value} ({n:,})" for value, n in counts.items())
    return ", ".join(named) or "none (the store is empty)"
