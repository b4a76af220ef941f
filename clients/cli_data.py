"""The commands `moescope data` and `moescope specimen`: jobs to trace and models to try."""

from pathlib import Path
from typing import Annotated, Literal

import typer

data_app = typer.Typer(help="Make job files from data sets.", no_args_is_help=True)
specimen_app = typer.Typer(
    help="Make tiny random-weight models, to try everything offline.", no_args_is_help=True
)


@data_app.callback()
def _data() -> None:
    """Make job files from data sets."""


@specimen_app.callback()
def _specimen() -> None:
    """Make tiny random-weight models, to try everything offline."""


@data_app.command("faithfulness")
def faithfulness(
    file: Annotated[Path, typer.Argument(help="Questions with documents and gold answers.")],
    *,
    out: Annotated[Path, typer.Option(help="Job file to write; an existing one is replaced.")],
    file_format: Annotated[
        Literal["squad"],
        typer.Option("--format", help="`squad`: SQuAD 1.1 or 2.0 JSON, or its rows flattened."),
    ] = "squad",
    limit: Annotated[
        int | None, typer.Option(help="Keep this many questions, drawn at random by --seed.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of that draw.")] = 0,
    instruction: Annotated[
        str | None, typer.Option(help="What stands before document and question, both times.")
    ] = None,
) -> None:
    """Pair every question with its document and without it.

    Each answerable question gives two lines of one example, in the conditions `with_doc` and
    `without_doc`, with the same question and the same gold answer as the response. Traced and
    compared, they show which experts fire when the document is there.

    **Example:** `moescope data faithfulness examples/questions.json --out job.jsonl --limit 20`
    """
    from rich.console import Console
    from rich.markup import escape

    from moescope.clients.faithfulness import DEFAULT_INSTRUCTION, make_faithfulness

    del file_format  # there is one so far; the option keeps the command's meaning plain
    statistics = make_faithfulness(
        file,
        out,
        limit=limit,
        seed=seed,
        instruction=DEFAULT_INSTRUCTION if instruction is None else instruction,
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
