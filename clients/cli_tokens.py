"""The commands `experts show` and `request`: routing beside the text that was routed.

DuckDB and transformers are imported inside the commands, so that `--help` is quick.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from moescope.clients.cli_import import parse_layers
from moescope.clients.cli_options import Store
from moescope.clients.cli_questions import (
    Condition,
    Mask,
    Out,
    Plot,
    Run,
    Segment,
    check_files,
)
from moescope.clients.terminal import count_text, make_table, open_console
from moescope.tracer.errors import InputError

Tokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Show text by this model's tokenizer; without it, by that of the store's model if "
        "that is a folder here, else token ids.",
    ),
]

experts_app = typer.Typer(no_args_is_help=True, help="Look at single experts.")


@experts_app.command("show")
def show(
    expert: Annotated[str, typer.Argument(metavar="EXPERT", help="Layer and expert: L12E07.")],
    store: Store,
    by: Annotated[
        str, typer.Option(metavar="lift|count", help="Which tokens come first.")
    ] = "lift",
    min_total: Annotated[
        int, typer.Option(min=1, help="By lift: only tokens that occur so often.")
    ] = 5,
    top: Annotated[int, typer.Option(min=1, help="Tokens to print.")] = 20,
    context: Annotated[
        int, typer.Option(min=0, help="Tokens on either side in the examples; 0: no examples.")
    ] = 8,
    examples: Annotated[int, typer.Option(min=1, help="Examples of each token.")] = 1,
    tokenizer: Tokenizer = None,
    run: Run = None,
    condition: Condition = None,
    mask: Mask = None,
    segment: Segment = None,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Show an expert's favourite tokens, and where it is chosen.

    Rate is the part of a token's occurrences that chose the expert; lift is that over the rate of
    all tokens. The examples are the places of largest gate weight.

    **Example:** `moescope experts show L12E07 traces --tokenizer deepseek-ai/DeepSeek-V2-Lite`

    **Example:** `moescope experts show L12E07 traces --by count --plot tokens.png`
    """
    from moescope.analysis.questions import (
        Selection,
        contexts,
        expert_tokens,
        parse_expert,
        read_model,
    )

    check_files(out, plot)
    layer, number = parse_expert(expert)
    chosen = Selection(run, condition, mask, segment)
    rows = expert_tokens(store, layer, number, chosen, by=by, min_total=min_total)  # type: ignore[arg-type]  # checked there
    decode = _decoder(tokenizer, read_model(store))
    shown = rows.slice(0, top).to_pylist()
    places: dict[int, list[Any]] = {}
    if context and shown:
        ids = [row["token_id"] for row in shown]
        places = contexts(store, layer, number, ids, chosen, around=context, each=examples)
    table = make_table("token", ">id", ">chosen", ">of", ">rate", ">lift", ">weight", "where")
    for row in shown:
        where = [_context(place, decode) for place in places.get(row["token_id"], [])]
        weight = "-" if row["mean_weight"] is None else f"{row['mean_weight']:.3f}"
        table.add_row(
            escape(decode([row["token_id"]])) if decode else "", str(row["token_id"]),
            count_text(row["count"]), count_text(row["total"]), f"{row['rate']:.3f}",
            f"{row['lift']:.2f}", weight, "\n".join(where),
        )  # fmt: skip
    console = open_console()
    if shown:
        console.print(table)
    else:
        console.print(
            f"no token that occurs {min_total} times chose {escape(expert)} "
            f"({escape(str(chosen))}): lower --min-total, or look --by count."
        )
    if plot:
        from moescope.analysis.question_plots import plot_tokens

        labels = [decode([row["token_id"]]) if decode else str(row["token_id"]) for row in shown]
        title = f"{expert}: favourite tokens ({chosen})"
        plot_tokens(shown, labels, plot, title=title)
        console.print(f"bars: {escape(str(plot))}")
    if out:
        from moescope.analysis.export import write_ranking

        write_ranking(rows, out)
        console.print(f"{count_text(rows.num_rows)} tokens: {escape(str(out))}")


def request(
    store: Store,
    request_id: Annotated[str, typer.Argument(metavar="REQUEST_ID", help="Which request.")],
    layers: Annotated[
        str | None,
        typer.Option(metavar="4-20,22", help="Only these layers; the first four if left out."),
    ] = None,
    tokenizer: Tokenizer = None,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Show the routing of one request, token by token: the experts of each layer by rank.

    --out writes a row a token and layer, with the gate weights.

    **Example:** `moescope request traces q17 --layers 1-3 --tokenizer deepseek-ai/DeepSeek-V2-Lite`

    **Example:** `moescope request traces q17 --layers 12,13 --plot q17.png`
    """
    from moescope.analysis.export import write_ranking
    from moescope.analysis.questions import read_model, request_routing

    check_files(out, plot)
    routing = request_routing(store, request_id)
    model = read_model(store)
    wanted = _parse_layers(layers, model["moe_layers"])
    decode = _decoder(tokenizer, model)
    table = make_table(">position", ">id", "token", "segment", *(f"layer {n}" for n in wanted))
    lines: dict[int, dict[str, Any]] = {}
    for row in routing.to_pylist():
        line = lines.setdefault(row["position"], row | {"by_layer": {}})
        line["by_layer"][row["layer"]] = " ".join(map(str, row["experts"]))
    for position, line in lines.items():
        table.add_row(
            str(position), str(line["token_id"]),
            escape(decode([line["token_id"]])) if decode else "", escape(line["segment"]),
            *(line["by_layer"][layer] for layer in wanted),
        )  # fmt: skip
    console = open_console()
    console.print(table)
    if plot:
        import pyarrow as pa
        import pyarrow.compute as pc

        from moescope.analysis.question_plots import plot_request

        some = routing.filter(pc.is_in(routing["layer"], value_set=pa.array(wanted, pa.int32())))
        labels = [
            decode([line["token_id"]]) if decode else str(line["token_id"])
            for line in lines.values()
        ]
        experts = model["num_experts"]
        plot_request(some, labels, plot, num_experts=experts, title=request_id)
        console.print(f"picture: {escape(str(plot))}")
    if out:
        write_ranking(routing, out)
        console.print(f"{count_text(routing.num_rows)} rows: {escape(str(out))}")


def _parse_layers(text: str | None, there: list[int]) -> list[int]:
    if text is None:
        return there[:4]
    wanted = set(parse_layers(text, "--layers") or ())
    if not wanted <= set(there):
        raise InputError(
            f"--layers {text!r}: the model has no MoE layer {min(wanted - set(there))}, but "
            f"{there[0]} to {there[-1]}."
        )
    return sorted(wanted)


def _decoder(name: str | None, model: dict[str, Any]) -> Callable[[Sequence[int]], str] | None:
    """Token ids as one line of text; None where there is no tokenizer."""
    if name is None:
        if not (Path(model["model"]) / "tokenizer_config.json").is_file():
            return None
        name = model["model"]
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(name, revision=None)
    except Exception as error:
        raise InputError(f"can't load the tokenizer {name}: {error}") from error

    def decode(ids: Sequence[int]) -> str:
        text = str(loaded.decode([token for token in ids if token >= 0]))
        return text.replace("\n", "⏎").replace("\t", "⇥")

    return decode


def _context(place: Any, decode: Callable[[Sequence[int]], str] | None) -> str:
    """The tokens around one, which stands in bold brackets."""
    show = decode or (lambda ids: " ".join(map(str, ids)) if ids else "")
    space = "" if decode else " "
    before, it, after = (escape(show(ids)) for ids in (place.before, [place.token_id], place.after))
    return f"{before}{space}[bold]»{it}«[/]{space}{after}"
