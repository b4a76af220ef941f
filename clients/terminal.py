"""Tables in the terminal: numbers to the right, and nothing squeezed when piped; and progress."""

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


def open_console() -> Console:
    """Standard output; into a pipe, lines and tables are as wide as they need."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 10_000
    return console


def make_table(*columns: str) -> Table:
    """A table with these columns; those that begin with ">" hold numbers."""
    table = Table(box=box.SIMPLE)
    for column in columns:
        add_column(table, column.removeprefix(">"), number=column.startswith(">"))
    return table


def add_column(table: Table, name: str, *, number: bool) -> None:
    """Add a column whose name is shown as it is."""
    table.add_column(escape(name), justify="right" if number else "left", no_wrap=number)


def count_text(number: int) -> str:
    """A count, with its thousands marked."""
    return f"{number:,}"


def cell_text(value: Any) -> str:
    """Any value of a query's result; long lists are cut."""
    if value is None:
        return "[dim]NULL[/]"
    if isinstance(value, str):
        return escape(value)
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return escape(text if len(text) <= 60 else text[:59] + "…")


def rate_progress(console: Console | None) -> Progress:
    """A bar with counts, the field `rate` of each task, and the time left; None shows nothing."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console or Console(quiet=True),
    )
