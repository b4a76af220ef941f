"""Write a query's result or a ranking to a file, whole: written aside, then renamed."""

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from moescope.tracer.errors import InputError
from moescope.tracer.object_path import ObjectPath, StorePath

# DuckDB's options of COPY ... TO for each format that we write.
FORMATS = {
    "csv": "FORMAT csv, HEADER",
    "json": "FORMAT json, ARRAY true",
    "parquet": "FORMAT parquet, COMPRESSION zstd",
}


def file_format(path: Path) -> str:
    """The format that a file's suffix names; InputError if it names none of ours."""
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        raise InputError(
            f"can't tell the format of {path} from its name: end it with "
            f"{', '.join('.' + name for name in FORMATS)}."
        )
    return suffix


def write_ranking(table: pa.Table, path: str | Path) -> None:
    """Write a table of `risk_difference` as .parquet, .csv or .json, by the path's suffix.

    Parquet keeps the settings in the schema's metadata. JSON is an array with one object a row.
    """
    path = Path(path)
    if file_format(path) == "parquet":
        with written_aside(path) as aside:
            pq.write_table(table, aside)
    else:
        with closing(duckdb.connect()) as con:
            con.register("ranking", table)
            write_query(con, "FROM ranking", path, file_format(path))


def write_query(con: duckdb.DuckDBPyConnection, query: str, path: Path, format_: str) -> None:
    """Stream a query's rows to a file in one of `FORMATS`; duckdb.Error if the query is bad."""
    with written_aside(path) as aside:
        target = str(aside).replace("'", "''")
        # On lines of its own: a query may end in a comment.
        con.execute(
            f"COPY (\n{query.rstrip().removesuffix(';')}\n) TO '{target}' ({FORMATS[format_]})"
        )


@contextmanager
def written_aside(path: StorePath) -> Iterator[Path]:
    """A name beside `path` to write to; renamed to `path` when the block ends without an error.

    For an object it is a temporary file, which is sent then.
    """
    if isinstance(path, ObjectPath):
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder, path.name)
            yield local
            path.write_bytes(pa.memory_map(str(local)).read_buffer())
        return
    if not path.parent.is_dir():
        raise InputError(f"can't write {path}: the folder {path.parent} doesn't exist.")
    aside = path.with_name(f".{path.name}.part")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
