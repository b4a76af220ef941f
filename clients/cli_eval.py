"""The command `moescope eval`: what masks change, and what they cost.

The libraries are imported inside the commands, so that `--help` is quick.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moescope.tracer.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from moescope.analysis.evaluation import Evaluation

eval_app = typer.Typer(
    no_args_is_help=True,
    help="Evaluate steering: base, steered, reversed and random experts on the same items.",
)

Items = Annotated[Path, typer.Argument(help="Items to evaluate, JSON lines (docs/evaluation.md).")]
EngineOptions = Annotated[
    list[str] | None,
    typer.Argument(help="vLLM engine options after `--`, such as --max-model-len 4096."),
]
Ranking = Annotated[
    Path, typer.Option(help="Ranking to make masks from: what `moescope rd --out` wrote.")
]
Out = Annotated[Path, typer.Option(help="Folder of the evaluation to write.")]
Model = Annotated[
    str | None, typer.Option(help="Model folder or Hugging Face name: an engine of its own.")
]
Url = Annotated[str | None, typer.Option(help="Or a running `moescope serve`.")]
Tune = Annotated[
    list[Path] | None,
    typer.Option(
        help="Items to choose the dose on, of this axis and of utility; not those that are "
        "evaluated. May be repeated."
    ),
]
Utility = Annotated[Path | None, typer.Option(help="Items that say what steering costs.")]
TrainedOn = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="JOB",
        help="The traced job, for a ranking that does not say which examples it is from. May be "
        "repeated.",
    ),
]
Experts = Annotated[str, typer.Option(help="Numbers of experts to try.")]
Strengths = Annotated[
    str,
    typer.Option(help="What is done to them: deactivate, scale-0.75 to scale-0, activate."),
]
Headline = Annotated[
    str | None,
    typer.Option(metavar="n4/deactivate", help="The main dose, instead of choosing it by --tune."),
]
MaskMode = Annotated[
    Literal["hard", "steermoe"],
    typer.Option(help="What the masks' actions mean: `steermoe` is the paper's rule."),
]
Random = Annotated[int, typer.Option(min=0, help="Random controls of the main dose.")]
RandomDose = Annotated[int, typer.Option(min=0, help="Random controls of every other dose.")]
DoseItems = Annotated[
    int | None,
    typer.Option(
        min=1, help="Items of each kind for doses other than the main one; all, if not given."
    ),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")]
KlTop = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Likeliest tokens compared for the divergence from the base: 20, or the whole of a "
        "small vocabulary.",
    ),
]
JudgeUrl = Annotated[
    str | None,
    typer.Option(
        "--judge",
        metavar="URL",
        help="OpenAI-compatible endpoint that judges refusals; else rules.",
    ),
]
JudgeModel = Annotated[str | None, typer.Option(help="The model to ask there.")]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="With --url: folder or name of the tokenizer, if not the server's model."),
]
AdminKey = Annotated[
    str | None,
    typer.Option(envvar="MOESCOPE_ADMIN_KEY", help="With --url: the server's admin key."),
]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar="VLLM_API_KEY", help="With --url: the server's key for inference."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an evaluation that is there.")]


_FAITHFULNESS = """Does steering make answers follow their document, and at what cost?

Every item is asked without a mask, steered towards the ranking's positive condition, steered
away from it, and under masks of random experts; then at every other dose. The main dose is
chosen on the tuning items alone. Deltas are paired, with 95 % intervals.

**Example:** `moescope eval faithfulness faithfulness.eval.jsonl --ranking faithfulness.parquet
--model specimen --tune faithfulness.tune.jsonl --tune utility.tune.jsonl
--utility utility.eval.jsonl --out evals/faithfulness -- --max-model-len 128`
"""
_SAFETY = """Does steering change what is refused, forbidden or not, and at what cost?

As `moescope eval faithfulness`, with requests as items. Refusals are judged by rules, or by a
model behind --judge.

**Example:** `moescope eval safety safety.eval.jsonl --ranking safety.parquet
--url http://127.0.0.1:8000 --headline n1/deactivate --utility utility.eval.jsonl
--out evals/safety`
"""


@eval_app.command("safety", help=_SAFETY)
@eval_app.command("faithfulness", help=_FAITHFULNESS)
def axis(
    context: typer.Context,
    items: Items,
    engine_options: EngineOptions = None,
    *,
    ranking: Ranking,
    out: Out,
    model: Model = None,
    url: Url = None,
    tune: Tune = None,
    utility: Utility = None,
    trained_on: TrainedOn = None,
    experts: Experts = "1,2,4,8",
    strengths: Strengths = "deactivate",
    headline: Headline = None,
    mode: MaskMode = "hard",
    random: Random = 5,
    random_dose: RandomDose = 3,
    dose_items: DoseItems = None,
    max_tokens: MaxTokens = 64,
    kl_top: KlTop = None,
    judge: JudgeUrl = None,
    judge_model: JudgeModel = None,
    tokenizer: Tokenizer = None,
    admin_key: AdminKey = None,
    api_key: ApiKey = None,
    force: Force = False,
) -> None:
    """Evaluate one of the two axes, the one that the command is named after."""
    options = locals()
    _run(options.pop("context").command.name, **options)


@eval_app.command("utility")
def utility(
    *,
    tasks: Annotated[
        str, typer.Option(metavar="arc_easy,hellaswag", help="Tasks of lm-evaluation-harness.")
    ],
    url: Annotated[str, typer.Option(help="Where the server is.")] = "http://127.0.0.1:8000",
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    model: Annotated[str | None, typer.Option(help="The served model; the first it has.")] = None,
    mask: Annotated[
        str | None,
        typer.Option(metavar="NAME[@VERSION]", help="Compare with and without this mask."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many of each task.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in the prompt; else the task's number.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with tasks of your own (YAML).")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer's folder or name, if not the server's model.")
    ] = None,
    api_key: ApiKey = None,
) -> None:
    """Run tasks of lm-evaluation-harness through a server, without a mask and under one.

    Every answer must say that the mask was in force which its request named. Needs lm_eval
    (`pip install 'moescope[eval]'`).

    **Example:** `moescope eval utility --tasks arc_easy,hellaswag --mask follow --limit 200
    --out tasks.json`
    """
    from moescope.clients.eval_tasks import run_tasks, write_tasks
    from moescope.clients.terminal import open_console

    run = run_tasks(
        [name.strip() for name in tasks.split(",") if name.strip()],
        url,
        model,
        tokenizer,
        mask=mask,
        limit=limit,
        num_fewshot=num_fewshot,
        chat=chat,
        include_path=include_path,
        api_key=api_key,
    )
    write_tasks(run, out)
    console = open_console()
    _print_tasks(run, console)
    console.print(f"-> {out}", highlight=False)


def _run(
    axis: str,
    *,
    items: Path,
    engine_options: list[str] | None,
    model: str | None,
    url: str | None,
    tokenizer: str | None,
    admin_key: str | None,
    api_key: str | None,
    kl_top: int | None,
    tune: list[Path] | None,
    trained_on: list[Path] | None,
    random: int,
    random_dose: int,
    judge: str | None,
    **options: Any,
) -> None:
    from rich.console import Console

    from moescope.clients.evaluate import Plan, evaluate
    from moescope.clients.terminal import open_console

    if (model is None) == (url is None):
        raise InputError(
            "--model and --url: give one of them, a model to load here or a server that runs"
        )
    if url is not None and engine_options:
        raise InputError(
            f"engine options ({' '.join(engine_options)}) go with --model: the server at {url} "
            "has its own"
        )
    if model is not None and tokenizer is not None:
        raise InputError(f"--tokenizer {tokenizer} goes with --url: an engine takes it after `--`")
    plan = Plan(
        axis=axis,
        items=items,
        tune=tuple(tune or ()),
        trained_on=tuple(trained_on or ()),
        num_random=random,
        num_random_dose=random_dose,
        judge_url=judge,
        **options,
    )

    def open_runner(num_masks: int) -> Any:
        if url is not None:
            from moescope.clients.eval_server import ServerRunner

            return ServerRunner(url, tokenizer, top=kl_top, admin_key=admin_key, api_key=api_key)
        from moescope.clients.eval_engine import EngineRunner

        return EngineRunner(
            str(model), tuple(engine_options or ()), num_masks=num_masks, top=kl_top
        )

    evaluation = evaluate(plan, open_runner, Console())
    print_summary(evaluation, open_console())
    typer.echo(f"-> {options['out']}")


# What the summary shows, in this order: (axis, metric).
_SHOWN = (
    ("faithfulness", "follows_document"),
    ("faithfulness", "p_document"),
    ("faithfulness", "follows_memory"),
    ("faithfulness", "p_memory"),
    ("faithfulness", "exact_match"),
    ("faithfulness", "hallucinated"),
    ("safety", "refused"),
    ("safety", "p_refusal"),
    ("safety", "p_refusal_first"),
    ("safety", "over_refused"),
    ("utility", "utility"),
    ("utility", "kl"),
)


def print_summary(evaluation: "Evaluation", console: "Console") -> None:
    """The headline arms' main metrics with deltas, intervals and verdicts."""
    from rich.markup import escape

    from moescope.clients.terminal import make_table

    headline = evaluation.settings["headline"]
    console.print(
        f"headline dose n{headline['experts']}/{headline['strength']}: {headline['rule']}"
    )
    rows = {
        (row["axis"], row["kind"], row["metric"], row["arm"]): row
        for row in evaluation.effects.to_pylist()
        if row["split"] == "eval"
    }
    table = make_table("", "kind", ">n", ">base", ">steered", "", ">reverse", "", ">random")
    for axis, metric in _SHOWN:
        kinds = sorted({k for a, k, m, _ in rows if (a, m) == (axis, metric)})
        for kind in [k for k in kinds if k] if metric != "utility" else [""]:
            cells: list[str] = []
            for arm in ("steered", "reverse"):
                row = rows.get((axis, kind, metric, arm))
                cells += ["-", ""] if row is None else [_delta(row), _verdict(row["verdict"])]
            first = rows.get((axis, kind, metric, "steered"))
            if first is None:
                continue
            control = "-" if first["control_delta"] is None else f"{first['control_delta']:+.3f}"
            table.add_row(
                metric,
                escape(kind or "all"),
                str(first["n"]),
                f"{first['base']:.3f}",
                *cells,
                control,
            )
    console.print(table)


def _delta(row: dict[str, Any]) -> str:
    interval = "" if row["ci_low"] is None else f" [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"
    return f"{row['value']:.3f} {row['delta']:+.3f}".replace(" ", "  ", 1) + interval.replace(
        "[", r"\["
    )


def _verdict(verdict: str) -> str:
    return f"[bold]{verdict}[/]" if verdict in ("up", "down") else verdict


def _print_tasks(run: Any, console: "Console") -> None:
    from moescope.clients.terminal import make_table

    effects = run.effects.to_pylist()
    if not effects:
        for task, results in run.settings["results"]["base"].items():
            numbers = ", ".join(
                f"{name} {value:.4f}" for name, value in results.items() if isinstance(value, float)
            )
            console.print(f"{task}: {numbers}", highlight=False)
        return
    table = make_table("task", "metric", ">n", ">base", ">under the mask", "")
    for row in effects:
        table.add_row(
            row["kind"], row["metric"], str(row["n"]), f"{row['base']:.3f}", _delta(row),
            _verdict(row["verdict"]),
        )  # fmt: skip
    console.print(table)
