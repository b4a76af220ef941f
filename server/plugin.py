"""The entry point `vllm.endpoint_plugins`: puts the control plane into vLLM's own server.

build_app       attach_router   our routes, and our middleware inside vLLM's own (CORS, API key)
init_app_state  init_state      the engine runs, nothing listens yet: what fails here ends the
                                server before anyone can reach it
"""

import logging
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State

from moescope.server.auth import Gate, check_exposure
from moescope.server.engine import VllmEngine
from moescope.server.logs import show_logs
from moescope.server.metrics import serve_metrics
from moescope.server.middleware import SteeringMiddleware
from moescope.server.plane import Plane
from moescope.server.registry import Registry
from moescope.server.routes import router
from moescope.server.settings import server_settings
from moescope.tracer.errors import InputError, MoescopeError, TracerError
from moescope.tracer.mask import make_mask
from moescope.tracer.settings import load_settings

logger = logging.getLogger("moescope")

# vLLM's options with which an API server has only some of the replicas.
_SOME_REPLICAS = (
    "data_parallel_rank",
    "data_parallel_start_rank",
    "data_parallel_external_lb",
    "data_parallel_hybrid_lb",
    "data_parallel_multi_port_external_lb",
)


class ControlPlane:
    """vLLM's protocol of an endpoint plugin. Without a folder of masks there are only metrics."""

    name = "moescope"
    required_tasks = None  # always there, so that a model without routing is refused, not passed

    def __init__(self) -> None:
        self._settings = server_settings()

    @property
    def _key(self) -> str | None:
        key = self._settings.admin_key
        return None if key is None else key.get_secret_value()

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes and the middleware."""
        if self._settings.masks is None:
            return
        args = app.state.args
        check_arguments(args, self._key)
        show_logs(self._settings.log_format)
        args.enable_request_id_headers = False  # ours, so that log lines have the same ids
        api_keys = [key for key in args.api_key or [os.environ.get("VLLM_API_KEY")] if key]
        if api_keys and self._key is not None:
            # vLLM asks for an API key on every path under /v1: the admin key must pass there too.
            args.api_key = [*api_keys, self._key]
        app.include_router(router)
        app.add_middleware(SteeringMiddleware)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:  # noqa: ARG002
        """Check that the engine can be steered and traced, and restore what was in force."""
        if self._settings.masks is None:
            if engine_client is not None:
                await _serve_metrics_alone(VllmEngine(engine_client))
            return
        if engine_client is None:
            raise InputError("a server without an engine can't be steered")
        state.moescope = await open_plane(
            VllmEngine(engine_client), self._settings.masks, self._key
        )
        logger.info("the control plane is ready, with masks in %s", self._settings.masks)


async def _serve_metrics_alone(engine: VllmEngine) -> None:
    """The tracer's metrics, for a server without a control plane, which must start in any case."""
    try:
        serve_metrics(await engine.status(), None)
    except MoescopeError as error:
        logger.warning("/metrics has nothing of moescope: %s", error)


def check_arguments(args: Namespace, admin_key: str | None) -> None:
    """Refuse vLLM options under which the control plane would be open, or know only a part."""
    check_exposure(args.host, args.uds, admin_key)
    if (args.api_server_count or 1) > 1:
        raise InputError(
            f"--api-server-count {args.api_server_count}: the masks' slots are kept by one API "
            "server process; leave the option out"
        )
    for option in _SOME_REPLICAS:
        given = getattr(args, option, None)
        if given is not None and given is not False:  # replica 0 is one of several, too
            raise InputError(
                f"--{option.replace('_', '-')}: a server is tried with all replicas of its engine, "
                "on its own machine. Leave it out, or run several servers (docs/replicas.md)"
            )
    local, replicas = getattr(args, "data_parallel_size_local", None), args.data_parallel_size or 1
    if local not in (None, replicas):
        raise InputError(
            f"--data-parallel-size-local {local}: of {replicas} replicas all must run on this "
            "machine; leave it out"
        )
    if getattr(args, "data_parallel_backend", "mp") != "mp":
        raise InputError(
            f"--data-parallel-backend {args.data_parallel_backend}: not tried; leave it out"
        )
    for option in ("headless", "grpc"):
        if getattr(args, option, False):
            raise InputError(
                f"--{option} starts no HTTP server that could be steered: leave it out"
            )


async def open_plane(engine: VllmEngine, masks: Path, admin_key: str | None) -> Plane:
    """The control plane of an engine that has just started; MoescopeError if it can't be."""
    settings = load_settings()
    status = await engine.status()
    if settings.store is not None:
        if not status["attached"]:
            raise TracerError(
                f"the engine did not attach the trace store {settings.store}: its log says why"
            )
        await engine.prove()
    plane = Plane(
        engine,
        status,
        Registry(masks),
        Gate(admin_key),
        store=settings.store,
        traces_by_default=settings.trace == "on",
    )
    # A mask without entries fits every model that can be steered at all.
    plane.check(make_mask(name="probe", entries=[]))
    engine.publish({})
    await plane.restore()
    serve_metrics(status, plane)
    return plane
