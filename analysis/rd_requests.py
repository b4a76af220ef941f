"""Which requests and which of their tokens a risk difference counts, and what is wrong if none."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moescope.analysis.views import ask, read_sql
from moescope.tracer.errors import InputError

ALL_SEGMENTS = "all"
NO_TOKEN = "no token in the segment"  # as in rd_requests.sql
ONE_SIDED = "its stratum has fewer than two examples of a condition"

_SLICE = re.compile(r"(?:(first|last):([1-9]\d*)|(-?\d+)?:(-?\d+)?)")


def parse_positions(text: str | None) -> tuple[int | None, int | None]:
    """ "first:8", "last:8", or a slice as in Python ("2:10", "-4:") as (start, stop)."""
    if text is None:
        return None, None
    match = _SLICE.fullmatch(text.replace(" ", ""))
    if match is None or text.strip() == ":":
        raise InputError(
            f"positions {text!r}: give first:K, last:K or START:STOP, which count within the "
            "segment from 0, or from its end if negative."
        )
    if match[1]:
        return (None, int(match[2])) if match[1] == "first" else (-int(match[2]), None)
    start, stop = (None if part is None else int(part) for part in match.groups()[2:])
    return start, stop


def is_whole_segment(settings: dict[str, Any]) -> bool:
    """Whether every token of the segment counts, whatever its place or id."""
    partial = ("length_match", "positions", "lead", "token_ids", "exclude_token_ids")
    return not any(settings[name] for name in partial)


def token_lengths(con: duckdb.DuckDBPyConnection, settings: dict[str, Any]) -> pa.Table:
    """request_id, start, positions, length of every request, from its tokens (rd_lengths.sql)."""
    start, stop = parse_positions(settings["positions"])
    ordered = settings["length_match"] or settings["positions"] is not None
    parameters = {
        **{name: settings[name] for name in ("segment", "lead")},
        **_filters(settings),
        "ordered": ordered,
        "slice_start": start,
        "slice_stop": stop,
    }
    return ask(con, read_sql("rd_lengths"), **parameters)


def token_batches(
    con: duckdb.DuckDBPyConnection, units: pa.Table, settings: dict[str, Any], batch_tokens: int
) -> pa.RecordBatchReader:
    """The tokens that count, of the requests of `number_units`: unit, expert_ids, gate_weights."""
    con.register("rd_units", units)
    parameters = {
        **{name: settings[name] for name in ("segment", "lead", "gate_mass")},
        **_filters(settings),
    }
    return con.sql(read_sql("rd_tokens"), params=parameters).to_arrow_reader(batch_tokens)


def _filters(settings: dict[str, Any]) -> dict[str, list[int]]:
    return {name: settings[name] or [] for name in ("token_ids", "exclude_token_ids")}


def choose_requests(
    con: duckdb.DuckDBPyConnection, settings: dict[str, Any], lengths: pa.Table
) -> pa.Table:
    """The requests of both conditions, as rd_requests.sql says; InputError if they can't do."""
    column = settings["condition_column"]
    if column not in (columns := _columns(con)):
        raise InputError(
            f"unknown condition column {column!r}; the requests have: {', '.join(columns)}."
        )
    con.register("rd_lengths", lengths)
    con.register("rd_strata", _strata(con, settings["strata"]))
    sql = read_sql("rd_requests").replace("{condition}", f'"{column}"')
    bound = {name: value for name, value in settings.items() if f"${name}" in sql}
    requests = ask(con, sql, **bound)
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
    return _leave_out_one_sided(requests, settings["strata"])


def number_units(requests: pa.Table) -> pa.Table:
    """The requests that count, numbered from 0 in the order of their ids (column `unit`)."""
    used = requests.filter(pc.is_null(requests["left_out"]))
    return used.append_column("unit", pa.array(np.arange(used.num_rows)))


def _columns(con: duckdb.DuckDBPyConnection) -> list[str]:
    return [row[0] for row in con.execute("DESCRIBE requests").fetchall()]


def _strata(con: duckdb.DuckDBPyConnection, strata: str | None) -> pa.Table:
    """(request_id, stratum): of a column of the requests, or of FILE:COLUMN by example_id."""
    if strata is None:
        return ask(con, "SELECT request_id, '' AS stratum FROM requests")
    file, separator, column = strata.rpartition(":")
    if not separator:
        if strata not in (columns := _columns(con)):
            raise InputError(
                f"unknown strata column {strata!r}; the requests have: {', '.join(columns)}. For a "
                "column of a file with example ids, give FILE:COLUMN."
            )
        return ask(con, f'SELECT request_id, "{strata}"::VARCHAR AS stratum FROM requests')
    if not Path(file).is_file():
        raise InputError(f"there is no file {file} to take the strata from.")
    source, quoted = file.replace("'", "''"), column.replace('"', '""')
    try:
        topics = ask(
            con,
            f'SELECT DISTINCT example_id::VARCHAR AS example_id, "{quoted}"::VARCHAR AS stratum '
            f"FROM '{source}'",
        )
    except duckdb.Error as error:
        raise InputError(
            f"can't read example_id and {column} from {file}: {error}\n"
            "Give a CSV, Parquet or JSON-lines file with both columns."
        ) from error
    if topics.num_rows > len(topics["example_id"].unique()):
        raise InputError(f"some example of {file} has several values of {column}: give one each.")
    con.register("rd_topics", topics)
    sql = "SELECT request_id, stratum FROM requests LEFT JOIN rd_topics USING (example_id)"
    return ask(con, sql)


def _leave_out_one_sided(requests: pa.Table, strata: str | None) -> pa.Table:
    """With strata: leave out those that can't say how much examples differ."""
    if strata is None:
        return requests
    rows = requests.filter(pc.is_null(requests["left_out"])).to_pylist()
    examples: dict[tuple[str, bool], set[str]] = {}
    stratum_of: dict[str, str] = {}
    for row in rows:
        example = row["example_id"]
        if example is not None and stratum_of.setdefault(example, row["stratum"]) != row["stratum"]:
            raise InputError(
                f"example {example!r} is in the strata {stratum_of[example]!r} and "
                f"{row['stratum']!r}; an example must be in one: choose another column."
            )
        key = f"/{example}" if example is not None else f"request {row['request_id']}"
        examples.setdefault((row["stratum"], row["positive"]), set()).add(key)
    kept = {
        stratum
        for stratum, _ in examples
        if all(len(examples.get((stratum, side), ())) >= 2 for side in (True, False))
    }
    if not kept:
        raise InputError(
            f"no value of {strata} has two examples of each condition, so there is nothing to "
            "compare within: choose another column, or leave --strata out."
        )
    left_out = [
        reason or (None if stratum in kept else ONE_SIDED)
        for reason, stratum in zip(
            requests["left_out"].to_pylist(), requests["stratum"].to_pylist(), strict=True
        )
    ]
    at = requests.column_names.index("left_out")
    return requests.set_column(at, "left_out", pa.array(left_out, pa.string()))


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
        f"({_listing(reasons)}). Requests are paired by example_id when length matching, "
        "incomplete ones count only with include_incomplete, and only tokens that the positions "
        "and token ids choose."
    )


def _counts(
    con: duckdb.DuckDBPyConnection, sql: str, parameters: dict[str, Any] | None = None
) -> dict[str | None, int]:
    """How often each value of a query's only column occurs."""
    text = f"SELECT value, count(*) FROM ({sql}) AS t(value) GROUP BY value ORDER BY value"
    return dict(con.execute(text, parameters).fetchall())


def _listing(counts: dict[str | None, int]) -> str:
    named = (f"{'NULL' if value is None else value} ({n:,})" for value, n in counts.items())
    return ", ".join(named) or "none (the store is empty)"
