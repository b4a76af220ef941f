"""The command `moescope rd`: a ranking of experts, how sure it is, and a heat map.

DuckDB, Arrow, scipy and matplotlib are imported inside the command, so that `--help` is quick.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from moescope.clients.cli_options import Store
from moescope.clients.ray_cluster import ADDRESS_FORM
from moescope.clients.terminal import count_text, make_table, open_console
from moescope.tracer.errors import InputError


def rd(
    store: Store,
    positive: Annotated[str, typer.Option(help="The condition whose experts to find.")],
    negative: Annotated[str, typer.Option(help="The condition to compare with.")],
    condition_column: Annotated[
        str, typer.Option(help="The column of `requests` that tells the conditions apart.")
    ] = "condition",
    segment: Annotated[
        str, typer.Option(help="The tokens that count: response, prompt, a span's name, or all.")
    ] = "response",
    lead: Annotated[
        int,
        typer.Option(
            min=0,
            help="Tokens before the segment that count too: 1 is where its first token is decided.",
        ),
    ] = 0,
    positions: Annotated[
        str | None,
        typer.Option(
            metavar="first:K|last:K|START:STOP", help="Only these tokens of the segment (and lead)."
        ),
    ] = None,
    token_ids: Annotated[
        str | None, typer.Option(metavar="ID,ID,…", help="Only tokens with these ids.")
    ] = None,
    exclude_token_ids: Annotated[
        str | None, typer.Option(metavar="ID,ID,…", help="No tokens with these ids.")
    ] = None,
    exclude_special: Annotated[
        bool,
        typer.Option(
            "--exclude-special", help="No special tokens of the tokenizer of the store's model."
        ),
    ] = False,
    estimator: Annotated[
        str,
        typer.Option(
            metavar="token|sequence",
            help="Pool all tokens (as SteerMoE does), or average the requests' rates.",
        ),
    ] = "sequence",
    gate_mass: Annotated[
        bool, typer.Option("--gate-mass", help="Compare gate weights, not how often chosen.")
    ] = False,
    length_match: Annotated[
        bool,
        typer.Option("--length-match", help="Cut both requests of a pair to the shorter one."),
    ] = False,
    strata: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN|FILE:COLUMN",
            help="Compare within each value of this column of `requests`, or of a file by "
            "example_id, and combine.",
        ),
    ] = None,
    run: Annotated[str | None, typer.Option(help="Only requests of this run.")] = None,
    include_incomplete: Annotated[
        bool, typer.Option("--include-incomplete", help="Count requests that lost rows too.")
    ] = False,
    resamples: Annotated[
        int, typer.Option(min=100, help="Bootstrap resamples and permutations of the examples.")
    ] = 2000,
    no_intervals: Annotated[
        bool, typer.Option("--no-intervals", help="Estimates only: no resampling.")
    ] = False,
    stability: Annotated[
        bool,
        typer.Option(
            "--stability",
            help="Say how far the ranking and its first --top experts hold with other examples.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the resampling.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Write every expert to a .parquet, .csv or .json file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw layers x experts to a .png, .pdf or .svg file.")
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="Experts to print.")] = 20,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar=ADDRESS_FORM,
            help="Count in tasks of a Ray cluster, a part of the files each (docs/ray.md).",
        ),
    ] = None,
) -> None:
    """Rank the experts by risk difference: how much more often one condition uses them.

    RD = rate under --positive minus rate under --negative, of each MoE layer's experts. In the
    table, a1 and a2 count the tokens that chose the expert under the one and the other. The 95 %
    interval, the effect size and q (the false discovery rate over all experts) take the example
    as the unit: docs/statistics.md.

    **Example:** `moescope rd traces --positive with_doc --negative without_doc --length-match
    --out ranking.parquet --plot heatmap.png`
    """
    from moescope.analysis.export import file_format, write_ranking
    from moescope.analysis.plot import heatmap
    from moescope.analysis.rd import read_settings, risk_difference

    if out:
        file_format(out)  # a wrong suffix should not cost the wait
    if stability and (no_intervals or not top):
        raise InputError("--stability resamples the first --top experts: leave --no-intervals out.")
    excluded = _parse_ids("--exclude-token-ids", exclude_token_ids)
    if exclude_special:
        excluded += _special_ids(store)
    with _counting(store, ray) as more:
        table = risk_difference(
            store,
            condition_column=condition_column,
            positive=positive,
            negative=negative,
            segment=segment,
            estimator=estimator,  # type: ignore[arg-type]  # checked there
            gate_mass=gate_mass,
            length_match=length_match,
            run=run,
            include_incomplete=include_incomplete,
            positions=positions,
            lead=lead,
            token_ids=_parse_ids("--token-ids", token_ids),
            exclude_token_ids=excluded,
            strata=strata,
            resamples=0 if no_intervals else resamples,
            stability=top if stability else 0,
            seed=seed,
            **more,
        )
    settings = read_settings(table)
    console = open_console()
    _print_ranking(console, table.slice(0, top).to_pylist(), settings)
    for side in ("positive", "negative"):
        requests, tokens = settings[f"examples_{side}"], settings[f"tokens_{side}"]
        console.print(f"{escape(settings[side])}: {requests:,} requests, {tokens:,} tokens")
    if settings["resamples"]:
        found = sum(q <= 0.05 for q in table["q_value"].to_pylist())
        _print_inference(console, settings, found, table.num_rows)
    if "stability" in settings:
        _print_stability(console, settings["stability"])
    for reason, count in settings["left_out"].items():
        console.print(f"[yellow]left out:[/] {count:,} requests ({reason})")
    if out:
        write_ranking(table, out)
        console.print(f"ranking: {escape(str(out))}")
    if plot:
        heatmap(table, plot)
        console.print(f"heat map: {escape(str(plot))}")


@contextmanager
def _counting(store: str, address: str | None) -> Iterator[dict[str, Any]]:
    """What `risk_difference` is told of who counts: nothing, or a Ray cluster."""
    if address is None:
        yield {}
        return
    from moescope.analysis.ray_counts import RayCounts
    from moescope.clients.ray_cluster import ray_cluster
    from moescope.tracer.store import read_manifest

    read_manifest(store)  # a wrong path should not cost the wait
    with ray_cluster(address) as ray:
        yield {"counting": lambda files: RayCounts(ray, store, files)}


def _print_ranking(console: Console, rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    sure = (">95 % interval", ">q", ">effect") if settings["resamples"] else ()
    names = (f">{settings['positive']}", f">{settings['negative']}")
    ranking = make_table(">layer", ">expert", ">RD", *sure, *names, ">a1", ">a2")
    for row in rows:
        cells = [str(row["layer"]), str(row["expert"]), f"{row['rd']:+.4f}"]
        if sure:
            cells += [_interval(row), f"{row['q_value']:.4f}", _number(row["effect"], "+.2f")]
        cells += [f"{row['rate_positive']:.4f}", f"{row['rate_negative']:.4f}"]
        ranking.add_row(*cells, count_text(row["a1"]), count_text(row["a2"]))
    console.print(ranking)


def _interval(row: dict[str, Any]) -> str:
    return f"{_number(row['ci_low'], '+.4f')} {_number(row['ci_high'], '+.4f')}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _print_inference(console: Console, settings: dict[str, Any], found: int, experts: int) -> None:
    """What was resampled, how many experts differ, and what the design could find."""
    pairs = settings["pairs"]
    units = {
        "paired": f"{pairs:,} pairs",
        "unpaired": "unpaired examples",
        "mixed": f"examples, {pairs:,} of them pairs",
    }[settings["design"]]
    console.print(
        f"{found:,} of {experts:,} experts differ at a false discovery rate of 5 % "
        f"(q ≤ 0.05; {units}, {settings['resamples']:,} resamples)"
    )
    each = "pairs" if settings["design"] == "paired" else "examples of each condition"
    for note, who in zip(
        settings["power"], ("an expert named beforehand", "any expert"), strict=True
    ):
        needed = ", ".join(f"{n:,} for d = {d}" for d, n in note["needed"].items())
        here = _number(note["detectable"], ".2f")
        console.print(
            f"[dim]to find {who} ({note['power']:.0%} power): {needed} ({each}); "
            f"here: d = {here}[/]"
        )


def _print_stability(console: Console, facts: dict[str, Any]) -> None:
    top = facts["top"]
    for name, what in (("split_half", "two halves"), ("bootstrap", "resamples and this ranking")):
        found = facts[name]
        if found is None:
            console.print(f"{what}: too few examples to say")
            continue
        rank, overlap = found["spearman"], found["overlap"]
        console.print(
            f"{what}: rank correlation {_range(rank)}, of the first {top:,} experts "
            f"{_range(overlap, '.0%')} shared"
        )


def _range(found: dict[str, float], form: str = ".2f") -> str:
    mean, low, high = (format(found[name], form) for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def _parse_ids(option: str, text: str | None) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise InputError(f"{option} {text!r}: give token ids with commas between them.") from None


def _special_ids(store: str) -> list[int]:
    """The special tokens of the tokenizer of the store's model."""
    from transformers import AutoTokenizer

    from moescope.tracer.store import read_manifest

    model = read_manifest(store)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.model, revision=model.revision)
    except Exception as error:
        raise InputError(
            f"can't load the tokenizer of {model.model}, which --exclude-special needs: give the "
            f"ids with --exclude-token-ids ({error})"
        ) from error
    return sorted(tokenizer.all_special_ids)
