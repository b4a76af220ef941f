"""The commands `moescope serve` and `moescope generate`."""

from pathlib import Path
from typing import Annotated

import typer


def register_serve(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command("serve")(serve)
    app.command("generate")(generate)


def serve(
    model: Annotated[str, typer.Argument(help="Model folder or Hugging Face name.")],
    vllm_options: Annotated[
        list[str] | None,
        typer.Argument(help="Options of `vllm serve` after `--`, such as --max-model-len 4096."),
    ] = None,
    *,
    masks: Annotated[Path, typer.Option(help="Folder of the masks (made if there is none).")],
    store: Annotated[
        str | None,
        typer.Option(
            metavar="STORE",
            help="Trace store (made if there is none): a folder, s3://BUCKET/PATH or "
            "gs://BUCKET/PATH. Without one nothing is traced.",
        ),
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(
            help="Key for changing masks. Better in the environment, as MOESCOPE_ADMIN_KEY: "
            "whoever lists the processes sees their options."
        ),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(min=1, help="How many different masks requests can use at once (16)."),
    ] = None,
    own_mask: Annotated[
        str | None,
        typer.Option(
            metavar="replace|compose",
            help="Whether a request's own mask replaces the global one (replace) or adds to it.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    api_key: Annotated[
        list[str] | None, typer.Option(help="Key for inference, as in vLLM; may be repeated.")
    ] = None,
) -> None:
    """Serve a model over HTTP: vLLM's OpenAI server with steering and tracing.

    Requests choose a mask by the header `X-Steering-Mask: NAME`; masks come and go while the
    server runs, with `moescope mask push` or over HTTP (docs/server.md).

    **Example:** `moescope serve deepseek-ai/DeepSeek-V2-Lite-Chat --store traces --masks masks
    -- --max-model-len 4096 --trust-remote-code`
    """
    from moescope.server.serve import serve as run

    options = ["--host", host, "--port", str(port)]
    if api_key:
        options += ["--api-key", *api_key]
    run(
        model,
        [*options, *(vllm_options or ())],
        masks=masks,
        store=store,
        admin_key=admin_key,
        slots=slots,
        own_mask=own_mask,
    )


def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    *,
    mask: Annotated[
        str | None, typer.Option(metavar="NAME[@VERSION]", help="Mask to be steered by, or none.")
    ] = None,
    run: Annotated[str | None, typer.Option(help="Trace the request into this run.")] = None,
    url: Annotated[str, typer.Option(help="Where the server is.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Its model; the first it has.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Go on from the text: no chat.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    api_key: Annotated[
        str | None, typer.Option(envvar="VLLM_API_KEY", help="The server's key for inference.")
    ] = None,
) -> None:
    """Ask a running server, under a mask.

    The answer goes to standard output; which mask was in force, and which run took the trace, to
    standard error.

    **Example:** `moescope generate "Where is the lamp?" --mask calm`
    """
    from moescope.clients.generate import generate as ask

    answer = ask(
        prompt,
        url,
        model=model,
        mask=mask,
        run=run,
        raw=raw,
        max_tokens=max_tokens,
        temperature=temperature,
        api_key=api_key,
    )
    typer.echo(answer.text)
    traced = "not traced" if answer.run is None else f"traced into {answer.run}"
    typer.echo(f"mask {answer.mask}; {traced}", err=True)
