"""One replica: a Ray Serve actor with a server of its own, which does what the coordinator says.

    join      gets all masks and the global one, and starts the server with them
    enter     has what is in force, or catches up until it has; only then requests pass
    follow    asks for orders for as long as it lives, and so keeps its lease (fleet.py)

When the server ends, the actor says so and ends too: Serve sends no more requests there, and
starts another replica. When the coordinator can't be reached, requests pass until the lease ends,
and after that wait, or get status 503.
"""

import asyncio
import logging
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from moescope.deploy.admission import Admission, OutError
from moescope.deploy.fleet import Answer, Order
from moescope.deploy.own_server import OwnServer, ServerError, ServerOptions
from moescope.deploy.proxy import Call, Proxy, Reply
from moescope.deploy.target import Step, Target, apply
from moescope.tracer.errors import MoescopeError

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger("moescope")

_RETRY_S = 0.5
_GOODBYE_S = 2.0
# A change that has to wait (for a request that its mask can't be composed with) is tried again.
_CATCH_UP_S = 60.0
_MOE = "/v1/moe"


class Replica:
    """What Serve calls a deployment's class; `coordinator` is the handle of the other deployment.

    Raises ServerError when the server does not start.
    """

    async def __init__(  # type: ignore[misc]  # Serve waits for it
        self, options: ServerOptions, coordinator: "DeploymentHandle[Any]", lease_s: float
    ) -> None:
        from ray import serve

        self._tasks: list[asyncio.Task[None]] = []
        self._host, self._lease_s = coordinator, lease_s
        self._coordinator = await self._host.actor.remote()
        self.name = serve.get_replica_context().replica_tag
        self.admission = Admission(patience_s=lease_s)
        copy = await self._call("join", self.name)
        self.server = OwnServer(options, copy)
        self.proxy = Proxy(self.server.http, self.admission, self.coordinate)
        # What the server has by now: it starts without a run.
        self._have = Target(copy.state)
        self._ticket: str | None = None
        try:
            await self.server.start()
            self._moe = await self.server.get(_MOE)
            await self._enter()
        except BaseException as error:
            await self._leave(str(error) or type(error).__name__)
            await self.server.stop()
            raise
        self._tasks = [
            asyncio.create_task(self._follow()),
            asyncio.create_task(self._watch()),
        ]

    async def coordinate(self, call: Call) -> Reply:
        """Have the coordinator answer a request."""
        from ray.exceptions import RayError

        try:
            reply: Reply = await self._call("control", call)
        except RayError as error:
            raise OutError(f"the coordinator can't be reached: {error}") from None
        return reply

    async def check_health(self) -> None:
        """For Serve; raises when the server's engine is broken."""
        if not await self.server.healthy():
            raise ServerError("the replica's server is not healthy")

    async def __del__(self) -> None:
        """For Serve: the end of a replica that is to end."""
        for task in self._tasks:
            task.cancel()
        await self.admission.close()
        await self._leave("it was stopped")
        await self.server.stop()

    # With the coordinator.

    async def _call(self, method: str, *arguments: Any) -> Any:
        return await getattr(self._coordinator, method).remote(*arguments)

    async def _enter(self) -> None:
        """Catch up, and serve."""
        deadline = time.monotonic() + _CATCH_UP_S
        while True:
            sent = time.monotonic()
            entry = await self._call("enter", self.name, self._have, self._moe)
            if entry.ticket is not None:
                self._ticket = entry.ticket
                await self.admission.open(self._have)
                await self.admission.renew(sent + self._lease_s)
                return
            await self.admission.close()
            try:
                await self._take(entry.steps)
            except ServerError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(_RETRY_S)

    async def _follow(self) -> None:
        from ray.exceptions import ActorDiedError, RayError
        from ray.serve.exceptions import RayServeException

        answer: Answer | None = None
        while True:
            try:
                sent = time.monotonic()
                order = await asyncio.wait_for(
                    self._call("follow", self._ticket, answer), self._lease_s
                )
                answer = None
                if order is False:
                    await self._enter()
                    continue
                await self.admission.renew(sent + self._lease_s)
                if isinstance(order, Order):
                    answer = await self._obey(order)
            except MoescopeError as error:  # before Ray's: what a call raised there is both
                await self._end(f"it can't catch up: {error}")
            except (RayError, RayServeException, TimeoutError) as error:
                logger.warning("the coordinator can't be reached, trying again: %r", error)
                await asyncio.sleep(_RETRY_S)
                if isinstance(error, ActorDiedError):
                    # For good, with its deployment, of which Serve starts another.
                    with suppress(RayError, RayServeException, TimeoutError):
                        self._coordinator = await asyncio.wait_for(
                            self._host.actor.remote(), self._lease_s
                        )

    async def _obey(self, order: Order) -> Answer:
        try:
            match order.what:
                case "prepare":
                    await self._take(order.steps)
                    await self.admission.bar(order.names)
                    # Which masks requests hold, for a change that they may bar.
                    pages = {_MOE: await self.server.get(_MOE)} if order.names is None else {}
                    return Answer(order.number, pages=pages)
                case "commit":
                    await self._take(order.steps)
                    if order.target is not None and self._have == order.target:
                        await self.admission.open(order.target)
                case "report":
                    paths = sorted(order.names or ())
                    pages = {path: await self.server.get(path) for path in paths}
                    return Answer(order.number, pages=pages)
        except MoescopeError as error:
            if order.what != "report":
                await self.admission.close()
            return Answer(order.number, why=str(error))
        return Answer(order.number)

    async def _take(self, steps: Iterable[Step]) -> None:
        for step in steps:
            await self.server.take(step)
            self._have = apply(self._have, step)

    # The end.

    async def _watch(self) -> None:
        await self._end(await self.server.ended())

    async def _end(self, why: str) -> None:
        logger.error("replica %s ends: %s", self.name, why)
        await self.admission.close()
        await self._leave(why)
        self.server.clear()
        # Not a way for Serve to mistake: the actor has died, and is to be replaced.
        os._exit(1)

    async def _leave(self, why: str) -> None:
        from ray.exceptions import RayError

        with suppress(RayError, TimeoutError):
            await asyncio.wait_for(self._call("leave", self.name, why), _GOODBYE_S)


def replica_app() -> "ASGIApp":
    """The ASGI app of a replica, for `serve.ingress`."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware

    return Starlette(middleware=[Middleware(_Front)])


class _Front:
    """Passes lifespan on to the app behind, and all else to this process's replica."""

    def __init__(self, app: "ASGIApp") -> None:
        self._app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        from ray import serve

        replica: Any = serve.get_replica_context().servable_object
        await replica.proxy(scope, receive, send)
