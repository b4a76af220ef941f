"""Open a trace store in DuckDB: the views `tokens`, `requests`, `routing` and `activation`."""

import glob
from pathlib import Path
from string import Template

import duckdb
import pyarrow as pa

from moescope.tracer.errors import StoreError
from moescope.tracer.format import MoeShape, requests_schema, tokens_schema
from moescope.tracer.store import committed_files, read_manifest


def open_store(path: str | Path) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB connection with views over the files committed by now.

    The views (docs/sql.md lists their columns) read the store's files as a query needs them;
    files committed later are seen after opening again. The one-row table `model` holds the
    manifest and the store's path. `cursor()` of the connection sees the same views.

    Raises StoreError when `path` is no trace store, or its files can't be read.
    """
    path = Path(path)
    facts = read_manifest(path)
    tokens, requests = committed_files(path)
    con = duckdb.connect()
    try:
        con.register("facts", pa.Table.from_pylist([{"store": str(path), **facts.to_json()}]))
        if not tokens:
            _create_empty(con, facts.shape)
        con.execute(
            Template(read_sql("views")).substitute(
                tokens=_read_parquet(tokens) if tokens else "no_tokens",
                requests=_read_parquet(requests) if requests else "no_requests",
            )
        )
        con.unregister("facts")
    except duckdb.Error as error:
        con.close()
        raise unreadable(path, error) from error
    return con


def read_sql(name: str) -> str:
    """The text of `analysis/NAME.sql`."""
    return Path(__file__).with_name(f"{name}.sql").read_text(encoding="utf-8")


def unreadable(path: str | Path, error: duckdb.Error) -> StoreError:
    """The error to raise when DuckDB can't read a store's files."""
    return StoreError(
        f"the files of {path} can't be read: {error}\n"
        f"`moescope store verify {path}` names the damaged ones."
    )


def _read_parquet(files: list[Path]) -> str:
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
