"""The commands `moescope data` and `moescope specimen`: jobs to trace and models to try."""

from pathlib import Path
from typing import Annotated, Literal

import typer

data_app = typer.Typer(help="Make job files from data sets.", no_args_is_help=True)
specimen_app = typer.Typer(
    help="Make tiny models, random or trained, to try everything offline.", no_args_is_help=True
)


@data_app.callback()
def _data() -> None:
    """Make job files from data sets."""


@specimen_app.callback()
def _specimen() -> None:
    """Make tiny models, random or trained, to try everything offline."""


@data_app.command("faithfulness")
def faithfulness(
    source: Annotated[
        str,
        typer.Argument(
            help="Questions with documents and gold answers: a JSON, JSONL, CSV or Parquet file, "
            "or a data set on the hub (owner/name:config@split)."
        ),
    ],
    *,
    out: Annotated[Path, typer.Option(help="Job file to write; an existing one is replaced.")],
    file_format: Annotated[
        Literal["auto", "squad", "hotpotqa", "nq", "triviaqa", "jsonl"],
        typer.Option("--format", help="Layout of the source; `auto`: by its fields."),
    ] = "auto",
    limit: Annotated[
        int | None, typer.Option(help="Keep this many questions, drawn at random by --seed.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    instruction: Annotated[
        str,
        typer.Option(
            help="What stands first, both times: `open` (answer in few words), `closed` (from the "
            "document only), or a text of your own."
        ),
    ] = "open",
    distractors: Annotated[
        int,
        typer.Option(
            help="Documents without the answer beside the gold ones: the source's own, then other "
            "examples'."
        ),
    ] = 0,
    document_order: Annotated[
        Literal["gold-first", "gold-last", "random"],
        typer.Option(help="Where the gold documents stand among them."),
    ] = "gold-first",
    counterfactual: Annotated[
        bool,
        typer.Option(
            "--counterfactual",
            help="The document, and so the forced answer, says another example's answer of the "
            "same kind; the true ones are in OUT.truth.jsonl.",
        ),
    ] = False,
    max_doc_tokens: Annotated[
        int | None,
        typer.Option(
            help="Cut each document to this many tokens of --tokenizer, around the answer."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Model whose tokens those are: a folder or a hub name.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="The source's licence, for the data card.")
    ] = None,
) -> None:
    """Pair every question with its documents and without them.

    Each answerable question gives two lines of one example, in the conditions `with_doc` and
    `without_doc`, with the same question and the same gold answer as the response. Traced and
    compared, they show which experts fire when the document is there. `OUT.card.json` says what
    the job was made from and how.

    **Example:** `moescope data faithfulness examples/questions.json --out job.jsonl --limit 20`
    """
    from rich.console import Console
    from rich.markup import escape

    from moescope.clients.faithfulness import Options, make_faithfulness

    options = Options(
        file_format=file_format,
        instruction=instruction,
        limit=limit,
        seed=seed,
        distractors=distractors,
        document_order=document_order,
        counterfactual=counterfactual,
        max_doc_tokens=max_doc_tokens,
        tokenizer=tokenizer,
    )
    statistics = make_faithfulness(source, out, options, licence=licence)
    Console(highlight=False).print(escape(f"{statistics}\n-> {out}"), soft_wrap=True)


@data_app.command("safety")
def safety(
    source: Annotated[
        str,
        typer.Argument(
            help="CSV, JSONL or Parquet file, or OWNER/NAME:CONFIG@SPLIT on the hub, with "
            "`prompt`, `harmful_response`, and for --given `safe_response`."
        ),
    ],
    engine_options: Annotated[
        list[str] | None,
        typer.Argument(help="vLLM engine options after `--`, such as --max-model-len 4096."),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="Job file to write; an existing one is replaced.")],
    model: Annotated[
        str | None, typer.Option(help="Model that writes the refusals: the one under study.")
    ] = None,
    given: Annotated[
        bool, typer.Option("--given", help="Take the source's `safe_response` instead.")
    ] = False,
    samples: Annotated[
        int, typer.Option(help="Attempts for a prompt until a refusal passes the checks.")
    ] = 4,
    temperature: Annotated[float, typer.Option(help="Temperature of the attempts.")] = 0.8,
    instruction: Annotated[
        str | None,
        typer.Option(
            help='What asks the model to refuse, instead of our own words; "" leaves the prompt '
            "alone, for a model that refuses by itself. {words} becomes a number of words."
        ),
    ] = None,
    min_overlap: Annotated[
        float, typer.Option(help="Least share of the prompt's content words in a refusal.")
    ] = 0.2,
    length_ratio: Annotated[
        str, typer.Option(help="LOW:HIGH, tokens of the refusal / of the harmful response.")
    ] = "0.5:2",
    max_copied: Annotated[
        float, typer.Option(help="Most of a refusal's 4-grams from the harmful response.")
    ] = 0.05,
    licence: Annotated[
        str | None, typer.Option(help="The source's licence, for the data card.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Use this many rows, drawn at random by --seed.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of that draw and of the refusals.")] = 0,
) -> None:
    """Pair every harmful answer with a refusal of the same request.

    Each row gives two lines of one example, in the conditions `safe` and `unsafe`, both with a
    fixed answer. A refusal must be about the request, give a reason, be about as long as the
    harmful answer and hold nothing to act on; otherwise another is drawn, or the row is dropped
    and counted. `OUT.card.json` says what was done; no text is printed.

    **Example:** `moescope data safety pairs.csv --out job.jsonl --given --limit 200`
    """
    from rich.console import Console
    from rich.markup import escape

    from moescope.clients.refusal import Bounds
    from moescope.clients.refusal_model import INSTRUCTION, where_refusals_come_from
    from moescope.clients.safety import length_bounds, make_safety

    low, high = length_bounds(length_ratio)
    refusals = where_refusals_come_from(
        model,
        given=given,
        engine_options=tuple(engine_options or ()),
        temperature=temperature,
        seed=seed,
        instruction=INSTRUCTION if instruction is None else instruction,
    )
    statistics = make_safety(
        source,
        out,
        refusals,
        samples=samples,
        bounds=Bounds(
            min_overlap=min_overlap,
            min_length_ratio=low,
            max_length_ratio=high,
            max_copied=max_copied,
        ),
        limit=limit,
        seed=seed,
        licence=licence,
    )
    Console(highlight=False).print(escape(f"{statistics}\n-> {out}"), soft_wrap=True)


@specimen_app.command("make")
def make(
    directory: Annotated[Path, typer.Argument(help="Folder to make; a model like any other.")],
    *,
    arch: Annotated[
        str,
        typer.Option(
            help="Architecture, as in its config.json: deepseek_v2, qwen3_moe, olmoe, mixtral, ... "
            "(an unknown one is answered with the whole list)."
        ),
    ] = "deepseek_v2",
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    force: Annotated[bool, typer.Option(help="Replace a model that stands there.")] = False,
) -> None:
    """Make a model of a few megabytes with random weights, with no download.

    Its text means nothing, but its routing is real: transformers and vLLM load it as they load
    the full-size models of its architecture, on a laptop's CPU.

    **Example:** `moescope specimen make specimen --arch qwen3_moe`, then `moescope trace job.jsonl
    --model specimen --store traces`
    """
    from rich.console import Console
    from rich.markup import escape

    from moescope.clients.specimen import ARCHITECTURES, make_specimen
    from moescope.tracer.errors import InputError

    if arch not in ARCHITECTURES:
        raise InputError(
            f"there is no specimen of architecture {arch!r}; --arch takes one of "
            f"{', '.join(ARCHITECTURES)}."
        )
    make_specimen(directory, arch=arch, seed=seed, force=force)
    Console(highlight=False).print(escape(f"{arch} specimen -> {directory}"), soft_wrap=True)


@specimen_app.command("train")
def train(
    directory: Annotated[Path, typer.Argument(help="Folder to make; a model like any other.")],
    *,
    seed: Annotated[int, typer.Option(help="Seed of the world, the weights and training.")] = 0,
    planted: Annotated[
        bool,
        typer.Option(
            "--planted/--unplanted", help="Tie every behaviour to experts, or train as usual."
        ),
    ] = True,
    steps: Annotated[int | None, typer.Option(help="Steps of training.", min=1)] = None,
    minutes: Annotated[float, typer.Option(help="Stop after this long, if it comes first.")] = 15.0,
    force: Annotated[bool, typer.Option(help="Replace a model that stands there.")] = False,
) -> None:
    """Train a small model whose behaviours are real, in minutes on a CPU.

    It knows facts, follows documents against them part of the time, refuses some forbidden
    requests, and has skills beside. `specimen.json` in the folder has its accuracies,
    `planted.json` the experts that the behaviours were tied to.

    **Example:** `moescope specimen train specimen --seed 0`
    """
    from rich.console import Console
    from rich.markup import escape

    from moescope.clients.specimen_train import Recipe, make_trained_specimen

    console = Console(highlight=False)
    recipe = Recipe(seed=seed, planted=planted)
    if steps is not None:
        recipe = Recipe(seed=seed, planted=planted, steps=steps)
    about = make_trained_specimen(directory, recipe, minutes=minutes, force=force, console=console)
    figures = ", ".join(f"{name} {value:.1%}" for name, value in about["accuracies"].items())
    console.print(figures, soft_wrap=True)
    if about["steps_done"] < recipe.steps:
        console.print(
            f"Time ran out after {about['steps_done']} of {recipe.steps} steps: the accuracies "
            "may be low. Give it more --minutes, or fewer --steps.",
            soft_wrap=True,
        )
    console.print(escape(f"trained specimen -> {directory}"), soft_wrap=True)


@specimen_app.command("data")
def specimen_data(
    model: Annotated[Path, typer.Argument(help="A trained specimen's folder.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder for the files; those there are replaced.")],
    num: Annotated[
        int, typer.Option(help="Held-out conflicts, and as many forbidden requests.", min=1)
    ] = 300,
    others: Annotated[int, typer.Option(help="Of every other held-out kind.", min=1)] = 100,
    traced: Annotated[int, typer.Option(help="Pairs of each job to trace.", min=1)] = 200,
    tuned: Annotated[
        int,
        typer.Option(
            help="Conflicts, and forbidden requests, to tune the dose on; half as many of every "
            "other kind.",
            min=1,
        ),
    ] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the draw; the world is the model's.")] = 0,
) -> None:
    """Write the jobs and the items that a trained specimen is traced and evaluated with.

    Jobs to trace and items to tune on are of the training split, items to evaluate are held out.
    Each of the eight files has its card beside it.

    **Example:** `moescope specimen data specimen --out data`, then `moescope trace
    data/faithfulness.job.jsonl --model specimen --store traces`
    """
    from rich.console import Console
    from rich.markup import escape

    from moescope.clients.specimen_data import Sizes, write_specimen_data

    sizes = Sizes(main=num, others=others, traced=traced, tuned=tuned)
    written = write_specimen_data(model, out, sizes, seed=seed)
    console = Console(highlight=False)
    for name, lines in written.items():
        console.print(escape(f"{lines:6,} lines -> {out / name}"), soft_wrap=True)
