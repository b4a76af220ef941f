"""Open a trace store in DuckDB: the views `tokens`, `requests`, `routing` and `activation`, and the
macros of questions.sql and shift.sql.

A pipeline-parallel engine writes the layers of each stage to files of their own. They are joined
here, so that a token and a request are one row, as everywhere.
"""

import glob
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from string import Template
from typing import Any

import duckdb
import pyarrow as pa

from moescope.tracer.errors import StoreError
from moescope.tracer.format import MoeShape, requests_schema, tokens_schema
from moescope.tracer.object_path import ObjectPath, StorePath, Where, store_path
from moescope.tracer.store import committed_files, read_manifest, stage_of


def open_store(path: Where) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB connection with views over the files committed by now.

    `path` is a folder, or a place in object storage as "s3://bucket/traces".

    The views (docs/sql.md lists their columns) read the store's files as a query needs them;
    files committed later are seen after opening again. The one-row table `model` holds the
    manifest and the store's path. `cursor()` of the connection sees the same views.

    Raises StoreError when `path` is no trace store, or its files can't be read.
    """
    path = store_path(path)
    facts = read_manifest(path)
    files = committed_files(path)
    tokens = _union(_tokens(*part) for part in _by_stage(files[0]))
    requests = _union(_requests(*part) for part in _by_stage(files[1]))
    con = connect(path)
    try:
        # It would go to standard output, among our own. In a notebook without ipywidgets it is off,
        # and can't even be switched off.
        if con.execute("SELECT current_setting('enable_progress_bar')").fetchall() == [(True,)]:
            con.execute("SET enable_progress_bar = false").fetchall()
        said = {"store": str(path), **facts.to_json(), "weights": facts.weights}
        con.register("facts", pa.Table.from_pylist([said]))
        if tokens is None:
            _create_empty(con, facts.shape)
        con.execute(
            Template(read_sql("views")).substitute(
                tokens=tokens or "no_tokens", requests=requests or "no_requests"
            )
        )
        con.unregister("facts")
        for name in ("questions", "shift"):
            con.execute(read_sql(name))
    except duckdb.Error as error:
        con.close()
        raise unreadable(path, error) from error
    return con


def connect(store: StorePath) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB that can read a store's files, wherever they are."""
    con = duckdb.connect()
    if isinstance(store, ObjectPath):
        from moescope.analysis.object_files import register

        register(con, store)
    return con


@contextmanager
def reading(
    store: Where | duckdb.DuckDBPyConnection,
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection of our own to a store, which is given by its path or by a connection.

    What the caller registers is gone afterwards. An error of DuckDB becomes a StoreError.
    """
    con = store.cursor() if isinstance(store, duckdb.DuckDBPyConnection) else open_store(store)
    with closing(con):
        try:
            yield con
        except duckdb.Error as error:
            raise unreadable(str(store), error) from error


def ask(con: duckdb.DuckDBPyConnection, query: str, /, *values: Any, **named: Any) -> pa.Table:
    """A query's rows, with `values` for its `?` or `named` ones for its `$name`."""
    return con.sql(query, params=list(values) or named or None).to_arrow_table()


def read_sql(name: str) -> str:
    """The text of `analysis/NAME.sql`."""
    return Path(__file__).with_name(f"{name}.sql").read_text(encoding="utf-8")


def unreadable(path: Where, error: duckdb.Error) -> StoreError:
    """The error to raise when DuckDB can't read a store's files."""
    return StoreError(
        f"the files of {path} can't be read: {error}\n"
        f"`moescope store verify {path}` names the damaged ones."
    )


def _by_stage(files: list[StorePath]) -> list[tuple[int, dict[int, list[StorePath]]]]:
    """(number of stages, the files of each stage), for every number that there is."""
    found: dict[int, dict[int, list[StorePath]]] = {}
    for file in files:
        stage, count = stage_of(file.name)
        found.setdefault(count, {}).setdefault(stage, []).append(file)
    return sorted(found.items())


def _tokens(count: int, files: dict[int, list[StorePath]]) -> str | None:
    """The tokens of all engines of `count` stages; None if some stage has no file at all."""
    if len(files) < count:
        return None
    if count == 1:
        return _read_parquet(files[1])
    stages = range(1, count + 1)
    joined = " JOIN ".join(
        f"{_read_parquet(files[stage])} AS s{stage}"
        + (" USING (request_id, position)" if stage > 1 else "")
        for stage in stages
    )
    lists = ", ".join(
        " || ".join(f"s{stage}.{name}" for stage in stages) + f" AS {name}"
        for name in ("expert_ids", "gate_weights")
    )
    return (
        f"(SELECT s1.request_id, s1.position, s1.token_id, s1.segment, s1.mask, {lists} "
        f"FROM {joined})"
    )


def _requests(count: int, files: dict[int, list[StorePath]]) -> str:
    """The requests of all engines of `count` stages: complete if they are so in every stage."""
    read = _read_parquet([file for stage in files.values() for file in stage])
    if count == 1:
        return read
    said = ("run", "example_id", "condition", "mask", "prompt_tokens", "spans")
    return (
        f"(SELECT request_id, {', '.join(f'any_value({name}) AS {name}' for name in said)}, "
        f"if(count(*) = {count}, min(tokens), 0)::INTEGER AS tokens, "
        f"bool_and(complete) AND count(*) = {count} AND min(tokens) = max(tokens) AS complete "
        f"FROM {read} GROUP BY request_id)"
    )


def _union(parts: Iterable[str | None]) -> str | None:
    """One table of several; a single one stays as it is."""
    there = [part for part in parts if part is not None]
    if len(there) < 2:
        return there[0] if there else None
    return "(" + " UNION ALL BY NAME ".join(f"FROM {part}" for part in there) + ")"


def _read_parquet(files: list[StorePath]) -> str:
    """A table function over exactly these files, whatever characters their paths hold.

    Hive partitioning is off: a folder named `run=1` above the store must not become a column.
    """
    quoted = ", ".join("'" + glob.escape(str(file)).replace("'", "''") + "'" for file in files)
    return f"read_parquet([{quoted}], hive_partitioning = false)"


def _create_empty(con: duckdb.DuckDBPyConnection, shape: MoeShape) -> None:
    """Tables without rows that stand for the files of a store that has none yet."""
    schema = tokens_schema(shape)
    # DuckDB reads float16 from Parquet, but not from Arrow.
    schema = schema.set(
        schema.get_field_index("gate_weights"), pa.field("gate_weights", pa.list_(pa.float32()))
    )
    for name, empty in (("tokens", schema), ("requests", requests_schema())):
        con.register(f"empty_{name}", empty.empty_table())
        con.execute(f"CREATE TABLE no_{name} AS FROM empty_{name}")
        con.unregister(f"empty_{name}")
