"""What people ask of a store: `load`, `coactivation`, `compare`, and `rank-overlap` of rankings.

DuckDB, Arrow and matplotlib are imported inside the commands, so that `--help` is quick.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from moescope.clients.cli_options import Store
from moescope.clients.terminal import count_text, make_table, open_console
from moescope.tracer.errors import InputError

Run = Annotated[str | None, typer.Option(help="Only requests of this run.")]
Condition = Annotated[str | None, typer.Option(help="Only requests of this condition.")]
Mask = Annotated[str | None, typer.Option(help="Only tokens under this mask; none: under no mask.")]
Segment = Annotated[
    str | None, typer.Option(help="Only tokens of this segment: response, prompt, a span's name.")
]
Out = Annotated[Path | None, typer.Option(help="Write all rows to a .parquet, .csv or .json file.")]
Plot = Annotated[Path | None, typer.Option(help="Draw to a .png, .pdf or .svg file.")]


def register_questions(app: typer.Typer) -> None:
    """Add the commands `load`, `coactivation`, `compare` and `rank-overlap`."""
    app.command("load")(load)
    app.command("coactivation")(coactivation)
    app.command("compare")(compare)
    app.command("rank-overlap")(rank_overlap)


def load(
    store: Store,
    run: Run = None,
    condition: Condition = None,
    mask: Mask = None,
    segment: Segment = None,
    overload: Annotated[
        float, typer.Option(min=1, help="An expert of so many times the even share is overused.")
    ] = 3.0,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Say how evenly each layer uses its experts, and which are dead or overused.

    An expert's load is its share of the layer's choices over the even share: 1 is even. Evenness is
    the entropy of the shares over its maximum. --out writes the load of every expert.

    **Example:** `moescope load traces --segment response --plot load.png`
    """
    from moescope.analysis.question_plots import plot_load
    from moescope.analysis.questions import Selection, expert_load, layer_load

    check_files(out, plot)
    chosen = Selection(run, condition, mask, segment)
    layers = layer_load(store, chosen, overload=overload).to_pylist()
    experts = expert_load(store, chosen)
    table = make_table(
        ">layer", ">tokens", ">evenness", ">effective experts", ">busiest", ">its load", ">dead",
        ">overused",
    )  # fmt: skip
    for row in layers:
        table.add_row(
            str(row["layer"]), count_text(row["tokens"]), f"{row['evenness']:.3f}",
            f"{row['effective']:.1f}", str(row["busiest"]), f"{row['busiest_load']:.2f}",
            count_text(row["dead"]), count_text(row["overused"]),
        )  # fmt: skip
    console = open_console()
    console.print(table)
    rows = experts.to_pylist()
    for name, them in (
        ("dead", [row for row in rows if row["count"] == 0]),
        (f"load {overload:g} or more", [row for row in rows if row["load"] >= overload]),
    ):
        if them:
            console.print(f"{name}: {_names(them)}")
    _write(console, experts, out)
    if plot:
        plot_load(experts, plot)
        console.print(f"load: {escape(str(plot))}")


def coactivation(
    store: Store,
    layer: Annotated[int, typer.Option(help="The layer, by the model's own number.")],
    run: Run = None,
    condition: Condition = None,
    mask: Mask = None,
    segment: Segment = None,
    min_together: Annotated[
        int, typer.Option(min=0, help="Print only pairs that so many tokens chose.")
    ] = 10,
    top: Annotated[int, typer.Option(min=0, help="Pairs to print.")] = 20,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Which experts of a layer are chosen together, and how much more often than by chance.

    Lift is the number of tokens that chose both over the number that independent experts would
    have; PMI is log2 of it. A router that chooses top-k at random has a lift below 1: the command
    says which.

    **Example:** `moescope coactivation traces --layer 12 --plot together.png`
    """
    from moescope.analysis import questions
    from moescope.analysis.question_plots import plot_coactivation

    check_files(out, plot)
    chosen = questions.Selection(run, condition, mask, segment)
    pairs = questions.coactivation(store, layer, chosen)
    model = questions.read_model(store)
    even = questions.even_lift(model["num_experts"], model["top_k"])
    table = make_table(">expert", ">expert", ">together", ">of", ">and of", ">lift", ">PMI, bits")
    rows = [row for row in pairs.to_pylist() if row["together"] >= min_together]
    for row in rows[:top]:
        counts = map(count_text, (row["together"], row["count"], row["other_count"]))
        pmi = "-" if row["pmi"] is None else f"{row['pmi']:+.2f}"
        table.add_row(str(row["expert"]), str(row["other"]), *counts, f"{row['lift']:.2f}", pmi)
    console = open_console()
    console.print(table)
    tokens = count_text(pairs["tokens"][0].as_py() if pairs.num_rows else 0)
    console.print(f"layer {layer}, {tokens} tokens ({escape(str(chosen))})")
    console.print(f"a router that chooses at random has the lift {even:.2f}")
    _write(console, pairs, out)
    if plot:
        title = f"layer {layer}, {tokens} tokens ({chosen})"
        plot_coactivation(pairs, plot, even_lift=even, title=title)
        console.print(f"heat map: {escape(str(plot))}")


def compare(
    store: Store,
    a: Annotated[
        list[str],
        typer.Option("--a", metavar="NAME=VALUE", help="Side a: run=, condition= or mask=."),
    ],
    b: Annotated[list[str], typer.Option("--b", metavar="NAME=VALUE", help="Side b, likewise.")],
    segment: Segment = None,
    relabellings: Annotated[int, typer.Option(min=100, help="Random sides to compare with.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random sides.")] = 0,
    top: Annotated[int, typer.Option(min=0, help="Experts to print, gained and lost.")] = 10,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """How routing shifts from side a to side b: two runs, two conditions, or two masks.

    Moved (total variation) is the part of a layer's choices that went to other experts; by chance,
    what moves when the same requests fall to the sides at random. Of tokens that both sides have,
    at the same position of the same example after the same tokens, kept is the part of the
    experts that stayed. --a and --b can be given several times. --out writes every expert.

    **Example:** `moescope compare traces --a mask=none --b mask=follow --segment response`
    """
    from moescope.analysis.question_plots import plot_shift
    from moescope.analysis.questions import Selection
    from moescope.analysis.shift import compare

    check_files(out, plot)
    sides = Selection.parse(a), Selection.parse(b)
    found = compare(store, *sides, segment=segment, relabellings=relabellings, seed=seed)
    console = open_console()
    table = make_table(
        ">layer", ">moved", ">by chance", ">p", ">JS distance", ">mass moved", ">kept",
        ">same experts",
    )  # fmt: skip
    names = (
        "total_variation", "by_chance", "p_value", "jensen_shannon", "mass_moved", "kept",
        "same_experts",
    )  # fmt: skip
    for row in found.layers.to_pylist():
        table.add_row(str(row["layer"]), *(_number(row[name], ".4f") for name in names))
    console.print(table)
    paired = count_text(found.paired_tokens)
    console.print(f"tokens of both sides: {paired}, of {count_text(found.pairs)} pairs of requests")
    _print_experts(console, found, top)
    _write(console, found.experts, out)
    if plot:
        title = f"{sides[0]} to {sides[1]}" + (f"\nsegment {segment}" if segment else "")
        plot_shift(found.experts, plot, title=title)
        console.print(f"heat map: {escape(str(plot))}")


def _print_experts(console: Console, found: Any, top: int) -> None:
    """The experts that gained and lost most, and who took the lost ones' place."""
    places: dict[tuple[int, int], list[int]] = {}
    for row in found.replaced.to_pylist():
        places.setdefault((row["layer"], row["lost"]), []).append(row["gained"])
    rows = sorted(found.experts.to_pylist(), key=lambda row: -abs(row["shift"]))
    table = make_table(">layer", ">expert", ">shift", ">share a", ">share b", "replaced by")
    for row in [row for row in rows if row["shift"]][:top]:
        taken = places.get((row["layer"], row["expert"]), []) if row["shift"] < 0 else []
        table.add_row(
            str(row["layer"]), str(row["expert"]), f"{row['shift']:+.4f}",
            f"{row['share_a']:.4f}", f"{row['share_b']:.4f}", ", ".join(map(str, taken[:5])),
        )  # fmt: skip
    if table.row_count:
        console.print(table)


def rank_overlap(
    first: Annotated[Path, typer.Argument(metavar="A", help="Ranking of `moescope rd --out`.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one, of the same model.")],
    top: Annotated[
        list[int] | None, typer.Option(min=1, help="How many of the strongest; several times.")
    ] = None,
    plot: Plot = None,
) -> None:
    """Do two rankings name the same experts? Overlap of their strongest, and rank correlations.

    By chance is what two unrelated rankings would share, and p how often they would share as many.

    **Example:** `moescope rank-overlap faithfulness.parquet safety.parquet --top 20 --top 100`
    """
    from moescope.analysis.question_plots import plot_overlap
    from moescope.analysis.report_axes import compare_rankings
    from moescope.clients.ranking import read_ranking

    check_files(None, plot)
    rankings = read_ranking(first), read_ranking(second)
    for path, ranking in zip((first, second), rankings, strict=True):
        missing = [name for name in ("layer", "expert", "rd") if name not in ranking.column_names]
        if missing or ranking.num_rows == 0:
            raise InputError(f"{path} is no ranking: make it with `moescope rd --out`.")
    console = open_console()
    table = make_table(">top", ">shared", ">by chance", ">p")
    size = rankings[0].num_rows
    tops = sorted({min(number, size) for number in top or (10, 20, 50, 100)})
    for number in tops:
        found = compare_rankings((first.stem, second.stem), rankings, number)
        if found is None:
            raise InputError(
                f"{first} and {second} rank different experts: compare rankings of the same model."
            )
        table.add_row(
            count_text(number), count_text(len(found.shared)), f"{found.by_chance:.1f}",
            f"{found.p_chance:.2g}",
        )  # fmt: skip
        if number == tops[0]:
            smallest = found
    console.print(table)
    console.print(f"Spearman's rank correlation over {size:,} experts: {smallest.rho:+.3f} of RD, "
                  f"{smallest.rho_magnitude:+.3f} of |RD|")  # fmt: skip
    if smallest.shared:
        experts = [{"layer": layer, "expert": expert} for layer, expert in smallest.shared]
        console.print(f"in the top {tops[0]:,} of both: {_names(experts)}")
    if plot:
        plot_overlap(smallest, plot)
        console.print(f"scatter plot: {escape(str(plot))}")


def check_files(out: Path | None, plot: Path | None) -> None:
    """InputError for names of files that we can't write, before the wait."""
    from moescope.analysis.export import file_format
    from moescope.analysis.plot import check_drawing

    if out:
        file_format(out)
    if plot:
        check_drawing(plot)


def _write(console: Console, table: Any, out: Path | None) -> None:
    from moescope.analysis.export import write_ranking

    if out:
        write_ranking(table, out)
        console.print(f"{count_text(table.num_rows)} rows: {escape(str(out))}")


def _names(rows: list[dict[str, Any]], most: int = 30) -> str:
    """Experts as L01E07, the first of them."""
    names = [f"L{row['layer']:02}E{row['expert']:02}" for row in rows[:most]]
    more = f" and {len(rows) - most:,} more" if len(rows) > most else ""
    return ", ".join(names) + more


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
