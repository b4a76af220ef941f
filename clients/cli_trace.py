"""The command `moescope trace`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from moescope.clients.cli_options import STORE_HELP
from moescope.clients.ray_cluster import ADDRESS_FORM
from moescope.tracer.errors import InputError
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
    store: Annotated[str, typer.Option(help=f"{STORE_HELP} Made if there is none.")],
    run: Annotated[str, typer.Option(help="Name of this run within the store.")] = DEFAULT_RUN,
    policy: Annotated[
        str,
        typer.Option(
            help="When the disk falls behind: `block` waits, `drop` loses rows and counts them."
        ),
    ] = "block",
    ray: Annotated[
        str | None,
        typer.Option(
            metavar=ADDRESS_FORM,
            help="Trace with several engines on a Ray cluster: `local` starts one here "
            "(docs/ray.md).",
        ),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --ray: engines. By default as many as its GPUs allow, or one a machine "
            "without GPUs.",
        ),
    ] = None,
    max_restarts: Annotated[
        int | None,
        typer.Option(
            min=0, help="With --ray: how often a replica that died is replaced. By default 3."
        ),
    ] = None,
) -> None:
    """Trace a job: run every line of a file through vLLM and record all routing.

    Every token of every request is recorded, in every mixture-of-experts layer. Lines whose
    request is complete in the store are skipped, so a job that was interrupted is finished by
    the same command.

    **Example:** `moescope trace job.jsonl --model deepseek-ai/DeepSeek-V2-Lite-Chat --store traces
    -- --max-model-len 4096 --trust-remote-code`
    """
    from rich.console import Console

    console = Console()
    options: dict[str, Any] = {
        "run": run,
        "engine_options": tuple(engine_options or ()),
        "policy": policy,
        "console": console,
    }
    if ray is None:
        for name, value in (("--replicas", replicas), ("--max-restarts", max_restarts)):
            if value is not None:
                raise InputError(f"{name} {value} goes with --ray: `--ray local` for this machine.")
        from moescope.clients.batch import run_job

        summary = run_job(job, store, model, **options)
    else:
        from moescope.clients.ray_trace import DEFAULT_MAX_RESTARTS, run_ray_job

        restarts = DEFAULT_MAX_RESTARTS if max_restarts is None else max_restarts
        summary = run_ray_job(
            job, store, model, ray=ray, replicas=replicas, max_restarts=restarts, **options
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
