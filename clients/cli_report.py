"""The command `moescope report`: one page for people, from evaluations and a store."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from moescope.clients.terminal import open_console
from moescope.tracer.errors import InputError

if TYPE_CHECKING:
    from moescope.tracer.object_path import StorePath


def register_report(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("report")(report)


def report(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="EVAL|STORE...",
            help="Folders of `moescope eval`, and at most one store (a folder, s3://… or gs://…).",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The page, an .html file.")],
    positive: Annotated[
        str | None, typer.Option(help="Of a store: the condition whose experts to find.")
    ] = None,
    negative: Annotated[
        str | None, typer.Option(help="Of a store: the condition to compare with.")
    ] = None,
    condition_column: Annotated[
        str, typer.Option(help="Of a store: the column that tells the conditions apart.")
    ] = "condition",
    segment: Annotated[
        str, typer.Option(help="Of a store: the tokens that count, as for `moescope rd`.")
    ] = "response",
    estimator: Annotated[
        str, typer.Option(metavar="token|sequence", help="Of a store: as for `moescope rd`.")
    ] = "sequence",
    length_match: Annotated[
        bool, typer.Option("--length-match", help="Of a store: as for `moescope rd`.")
    ] = False,
    run: Annotated[str | None, typer.Option(help="Of a store: only this run's requests.")] = None,
    show_safety_text: Annotated[
        bool,
        typer.Option(
            "--show-safety-text",
            help="Show prompts and answers of a safety axis, too, not only their labels.",
        ),
    ] = False,
) -> None:
    """Make a page of one or several evaluations, of a store, or of both.

    The page is one file, with its figures inside; they are beside it as PNG files, too. The
    verdict is printed.

    **Example:** `moescope report eval/faithfulness eval/safety --out report.html`

    **A store alone:** `moescope report traces --positive with_doc --negative without_doc --segment
    question --out report.html`
    """
    from moescope.analysis.evaluation import is_evaluation, read_evaluation
    from moescope.analysis.rd import risk_difference
    from moescope.analysis.report import write_report
    from moescope.analysis.report_files import check_target
    from moescope.analysis.report_verdict import verdict_lines
    from moescope.tracer.object_path import store_path

    check_target(out)
    places = [store_path(path) for path in paths]
    folders = [each for each in places if isinstance(each, Path) and is_evaluation(each)]
    stores = [each for each in places if each not in folders]
    _check_stores(stores, positive, negative)
    evaluations = [read_evaluation(path) for path in folders]
    ranking = None
    if stores:
        ranking = risk_difference(
            stores[0],
            condition_column=condition_column,
            positive=str(positive),
            negative=str(negative),
            segment=segment,
            estimator=estimator,  # type: ignore[arg-type]  # checked there
            length_match=length_match,
            run=run,
        )
    names = [str(path) for path in folders]
    write_report(out, evaluations, names=names, ranking=ranking, show_safety_text=show_safety_text)
    console = open_console()
    if evaluations:
        for number, line in enumerate(verdict_lines(evaluations, names), 1):
            console.print(f"{number}. {escape(line)}")
    console.print(f"report: {escape(str(out))}")


def _check_stores(stores: "list[StorePath]", positive: str | None, negative: str | None) -> None:
    """What is no evaluation has to be a store, at most one, with its two conditions named."""
    for path in stores:
        if not (path / "manifest.json").is_file():
            raise InputError(
                f"{path} is neither an evaluation (no eval.json) nor a trace store (no "
                "manifest.json): name what `moescope eval --out` or `moescope trace --store` wrote."
            )
    if len(stores) > 1:
        names = ", ".join(map(str, stores))
        raise InputError(f"a report takes one trace store, and there are {len(stores)}: {names}.")
    if stores and (positive is None or negative is None):
        raise InputError(
            f"{stores[0]} is a trace store: name two of its conditions with --positive and "
            "--negative (`moescope store info` lists them)."
        )
    if not stores and (positive is not None or negative is not None):
        raise InputError("--positive and --negative are for a trace store, and none is named.")
