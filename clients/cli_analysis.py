"""The commands that look at a trace store: `store` and `sql`.

DuckDB and Arrow are imported inside the commands, so that `--help` is quick.
"""

import shutil
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from moescope.clients.cli_options import Store
from moescope.clients.cli_rd import rd
from moescope.clients.terminal import add_column, cell_text, count_text, make_table, open_console
from moescope.tracer.errors import InputError

SHOWN_ROWS = 100

store_app = typer.Typer(no_args_is_help=True, help="Describe and check trace stores.")


def register_analysis(app: typer.Typer) -> None:
    """Add the commands `sql` and `rd`."""
    app.command("sql")(sql)
    app.command("rd")(rd)


@store_app.command("info")
def info(store: Store) -> None:
    """Say what a store holds: the model, the requests by run and condition, bytes and drops.

    **Example:** `moescope store info traces`
    """
    from moescope.analysis.info import store_info

    there = store_info(store)
    shape, model = there.model.shape, there.model
    rate = there.bytes_per_token
    per_token = "" if rate is None else f", {rate:.1f} bytes a token"
    facts = Table.grid(padding=(0, 2))
    for name, value in (
        ("model", f"{model.model}{f' @ {model.revision}' if model.revision else ''}"),
        ("architecture", f"{model.architecture}, {model.dtype}"),
        ("MoE layers", f"{len(shape.layers)}, of layers {shape.layers[0]} to {shape.layers[-1]}"),
        ("experts", f"{shape.num_experts} a layer, top-{shape.top_k}"),
        ("scoring", f"{model.scoring}{', renormalized' if model.renormalize else ''}"),
        *([] if model.weights else [("gate weights", "none")]),
        ("traced by", model.engine),
        ("tokens", f"{there.tokens:,}"),
        ("on disk", f"{there.files:,} files, {there.bytes:,} bytes{per_token}"),
    ):
        facts.add_row(f"[bold]{name}[/]", escape(value))
    requests = make_table("run", "condition", ">requests", ">tokens", ">incomplete")
    for group in there.groups:
        counts = (group.requests, group.tokens, group.incomplete)
        requests.add_row(escape(group.run), cell_text(group.condition), *map(count_text, counts))
    writers = make_table("writer", "state", ">files", ">rows", ">dropped rows")
    for writer in there.writers:
        counts = (writer.files, writer.rows, writer.dropped_rows)
        writers.add_row(writer.writer, writer.state, *map(count_text, counts))
    console = open_console()
    for part in (facts, requests, writers):
        console.print(part)


@store_app.command("verify")
def verify(store: Store) -> None:
    """Check every file of a store; exit code 1 if something is wrong.

    Each problem names the file, the request and what to do.

    **Example:** `moescope store verify traces`
    """
    from moescope.analysis.verify import store_notes, verify_store

    console = open_console()
    problems = verify_store(store)
    for problem in problems:
        console.print(f"[bold red]problem:[/] {escape(str(problem))}")
    # A damaged writers/ is among the problems; there are no notes to take from it.
    if not any(problem.check == "writers" for problem in problems):
        for note in store_notes(store):
            console.print(f"[yellow]note:[/] {escape(note)}")
    if problems:
        raise typer.Exit(1)
    console.print(f"[green]{escape(str(store))} is sound.[/]")


@store_app.command("aggregate")
def aggregate(store: Store) -> None:
    """Count a store once, so that `moescope rd` over whole segments takes less than a second.

    The counts of every request, segment and expert go to `activation.parquet` in the store's
    folder. It is used while the store's files are those that it was counted from, and ignored
    once traces were added: then run this again.

    **Example:** `moescope store aggregate traces`
    """
    from moescope.analysis.aggregate import build_aggregate

    file = build_aggregate(store)
    open_console().print(f"{escape(str(file))}: {count_text(file.stat().st_size)} bytes")


def sql(
    store: Store,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="A DuckDB SQL query.")],
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="table|csv|json|parquet",
            help="Format; by --out's suffix if left out, else a table.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write to this file.")] = None,
) -> None:
    """Query a store in SQL (DuckDB's), over the views tokens, requests, routing and activation.

    `routing` has one row a token, layer and rank; `activation` one a request, segment, layer and
    expert. `DESCRIBE routing` lists columns.

    **Example**, the experts of layer 5 by use: `moescope sql traces "SELECT expert, sum(count) AS n
    FROM activation WHERE layer = 5 GROUP BY expert ORDER BY n DESC"`
    """
    import duckdb

    from moescope.analysis.export import FORMATS, file_format, write_query
    from moescope.analysis.views import open_store

    if format_ is None:
        format_ = file_format(out) if out else "table"
    if format_ not in ("table", *FORMATS):
        raise InputError(f"unknown format {format_!r}: choose table, {', '.join(FORMATS)}.")
    if format_ == ("table" if out else "parquet"):
        raise InputError(
            f"format {format_} {'is for the terminal only' if out else 'needs --out FILE'}: "
            "choose another --format."
        )
    with closing(open_store(store)) as con, tempfile.TemporaryDirectory() as folder:
        try:
            if format_ == "table":
                _print_rows(con.sql(query))
            else:
                write_query(con, query, out or Path(folder, "rows"), format_)
        except duckdb.Error as error:
            raise InputError(f"the query failed: {error}") from error
        if format_ != "table" and out is None:
            with Path(folder, "rows").open() as rows:
                shutil.copyfileobj(rows, sys.stdout)


def _print_rows(result: Any) -> None:
    """Print the first rows of a DuckDB relation (None: the statement has no result)."""
    if result is None:
        return
    rows = result.limit(SHOWN_ROWS + 1).fetchall()
    table = make_table()
    for at, name in enumerate(result.columns):
        number = all(isinstance(row[at], int | float | None) for row in rows)
        add_column(table, name, number=number)
    for row in rows[:SHOWN_ROWS]:
        table.add_row(*map(cell_text, row))
    console = open_console()
    console.print(table)
    if len(rows) > SHOWN_ROWS:
        console.print(f"[dim]the first {SHOWN_ROWS} rows; write all of them with --out FILE[/]")
