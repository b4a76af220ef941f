"""The commands `moescope data split` and `moescope data utility`: items for `moescope eval`."""

from pathlib import Path
from typing import Annotated

import typer


def register_items(app: typer.Typer) -> None:
    """Add the commands to `moescope data`."""
    app.command("split")(split)
    app.command("utility")(utility)


def split(
    job: Annotated[
        Path, typer.Argument(help="What `moescope data faithfulness` or `data safety` wrote.")
    ],
    *,
    out: Annotated[Path, typer.Option(help="Folder for job.jsonl, tune.jsonl and eval.jsonl.")],
    tune: Annotated[float, typer.Option(help="Share of the examples to choose a dose on.")] = 0.15,
    evaluate: Annotated[
        float, typer.Option("--eval", help="Share to evaluate on; the rest is traced.")
    ] = 0.35,
    benign: Annotated[
        str | None,
        typer.Option(
            help="For safety: harmless prompts (`prompt`), a file or a data set on the hub, that "
            "should not be refused."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
) -> None:
    """Part a job into examples to trace, to tune on and to evaluate on.

    Examples that share a document or a prompt stay together. Of a counterfactual job the items
    are conflicts: the document says one thing, the truth is another.

    **Example:** `moescope data split job.jsonl --out parts`, then `moescope trace parts/job.jsonl`,
    `moescope rd` and `moescope eval faithfulness parts/eval.jsonl --tune parts/tune.jsonl`
    """
    from rich.console import Console
    from rich.markup import escape

    from moescope.clients.split import split_job

    counts = split_job(job, out, tune=tune, evaluate=evaluate, seed=seed, benign=benign)
    console = Console(highlight=False)
    for name, lines in counts.items():
        console.print(escape(f"{lines:6} lines -> {out / name}"), soft_wrap=True)


def utility(
    source: Annotated[
        str,
        typer.Argument(
            help="Multiple choice questions in the layout of ARC, MMLU, HellaSwag or with "
            "`question`, `choices`, `correct`: a file or a data set on the hub."
        ),
    ],
    *,
    out: Annotated[Path, typer.Option(help="Items to evaluate on; an existing file is replaced.")],
    tune: Annotated[
        Path | None, typer.Option(help="Put a part of the questions here, to tune on.")
    ] = None,
    tune_share: Annotated[float, typer.Option(help="How large a part.")] = 0.3,
    limit: Annotated[
        int | None, typer.Option(help="Keep this many questions, drawn at random by --seed.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    licence: Annotated[
        str | None, typer.Option(help="The source's licence, for the data card.")
    ] = None,
) -> None:
    """Make items of utility from multiple choice questions.

    **Example:** `moescope data utility allenai/ai2_arc:ARC-Easy@test --limit 600
    --out utility.jsonl --tune utility.tune.jsonl`
    """
    from rich.console import Console
    from rich.markup import escape

    from moescope.clients.utility import make_utility

    counts = make_utility(
        source, out, tune=tune, limit=limit, tune_share=tune_share, seed=seed, licence=licence
    )
    said = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in counts.items())
    Console(highlight=False).print(escape(f"Questions: {said}.\n-> {out}"), soft_wrap=True)
