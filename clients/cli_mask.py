"""The command `moescope mask`: make masks, look at them, and put them on a server.

The libraries are imported inside the commands, so that `--help` is quick.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from moescope.clients.terminal import cell_text, make_table, open_console

mask_app = typer.Typer(
    no_args_is_help=True,
    help="Make expert masks, look at them, and put them on a running server.",
)

MaskFile = Annotated[Path, typer.Argument(metavar="MASK", help="Mask file (docs/masks.md).")]
Name = Annotated[str, typer.Option(help="Name of the mask, by which requests ask for it.")]
Out = Annotated[Path, typer.Option(help="Mask file to write; an existing one is replaced.")]
Url = Annotated[str, typer.Option(help="Where the server is.")]
AdminKey = Annotated[
    str | None,
    typer.Option(envvar="MOESCOPE_ADMIN_KEY", help="The server's admin key, if it has one."),
]

HERE = "http://127.0.0.1:8000"


@mask_app.command("from-rd")
def from_rd(
    ranking: Annotated[Path, typer.Argument(help="File that `moescope rd --out` wrote.")],
    *,
    deactivate: Annotated[
        int, typer.Option(min=0, help="Experts to switch off: those of most negative RD.")
    ] = 0,
    activate: Annotated[
        int, typer.Option(min=0, help="Experts to switch on: those of largest positive RD.")
    ] = 0,
    scale: Annotated[
        float | None,
        typer.Option(help="Instead of switching off, multiply the gate weights by this factor."),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="4-20,22", help="Only experts of these layers.")
    ] = None,
    min_abs_rd: Annotated[
        float | None, typer.Option(min=0, help="Only experts whose |RD| is at least this.")
    ] = None,
    reverse: Annotated[
        bool, typer.Option("--reverse", help="Move the model towards the negative condition.")
    ] = False,
    select: Annotated[
        str,
        typer.Option(
            metavar="rd|steermoe",
            help="When a layer has all the experts it can take: go on down the ranking (rd), or "
            "take fewer (steermoe, as SteerMoE's code does).",
        ),
    ] = "rd",
    mode: Annotated[
        str,
        typer.Option(metavar="hard|steermoe", help="What the actions mean (docs/masks.md)."),
    ] = "hard",
    name: Name,
    out: Out,
) -> None:
    """Make a mask from a ranking: steer towards its positive condition.

    The positive condition uses experts of positive RD more and those of negative RD less, so the
    former are activated and the latter deactivated. A layer can't have more than top-k experts
    activated, nor fewer than top-k left; candidates beyond that are passed over, and counted.

    **Example:** `moescope mask from-rd ranking.parquet --deactivate 20 --activate 10 --layers 4-20
    --name follow-document --out follow-document.json`
    """
    from moescope.clients.mask_files import mask_from_rd
    from moescope.tracer.mask import write_mask

    made = mask_from_rd(
        ranking,
        name=name,
        deactivate=deactivate,
        activate=activate,
        scale=scale,
        layers=layers,
        min_abs_rd=min_abs_rd,
        reverse=reverse,
        select=select,  # type: ignore[arg-type]  # checked there
        mode=mode,  # type: ignore[arg-type]  # checked there
    )
    write_mask(made, out)
    _print_written(made, out)


@mask_app.command("random")
def random(
    *,
    like: Annotated[Path, typer.Option(help="The mask to make a control of.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw.")] = 0,
    name: Name,
    out: Out,
) -> None:
    """Make a control: as many experts in each layer, with the same actions, but random ones.

    What the mask does and its control does not is due to *which* experts it names. Draw several
    controls: one can hit important experts by chance.

    **Example:** `moescope mask random --like follow-document.json --seed 1 --name control-1
    --out control-1.json`
    """
    from moescope.clients.mask_files import random_mask
    from moescope.tracer.mask import read_mask, write_mask

    made = random_mask(read_mask(like), seed, name=name)
    write_mask(made, out)
    _print_written(made, out)


@mask_app.command("show")
def show(mask: MaskFile) -> None:
    """Show what a mask does to each layer.

    **Example:** `moescope mask show follow-document.json`
    """
    from moescope.tracer.mask import read_mask

    there = read_mask(mask)
    console = open_console()
    facts = (
        ("name", there.name),
        ("mode", there.mode if there.epsilon is None else f"{there.mode}, ε = {there.epsilon}"),
        ("renormalise", "yes" if there.renormalise else None),
        ("for", there.signature),
        ("note", there.note),
        ("source", json.dumps(there.source) if there.source else None),
    )
    width = max(len(label) for label, value in facts if value is not None)
    for label, value in facts:
        if value is not None:
            console.print(f"[bold]{label:<{width}}[/]  {escape(str(value))}")
    console.print(_by_layer(there))


@mask_app.command("diff")
def diff(
    one: Annotated[Path, typer.Argument(metavar="A", help="Mask file.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="Mask file.")],
) -> None:
    """Show what differs in effect between two masks; names and notes don't count.

    **Example:** `moescope mask diff follow-document.json control-1.json`
    """
    from moescope.clients.mask_files import diff as compare
    from moescope.tracer.mask import read_mask

    found = compare(read_mask(one), read_mask(other))
    console = open_console()
    if not found.settings and not found.experts:
        console.print("no difference in effect")
        return
    if found.settings:
        settings = make_table("setting", "A", "B")
        for label, pair in found.settings.items():
            settings.add_row(label, *(escape("-" if v is None else str(v)) for v in pair))
        console.print(settings)
    if found.experts:
        experts = make_table(">layer", ">expert", "A", "B")
        for (layer, expert), pair in found.experts.items():
            experts.add_row(str(layer), str(expert), *pair)
        console.print(experts)


@mask_app.command("push")
def push(mask: MaskFile, *, url: Url = HERE, admin_key: AdminKey = None) -> None:
    """Put a mask on a server. A name that is there already gets a new version.

    **Example:** `moescope mask push follow-document.json --url http://127.0.0.1:8000`
    """
    from moescope.clients.mask_http import push_mask
    from moescope.tracer.mask import read_mask

    answer = push_mask(read_mask(mask), url, admin_key)
    there = "" if answer.get("created", True) else ", as it was already"
    key = f"{answer.get('name')}@{answer.get('version')}"
    open_console().print(escape(f"{key} is on {url}{there}"))


@mask_app.command("list")
def list_(*, url: Url = HERE, admin_key: AdminKey = None) -> None:
    """List the masks of a server.

    **Example:** `moescope mask list --url http://127.0.0.1:8000`
    """
    from moescope.clients.mask_http import list_masks

    there = list_masks(url, admin_key)
    if not there:
        open_console().print(escape(f"no masks are on {url}"))
        return
    table = make_table("name", ">version", "note")
    for item in there:
        table.add_row(*(cell_text(item.get(key) or "") for key in ("name", "version", "note")))
    open_console().print(table)


@mask_app.command("delete")
def delete(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the mask.")],
    *,
    url: Url = HERE,
    admin_key: AdminKey = None,
) -> None:
    """Delete a mask from a server. Requests that run under it keep it to their end.

    **Example:** `moescope mask delete follow-document --url http://127.0.0.1:8000`
    """
    from moescope.clients.mask_http import delete_mask

    delete_mask(name, url, admin_key)
    open_console().print(escape(f"{name} is gone from {url}"))


def _by_layer(mask: Any) -> Table:
    """A row for each layer that the mask names: its experts, by action."""
    from moescope.clients.mask_files import actions_text
    from moescope.tracer.mask_format import number_ranges

    layers: dict[int, dict[str, list[int]]] = {}
    for (layer, expert), entries in mask.by_expert().items():
        layers.setdefault(layer, {}).setdefault(actions_text(entries), []).append(expert)
    table = make_table(">layer", "action", ">experts", "which")
    for layer, actions in layers.items():
        for text, experts in sorted(actions.items()):
            table.add_row(str(layer), text, str(len(experts)), number_ranges(experts))
    return table


def _print_written(mask: Any, out: Path) -> None:
    console = open_console()
    counts = Counter(entry.action for entry in mask.entries)
    layers = {entry.layer for entry in mask.entries}
    actions = ", ".join(f"{count} {action}" for action, count in counts.items())
    console.print(escape(f"{mask.name}: {actions} in {len(layers)} layers -> {out}"))
    if mask.note:
        console.print(f"[yellow]note:[/] {escape(mask.note)}")
