"""The command `moescope doctor`."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from moescope.clients.doctor import Check

_SHOWN = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[bold red]fail[/]"}


def register_doctor(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("doctor")(doctor)


def doctor(
    *,
    store: Annotated[
        str | None,
        typer.Option(help="Where traces are to go: its disk is tried and measured."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model to be traced, for bytes a token; DeepSeek-V2-Lite if none."),
    ] = None,
    tokens_per_second: Annotated[
        int,
        typer.Option(min=1, help="Tokens that will be traced, prompt and output together."),
    ] = 30_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Check this installation and say what to mend; exit code 1 if something fails.

    Looks at Python, moescope, vLLM and the places where moescope holds on to it, the plugins, the
    GPUs, memory, limits and the clock; with `--store` also at the folder's file system, speed and
    room. Takes about 20 seconds, since torch and vLLM are really imported.

    **Example:** `moescope doctor --store traces --model deepseek-ai/DeepSeek-V2-Lite-Chat`
    """
    console = Console(stderr=True)
    with console.status("importing torch and vLLM, measuring the disk …"):
        checks = list(_checks(store, model, tokens_per_second))
    failed = [check for check in checks if check.status == "fail"]
    if as_json:
        found = {"ok": not failed, "checks": [asdict(check) for check in checks]}
        typer.echo(json.dumps(found, indent=1))
    else:
        _show(checks)
    if failed:
        raise typer.Exit(1)


def _checks(store: str | None, model: str | None, tokens_per_second: int) -> "Iterator[Check]":
    from moescope.clients.doctor import check_installation
    from moescope.clients.doctor_machine import check_machine
    from moescope.clients.doctor_model import check_model
    from moescope.tracer.object_path import store_path

    place = None if store is None else store_path(store)
    yield from check_installation()
    shape = None
    if model is not None:
        check, shape = check_model(model)
        yield check
    yield from check_machine(place, shape, tokens_per_second)


def _show(checks: "list[Check]") -> None:
    table = Table("", "check", "found, and what to do", box=box.SIMPLE)
    for check in checks:
        text = escape(check.found)
        if check.remedy:
            text += f"\n[bold]→ {escape(check.remedy)}[/]"
        table.add_row(_SHOWN[check.status], check.name, text)
    console = Console(highlight=False)
    console.print(table)
    counts = {status: sum(check.status == status for check in checks) for status in _SHOWN}
    if counts["fail"]:
        console.print(f"[bold red]{counts['fail']} to mend[/], {counts['warn']} to look at.")
    elif counts["warn"]:
        console.print(f"[green]moescope can work here[/]; {counts['warn']} to look at.")
    else:
        console.print("[green]moescope can work here.[/]")
