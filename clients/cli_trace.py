"""The command `moescope trace`."""

from pathlib import Path
from typing import Annotated

import typer

from moescope.tracer.format import DEFAULT_RUN


def register_trace(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("trace")(trace)


def trace(
    job: Annotated[Path, typer.Argument(help="Job file, JSON lines (docs/job-format.md).")],
    engine_options: Annotated[
        list[str] | None,
        typer.Argument(help="vLLM engine options after `--`, such as --max-model-len 4096."),
    ] = None,
    *,
    model: Annotated[str, typer.Option(help="Model folder or Hugging Face name.")],
    store: Annotated[Path, typer.Option(help="Trace store (a folder; made if there is none).")],
    run: Annotated[str, typer.Option(help="Name of this run within the store.")] = DEFAULT_RUN,
    policy: Annotated[
        str,
        typer.Option(
            help="When the disk falls behind: `block` waits, `drop` loses rows and counts them."
        ),
    ] = "block",
) -> None:
    """Trace a job: run every line of a file through vLLM and record all routing.

    Every token of every request is recorded, in every mixture-of-experts layer. Lines whose
    request is complete in the store are skipped, so a job that was interrupted is finished by
    the same command.

    **Example:** `moescope trace job.jsonl --model deepseek-ai/DeepSeek-V2-Lite-Chat --store traces
    -- --max-model-len 4096 --trust-remote-code`
    """
    from rich.console import Console

    from moescope.clients.batch import run_job

    console = Console()
    summary = run_job(
        job,
        store,
        model,
        run=run,
        engine_options=tuple(engine_options or ()),
        policy=policy,
        console=console,
    )
    rate = f" in {summary.seconds:.1f} s" if summary.requests else ""
    console.print(
        f"traced {summary.requests:,} requests, {summary.tokens:,} tokens{rate}; "
        f"{summary.skipped:,} done before; {summary.incomplete:,} incomplete, "
        f"{summary.dropped_rows:,} rows dropped -> {store}",
        highlight=False,
    )
    if summary.incomplete:
        console.print("run the same command again to trace the incomplete ones")
        raise typer.Exit(1)
