"""The coordinator: the one control plane of all replicas, with the shared registry.

It is the control plane of a single server (moescope.server), routes and all, whose engine is the
whole fleet: what that plane puts in force, it puts in force everywhere (fleet.py). Answers to
changes say whom they reached:

    200   {..., "replicas": {"expected": 2, "reached": ["a", "b"], "not_reached": []}}
    207   {..., "replicas": {"expected": 2, "reached": ["a"],
                             "not_reached": [{"replica": "b", "why": "its server has ended ..."}]}}

207 is no failure: the change is kept and in force, and who has not got it takes no request.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from moescope.deploy.fleet import Answer, Entry, Fleet, Order
from moescope.deploy.fleet_pages import fleet_router, metrics_router
from moescope.deploy.proxy import Call, Reply
from moescope.deploy.target import Target
from moescope.server.audit import split_key
from moescope.server.auth import Gate
from moescope.server.errors import refusal
from moescope.server.leases import Leases
from moescope.server.plane import Plane
from moescope.server.registry import Registry, RegistryCopy, StoredMask
from moescope.server.routes import router
from moescope.server.settings import load_server_settings
from moescope.tracer.errors import MoescopeError, StoreError
from moescope.tracer.format import MoeShape
from moescope.tracer.mask import Mask, compile_mask, compose
from moescope.tracer.object_path import store_path

logger = logging.getLogger("moescope")

_MAX_CALLS = 10_000
_MOE, _TRACES = "/v1/moe", "/v1/traces"


class NoReplicaError(MoescopeError):
    """No replica serves now."""


class FleetEngine:
    """All members as one `moescope.server.engine.Engine`."""

    def __init__(self, fleet: Fleet, registry: Registry, moe: Mapping[str, Any], *, traces: bool):
        self._fleet, self._registry, self._moe = fleet, registry, moe
        self._pages = (_MOE, _TRACES) if traces else (_MOE,)
        self.in_use: dict[str, int] = {}

    async def status(self) -> dict[str, Any]:
        """What all of them say together; NoReplicaError if there is none."""
        pages = (await self._fleet.report(*self._pages)).values()
        if not pages:
            raise NoReplicaError("no replica serves now: GET /v1/replicas says why")
        self.in_use = {}
        for page in pages:
            for key, number in page[_MOE]["slots"]["in_use"].items():
                self.in_use[key] = self.in_use.get(key, 0) + number
        loaded = {key for page in pages for key in page[_MOE]["slots"]["loaded"]}
        return status_of(self._moe) | {
            "global": self._fleet.target.state.steering,
            "slots": dict(enumerate(sorted(loaded))),
            "live": sum(page[_TRACES]["live"] for page in pages if _TRACES in page),
        }

    async def set_global(self, key: str | None, mask: Mask | None) -> None:
        """Bring it to all; ComposeError if a request's own mask bars it."""

        def vet(answers: list[Answer]) -> None:
            if mask is not None and self._moe["own_mask"] == "compose":
                held = {k for a in answers for k in a.pages[_MOE]["slots"]["in_use"]}
                self._check_together(str(key), mask, held)

        await self._fleet.bring(lambda target: replace(target, state=target.state.steer(key)), vet)

    def _check_together(self, key: str, mask: Mask, held: set[str]) -> None:
        shape = MoeShape(
            tuple(self._moe["moe_layers"]), self._moe["num_experts"], self._moe["top_k"]
        )
        table = compile_mask(mask, shape)
        for own in held:
            content = self._registry.content(*split_key(own))
            names = (f"the global mask {key}", f"mask {own}")
            compose(table, compile_mask(content, shape), names)

    async def sync(self) -> dict[str, Any]:
        """Stop a run on all of them, which puts its requests on disk."""
        await self._fleet.bring(lambda target: replace(target, run=None))
        return await self.status()

    # Slots are each replica's own affair.

    async def load_mask(self, slot: int, key: str, mask: Mask) -> bool:
        """See `Engine`; never called."""
        raise NotImplementedError

    async def unload(self, slots: Sequence[int]) -> bool:
        """See `Engine`; never called."""
        raise NotImplementedError

    def publish(self, slots: Mapping[str, int]) -> None:
        """See `Engine`; never called."""
        raise NotImplementedError


class _FleetLeases(Leases):
    """What requests hold on all replicas, as the last status had it."""

    def __init__(self, engine: FleetEngine, num_slots: int) -> None:
        super().__init__(engine, num_slots)
        self._fleet_engine = engine

    @property
    def in_use(self) -> dict[str, int]:
        return self._fleet_engine.in_use


class FleetPlane(Plane):
    """The control plane, with every change brought to all replicas before it is answered."""

    def __init__(
        self,
        fleet: Fleet,
        registry: Registry,
        gate: Gate,
        moe: Mapping[str, Any],
        store: str | None,
    ) -> None:
        engine = FleetEngine(fleet, registry, moe, traces=store is not None)
        path = None if store is None else store_path(store)
        status = status_of(moe)
        super().__init__(engine, status, registry, gate, store=path, traces_by_default=False)
        self._fleet = fleet
        self.leases = _FleetLeases(engine, status["num_slots"])
        self.started = fleet.target.run

    async def put(self, mask: Mask, who: str) -> tuple[StoredMask, bool]:
        """See `Plane`."""
        stored = await super().put(mask, who)
        await self._bring_masks()
        return stored

    async def delete(self, name: str, who: str) -> str:
        """See `Plane`."""
        key = await super().delete(name, who)
        await self._bring_masks()
        return key

    async def _bring_masks(self) -> None:
        def change(target: Target) -> Target:
            state = replace(self.registry.state, steering=target.state.steering)
            return replace(target, state=state)

        await self._fleet.bring(change)

    async def start(self, run: str) -> None:
        """See `Plane`."""
        await super().start(run)
        await self._fleet.bring(lambda target: replace(target, run=run))


def status_of(moe: Mapping[str, Any]) -> dict[str, Any]:
    """What `Plane` needs to know of an engine, from a server's /v1/moe."""
    facts = {name: moe[name] for name in ("model", "architecture", "moe_layers", "num_experts")}
    facts |= {"top_k": moe["top_k"], "revision": None, "dtype": "", "engine": ""}
    facts |= {name: moe["router"][name] for name in ("scoring", "renormalize")}
    return {
        "facts": facts,
        "router": moe["router"],
        "num_slots": moe["slots"]["total"],
        "composes": moe["own_mask"] == "compose",
    }


class Coordinator:
    """A Ray actor, of which there is one, with the folder of masks to itself."""

    def __init__(self, masks: str, store: str | None, expected: int, lease_s: float) -> None:
        key = load_server_settings().admin_key
        self._gate = Gate(None if key is None else key.get_secret_value())
        self._registry = Registry(Path(masks))
        self._store = store
        target = Target(self._registry.state)
        self._fleet = Fleet(target, self._content, expected, lease_s)
        self._moe: dict[str, Any] | None = None
        self._app = FastAPI()
        self._app.state.fleet = self._fleet
        self._app.include_router(router)
        self._app.include_router(fleet_router)
        self._app.include_router(metrics_router)

    def _content(self, name: str, version: int) -> dict[str, Any]:
        return self._registry.content(name, version).model_dump(mode="json", exclude_none=True)

    # What replicas call.

    async def ready(self) -> None:
        """Answer."""

    async def join(self, replica: str) -> RegistryCopy:
        """All masks, for a server that is to start with them."""
        self._fleet.join(replica)
        return self._registry.copy()

    async def enter(self, replica: str, have: Target, moe: dict[str, Any]) -> Entry:
        """See `Fleet`; StoreError if the replica has another model than the others."""
        model = status_of(moe)
        if self._moe is None:
            # The first one. A run that is started goes on when the coordinator has ended.
            self._fleet.adopt_run(have.run)
            self._moe = moe
            self._app.state.moescope = FleetPlane(
                self._fleet, self._registry, self._gate, moe, self._store
            )
        elif model != status_of(self._moe):
            raise StoreError("it has another model, or other options, than the other replicas")
        return await self._fleet.enter(replica, have)

    async def follow(self, ticket: str, answer: Answer | None) -> Order | bool:
        """See `Fleet`."""
        return await self._fleet.follow(ticket, answer)

    async def leave(self, replica: str, why: str) -> None:
        """See `Fleet`."""
        self._fleet.leave(replica, why)

    async def control(self, call: Call) -> Reply:
        """Answer a request to the control plane."""
        transport = httpx.ASGITransport(
            self._answer, client=call.client, raise_app_exceptions=False
        )
        request = httpx.Request(
            call.method, f"http://coordinator{call.url}", headers=call.headers, content=call.body
        )
        answer = await transport.handle_async_request(request)
        body = await answer.aread()
        changed = call.method != "GET" and answer.status_code == 200
        if changed:
            reach = await self._fleet.reach()
            reached = JSONResponse(
                json.loads(body) | {"replicas": reach.to_json()}, 200 if reach.all else 207
            )
            return Reply(reached.status_code, reached.raw_headers, bytes(reached.body))
        return Reply(answer.status_code, answer.headers.raw, body)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        if self._moe is None:
            error = NoReplicaError("no replica has started yet: ask again later")
            await refusal(error)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            raise  # for httpx, which answers with the status 500 that was sent


class CoordinatorHost:
    """What Serve keeps alive: the deployment whose only work is to have the coordinator's actor.

    Replicas call that actor itself. The answers of a deployment go to its callers one after the
    other, and the first caller that hangs (a stopped process, a cut network) keeps all the others
    waiting: just when a coordinator is needed.
    """

    def __init__(self, masks: str, store: str | None, expected: int, lease_s: float) -> None:
        import ray

        # Every replica has a question open all the time, and there are the control plane's own.
        actor = ray.remote(num_cpus=0, max_concurrency=_MAX_CALLS, max_restarts=-1)(Coordinator)
        self._actor: Any = actor.remote(masks, store, expected, lease_s)

    async def actor(self) -> Any:
        """The coordinator, for replicas; raises what kept it from starting."""
        await self._actor.ready.remote()
        return self._actor

    async def check_health(self) -> None:
        """For Serve."""
        await self._actor.ready.remote()
