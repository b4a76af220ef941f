"""Steering and tracing by headers: what stands between the client and vLLM's own routes.

    request ─▶ headers and body ─▶ mask resolved, checked, in a slot ─▶ vLLM ─▶ response
                     │                          │                                  │
              422 malformed      404 unknown, 409 other model, 429 no slot   headers that say
                                                                             what was in force

Pure ASGI: the response passes through as it comes, and the slot is held until it has ended or the
client has gone. Nothing that names a mask is passed on without it.
"""

import json
from contextlib import AsyncExitStack
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moescope.server.errors import refusal
from moescope.server.plane import Plane
from moescope.server.routes import CONTROL_PATHS
from moescope.server.wishes import (
    HEADERS,
    read_body,
    read_headers,
    read_wishes,
    trace_of,
    wishes_in,
    write_wishes,
)
from moescope.tracer.errors import InputError, MoescopeError

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
# Where vLLM passes a body's vllm_xargs on by itself.
_XARGS_PATHS = ("/v1/chat/completions/batch", "/v1/messages", "/invocations", "/render")


@dataclass(frozen=True, slots=True)
class _Passed:
    """A request as vLLM gets it. `looked` is false for a body that vLLM will refuse."""

    body: bytes
    looked: bool = False
    own_mask: str | None = None
    run: str | None = None


class SteeringMiddleware:
    """Serves the headers on `PATHS`, and refuses them where they would do nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["type"] == "http" and scope["method"] == "POST" and path in PATHS:
            await self._serve(scope, receive, send)
        elif path.startswith(CONTROL_PATHS) or scope.get("method", "POST") != "POST":
            await self.app(scope, receive, send)
        else:
            await self._serve_other(scope, receive, send, path)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        plane: Plane = scope["app"].state.moescope
        async with AsyncExitStack() as held:  # the slot, until the response has ended
            try:
                passed = await _prepare(plane, scope, receive, held)
            except MoescopeError as error:
                await refusal(error)(scope, receive, send)
                return
            if passed is None:
                return  # the client has gone
            headers = MutableHeaders(raw=list(scope["headers"]))
            if "content-length" in headers:
                headers["content-length"] = str(len(passed.body))
            scope = {**scope, "headers": headers.raw}
            echo = _echo(send, plane, passed) if passed.looked else send
            await self.app(scope, _replay(passed.body, receive), echo)

    async def _serve_other(self, scope: Scope, receive: Receive, send: Send, path: str) -> None:
        """Pass a request on that can't have wishes; one that has some is refused."""
        headers = Headers(scope=scope)
        lost = [name for name in HEADERS if name in headers]
        is_json = headers.get("content-type", "").lower().startswith("application/json")
        if scope["type"] == "http" and is_json and not lost and not path.endswith(_XARGS_PATHS):
            body = await _read(receive)
            if body is None:
                return  # the client has gone
            lost, receive = wishes_in(body), _replay(body, receive)
        if lost:
            await _refuse_path(scope, receive, send, path, lost)
        else:
            await self.app(scope, receive, send)


async def _prepare(
    plane: Plane, scope: Scope, receive: Receive, held: AsyncExitStack
) -> _Passed | None:
    """The request with its mask loaded; MoescopeError if it can't be served as it asks."""
    said = read_headers(Headers(scope=scope))
    body = await _read(receive)
    if body is None:
        return None
    data = read_body(body, said)
    if data is None:
        return _Passed(body)
    wishes = read_wishes(data, said)
    if wishes.masks and data.get("background"):
        raise InputError(
            "a response in the background can't name a mask: its slot is held for as long as the "
            "HTTP request lasts"
        )
    default = plane.traces_by_default and plane.store is not None
    run = trace_of(wishes, plane.started, default=default)
    key = await held.enter_async_context(plane.steered(wishes.masks))
    changed = write_wishes(data, said, key, run)
    if changed != data:
        body = json.dumps(changed).encode()
    return _Passed(body, True, key, run)


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None if the client went away before its end."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one message, and after it whatever the client sends: that it has gone."""
    unread = [body]

    async def replay() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await receive()

    return replay


def _echo(send: Send, plane: Plane, passed: _Passed) -> Send:
    """Say in the headers of an answer what was in force; a refusal ran under nothing."""

    async def echo(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] < 400:
            message.setdefault("headers", [])
            headers = MutableHeaders(scope=message)
            headers["X-Steering-Mask"] = plane.in_force(passed.own_mask)
            headers["X-Trace"] = "off" if passed.run is None else "on"
            if passed.run is not None and passed.run.isascii() and passed.run.isprintable():
                headers["X-Trace-Run"] = passed.run
        await send(message)

    return echo


async def _refuse_path(
    scope: Scope, receive: Receive, send: Send, path: str, lost: list[str]
) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": "no steering here"})
        return
    message = f"{path} serves no {', '.join(lost)}: use {', '.join(PATHS)}"
    await refusal(InputError(message))(scope, receive, send)
