"""The control plane's routes. Each is a thin layer over `Plane`."""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool

from moescope.analysis.info import store_info
from moescope.server.errors import Refusal, invalid, refusal
from moescope.server.logs import note
from moescope.server.models import (
    MASK_EXAMPLES,
    GlobalMask,
    MaskDeleted,
    MaskEntryInList,
    MaskList,
    MaskPut,
    MaskVersion,
    Moe,
    Run,
    RunState,
    Slots,
    SteeringChange,
    Traces,
)
from moescope.server.plane import Plane
from moescope.tracer.errors import InputError, MoescopeError
from moescope.tracer.mask import Mask

CONTROL_PATHS = ("/v1/masks", "/v1/steering", "/v1/moe", "/v1/traces")


class ControlRoute(APIRoute):
    """A route that asks who it is before it reads anything, and answers in vLLM's error format."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What serves the route."""
        serve = super().get_route_handler()

        async def handler(request: Request) -> Response:
            plane: Plane = request.app.state.moescope
            try:
                request.state.who = plane.gate.admit(request)
                note(who=request.state.who)
                return await serve(request)
            except RequestValidationError as error:
                return refusal(invalid(error.errors()))
            except MoescopeError as error:
                return refusal(error)

        return handler


def _refusals(*codes: int) -> dict[int | str, dict[str, Any]]:
    texts = {
        401: "No admin key, or not from this machine.",
        404: "There is no such mask, version or run.",
        409: "The mask is for another model, or the server's state does not allow it.",
        422: "The request is malformed, or the mask does not fit the model.",
        503: "The engine or the disk failed.",
    }
    return {code: {"model": Refusal, "description": texts[code]} for code in codes}


# `auto_error`: ControlRoute has asked already; this shows the scheme in the OpenAPI page.
_scheme = HTTPBearer(auto_error=False, description="The admin key.")
router = APIRouter(
    prefix="/v1",
    tags=["moescope"],
    route_class=ControlRoute,
    dependencies=[Depends(_scheme)],
    responses=_refusals(401, 422, 503),
)


def _plane(request: Request) -> Plane:
    plane: Plane = request.app.state.moescope
    return plane


def _who(request: Request) -> str:
    who: str = request.state.who
    return who


ThePlane = Annotated[Plane, Depends(_plane)]
Who = Annotated[str, Depends(_who)]
Name = Annotated[str, Path(description="Name of the mask.", examples=["calm"])]
RunName = Annotated[str, Path(description="Name of the run.", examples=["monday"])]


@router.get("/masks")
async def list_masks(plane: ThePlane) -> MaskList:
    """List the masks, each in its last version."""
    return MaskList(
        data=[
            MaskEntryInList(
                name=stored.name,
                version=stored.version,
                key=stored.key,
                note=stored.mask.note,
                entries=len(stored.mask.entries),
            )
            for stored in plane.registry.all()
        ]
    )


@router.get("/masks/{name}", responses=_refusals(404))
async def get_mask(
    plane: ThePlane,
    name: Name,
    version: Annotated[int | None, Query(ge=1, description="The last one if left out.")] = None,
) -> MaskVersion:
    """Show a mask."""
    stored = plane.registry.get(name, version)
    return MaskVersion(
        name=name,
        version=stored.version,
        key=stored.key,
        versions=plane.registry.versions(name),
        mask=stored.mask,
    )


@router.put("/masks/{name}", responses=_refusals(409))
async def put_mask(
    plane: ThePlane,
    who: Who,
    name: Name,
    mask: Annotated[Mask, Body(openapi_examples=MASK_EXAMPLES)],
) -> MaskPut:
    """Add a mask, or a version to one that is there. The same mask again makes no version."""
    if mask.name != name:
        raise InputError(f"the mask is named {mask.name!r}, and the path says {name!r}")
    stored, created = await plane.put(mask, who)
    return MaskPut(name=name, version=stored.version, key=stored.key, created=created)


@router.delete("/masks/{name}", responses=_refusals(404, 409))
async def delete_mask(plane: ThePlane, who: Who, name: Name) -> MaskDeleted:
    """Delete a mask with all its versions. Requests that run under one keep it to their end."""
    return MaskDeleted(name=name, deleted=await plane.delete(name, who))


@router.get("/steering")
async def get_steering(plane: ThePlane) -> GlobalMask:
    """Show the global mask, which steers requests that name none."""
    return GlobalMask(mask=plane.registry.state.steering)


@router.put("/steering", responses=_refusals(404, 409))
async def put_steering(plane: ThePlane, who: Who, change: SteeringChange) -> GlobalMask:
    """Set the global mask. Requests that run already have it from their next token on."""
    return GlobalMask(mask=await plane.steer(change.mask, who))


@router.delete("/steering")
async def delete_steering(plane: ThePlane, who: Who) -> GlobalMask:
    """Take the global mask away."""
    return GlobalMask(mask=await plane.steer(None, who))


@router.get("/moe")
async def get_moe(plane: ThePlane) -> Moe:
    """Show the model's layers, experts and router, and the slots of masks."""
    status = await plane.engine.status()
    return Moe.model_validate(
        status["facts"]
        | {
            "router": status["router"],
            "global_mask": status["global"],
            "own_mask": "compose" if plane.composes else "replace",
            "slots": Slots(
                total=plane.leases.num_slots,
                in_use=plane.leases.in_use,
                loaded=sorted(status["slots"].values()),
            ),
        }
    )


@router.get("/traces", responses=_refusals(409))
async def get_traces(plane: ThePlane) -> Traces:
    """Show what the trace store holds, by run."""
    info = await run_in_threadpool(store_info, plane.demand_store())
    status = await plane.engine.status()
    runs: dict[str, Run] = {}
    for group in info.groups:
        run = runs.setdefault(group.run, Run(run=group.run, requests=0, rows=0, incomplete=0))
        run.requests += group.requests
        run.rows += group.tokens
        run.incomplete += group.incomplete
    return Traces(
        started=plane.started,
        live=status["live"],
        rows=info.tokens,
        bytes=info.bytes,
        dropped_rows=sum(writer.dropped_rows for writer in info.writers),
        runs=list(runs.values()),
    )


@router.post("/traces/{run}/start", responses=_refusals(409))
async def start_run(plane: ThePlane, run: RunName) -> RunState:
    """Trace requests that name no run into this one, also those that say nothing of tracing."""
    await plane.start(run)
    status = await plane.engine.status()
    return RunState(run=run, started=True, live=status["live"])


@router.post("/traces/{run}/stop", responses=_refusals(404))
async def stop_run(plane: ThePlane, run: RunName) -> RunState:
    """End that, and put the requests that have finished on disk."""
    status = await plane.stop(run)
    return RunState(run=run, started=False, live=status["live"])
