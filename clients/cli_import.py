"""Other tools' data: `moescope import` makes stores, rankings and masks, `export` gives ours.

The libraries are imported inside the commands, so that `--help` is quick.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress

from moescope.clients.cli_options import Store
from moescope.clients.terminal import count_text, open_console
from moescope.tracer.errors import InputError

import_app = typer.Typer(
    no_args_is_help=True, help="Make stores, rankings and masks of others' data."
)
export_app = typer.Typer(no_args_is_help=True, help="Write rankings and masks for other tools.")


@import_app.command("esft")
def esft(
    folder: Annotated[Path, typer.Argument(help="Folder that holds DOMAIN/expert_weights_*.txt.")],
    store: Store,
    top_k: Annotated[int, typer.Option(help="Experts that each token chose.")] = 6,
    num_experts: Annotated[int, typer.Option(help="Routed experts of a layer.")] = 64,
) -> None:
    """Import the routing that ESFT published for a DeepSeek-V2-Lite-family model.

    Each domain becomes a condition of the run `esft`; all tokens are in segment `prompt`.

    **Example:** `moescope import esft results/expert_scores traces`
    """
    from moescope.analysis.esft import import_esft

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as bar:
        task = bar.add_task("reading files", total=None)
        requests, tokens = import_esft(
            folder,
            store,
            top_k=top_k,
            num_experts=num_experts,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    open_console().print(f"{escape(str(store))}: {requests:,} requests, {tokens:,} tokens.")


@import_app.command("routed-experts")
def routed_experts(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE... STORE",
            help=".npy, .json and .jsonl files; last the store, as for other commands.",
        ),
    ],
    config: Annotated[
        Path | None, typer.Option(help="The model's config.json, or the folder that holds it.")
    ] = None,
    num_experts: Annotated[
        int | None, typer.Option(min=2, help="Routed experts of a layer, if there is no --config.")
    ] = None,
    moe_layers: Annotated[
        str | None,
        typer.Option(metavar="1-26", help="The MoE layers; all that don't look dense if left out."),
    ] = None,
    run: Annotated[str, typer.Option(help="The run of requests that name none.")] = "import",
    condition: Annotated[
        str | None, typer.Option(help="The condition of requests that name none.")
    ] = None,
    start: Annotated[
        int, typer.Option(min=0, help="Position of the first row, if the prompt was cut.")
    ] = 0,
) -> None:
    """Import the `routed_experts` that vLLM or SGLang returned: arrays, or responses of their APIs.

    They hold no gate weights, and so does the store: questions of gate mass have no answer there.
    docs/import.md says which forms are read.

    **Example:** `moescope import routed-experts responses.jsonl traces --config model/config.json`
    """
    from moescope.analysis.routed_experts import import_routed_experts
    from moescope.analysis.routed_sources import Layout

    if len(sources) < 2:
        raise InputError("name at least one source, and the store last.")
    *files, store = sources
    layers = parse_layers(moe_layers, "--moe-layers")
    if config is not None:
        layout = Layout.of_config(config, layers)
    elif num_experts is not None:
        layout = Layout(num_experts, layers)
    else:
        raise InputError("the arrays don't say how many experts there are: give --config or "
                         "--num-experts.")  # fmt: skip
    requests, tokens = import_routed_experts(
        files, store, layout, run=run, condition=condition, start=start
    )
    open_console().print(
        f"{escape(str(store))}: {count_text(requests)} requests, {count_text(tokens)} tokens, "
        "without gate weights."
    )


@import_app.command("steermoe")
def steermoe(
    pickle: Annotated[Path, typer.Argument(metavar="PKL", help="SteerMoE's activations_*.pkl.")],
    ranking: Annotated[Path, typer.Argument(help="A .parquet, .csv or .json file to write.")],
    positive: Annotated[str, typer.Option(help="A name for its condition 1.")] = "1",
    negative: Annotated[str, typer.Option(help="A name for its condition 2.")] = "2",
    moe_layers: Annotated[
        str | None,
        typer.Option(metavar="1-26", help="The model's MoE layers, where they don't count from 0."),
    ] = None,
) -> None:
    """Make a ranking of a SteerMoE table, as `moescope rd --out` writes it.

    The file is a pickle, which can hold code: only tables of pandas and numpy are read.

    **Example:** `moescope import steermoe "activations_[model]_[safety].pkl" safety.parquet`
    """
    from moescope.analysis.export import file_format, write_ranking
    from moescope.analysis.steermoe import read_steermoe

    file_format(ranking)
    layers = parse_layers(moe_layers, "--moe-layers")
    table = read_steermoe(pickle, positive=positive, negative=negative, layers=layers)
    write_ranking(table, ranking)
    open_console().print(f"{count_text(table.num_rows)} experts: {escape(str(ranking))}")


@import_app.command("mask")
def import_mask(
    table: Annotated[Path, typer.Argument(help="A .parquet, .csv or .json table of experts.")],
    name: Annotated[str, typer.Option(help="Name of the mask, by which requests ask for it.")],
    out: Annotated[Path, typer.Option(help="Mask file to write; an existing one is replaced.")],
) -> None:
    """Make a mask of a table with the columns layer, expert, action and, for scale and bias, value.

    **Example:** `moescope import mask experts.csv --name mine --out mine.json`
    """
    from moescope.clients.mask_tables import mask_from_table
    from moescope.clients.ranking import read_table
    from moescope.tracer.mask import write_mask

    mask = mask_from_table(read_table(table), name=name, source=str(table))
    write_mask(mask, out)
    open_console().print(f"{count_text(len(mask.entries))} experts: {escape(str(out))}")


@export_app.command("ranking")
def export_ranking(
    ranking: Annotated[Path, typer.Argument(help="File that `moescope rd --out` wrote.")],
    out: Annotated[
        Path, typer.Argument(help=".parquet, .csv, .json, or .pkl in SteerMoE's columns.")
    ],
) -> None:
    """Write a ranking in another format; .pkl is a table that SteerMoE's notebooks read.

    **Example:** `moescope export ranking ranking.parquet "activations_[model]_[safety].pkl"`
    """
    from moescope.analysis.export import write_ranking
    from moescope.analysis.steermoe import write_steermoe
    from moescope.clients.ranking import read_ranking

    table = read_ranking(ranking)
    if out.suffix == ".pkl":
        write_steermoe(table, out)
    else:
        write_ranking(table, out)
    open_console().print(f"{count_text(table.num_rows)} experts: {escape(str(out))}")


@export_app.command("mask")
def export_mask(
    mask: Annotated[Path, typer.Argument(metavar="MASK", help="Mask file (docs/masks.md).")],
    out: Annotated[Path, typer.Argument(help="A .parquet, .csv or .json file to write.")],
) -> None:
    """Write a mask as a table of its experts: layer, expert, action, value.

    **Example:** `moescope export mask follow-document.json follow-document.csv`
    """
    from moescope.analysis.export import write_ranking
    from moescope.clients.mask_tables import mask_table
    from moescope.tracer.mask import read_mask

    table = mask_table(read_mask(mask))
    write_ranking(table, out)
    open_console().print(f"{count_text(table.num_rows)} experts: {escape(str(out))}")


def parse_layers(text: str | None, option: str) -> tuple[int, ...] | None:
    """Numbers and ranges such as "4-20,22"; InputError that names the option for another text."""
    if text is None:
        return None
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise InputError(f"{option} {text!r}: write numbers and ranges, as 4-20,22.")
        found |= set(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))
