"""Steering and tracing by headers: what stands between the client and vLLM's own routes.

    request ─▶ headers and body ─▶ mask resolved, checked, in a slot ─▶ vLLM ─▶ response
                     │                          │                                  │
              422 malformed      404 unknown, 409 other model, 429 no slot   headers that say
                                                                             what was in force

Every answer has X-Request-Id: the client's, or a new one that vLLM takes into its own ids, which
the trace store keeps. Inference and the control plane have a line in the log each (logs.py).

Pure ASGI: the response passes through as it comes, and the slot is held until it has ended or the
client has gone. Nothing that names a mask is passed on without it.
"""

import json
from contextlib import AsyncExitStack
from dataclasses import dataclass
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moescope.server.errors import BY_VLLM, refusal
from moescope.server.logs import RequestLine, request_line
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
_RESPONSES = "/v1/responses"
_ID_HEADER = "x-request-id"


@dataclass(frozen=True, slots=True)
class _Passed:
    """A request as vLLM gets it. `looked` is false for a body that vLLM will refuse.

    `named`: its body gives the request an id.
    """

    body: bytes
    looked: bool = False
    named: bool = False
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
        if scope["type"] == "websocket":
            await self._serve_other(scope, receive, send, path)
            return
        plane: Plane = scope["app"].state.moescope
        method, controls = scope["method"], path.startswith(CONTROL_PATHS)
        given = Headers(scope=scope).get(_ID_HEADER)
        logged = controls or method == "POST"  # not pages that machines look at all day
        with request_line(given or uuid4().hex, method, path, logged=logged) as line:
            send = _answering(send, plane, line)
            if method == "POST" and path in PATHS:
                await self._serve(scope, receive, send, plane, line)
            elif controls or method != "POST":
                await self.app(scope, receive, send)
            else:
                await self._serve_other(scope, receive, send, path)

    async def _serve(
        self, scope: Scope, receive: Receive, send: Send, plane: Plane, line: RequestLine
    ) -> None:
        async with AsyncExitStack() as held:  # the slot, until the response has ended
            try:
                passed = await _prepare(plane, scope, receive, held, line)
            except MoescopeError as error:
                await refusal(error)(scope, receive, send)
                return
            if passed is None:
                return  # the client has gone
            headers = MutableHeaders(raw=list(scope["headers"]))
            if "content-length" in headers:
                headers["content-length"] = str(len(passed.body))
            if passed.looked and not passed.named:
                headers[_ID_HEADER] = line.request_id
            scope = {**scope, "headers": headers.raw}
            line.mask, line.run = passed.own_mask, passed.run
            echo = _echo(send, plane, passed, line)
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
    plane: Plane, scope: Scope, receive: Receive, held: AsyncExitStack, line: RequestLine
) -> _Passed | None:
    """The request with its mask loaded; MoescopeError if it can't be served as it asks."""
    headers = Headers(scope=scope)
    said = read_headers(headers)
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
    named = isinstance(data.get("request_id"), str)
    if run is not None and not named and scope["path"].endswith(_RESPONSES):
        # There vLLM looks at the body alone; the ids of responses begin like this.
        changed = changed | {"request_id": f"resp_{line.request_id}"}
    if named and _ID_HEADER not in headers:
        line.request_id = data["request_id"]
    if changed != data:
        body = json.dumps(changed).encode()
    return _Passed(body, True, named, key, run)


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


def _answering(send: Send, plane: Plane, line: RequestLine) -> Send:
    """Count the request when its answer begins, and tell its id."""

    async def answer(message: Message) -> None:
        if message["type"] == "http.response.start":
            line.status = message["status"]
            plane.counts.answered(line)
            message.setdefault("headers", [])
            if line.request_id.isascii() and line.request_id.isprintable():
                MutableHeaders(scope=message)["X-Request-Id"] = line.request_id
        await send(message)

    return answer


def _echo(send: Send, plane: Plane, passed: _Passed, line: RequestLine) -> Send:
    """Say in the headers of an answer what was in force; a refusal ran under nothing."""

    async def echo(message: Message) -> None:
        if message["type"] != "http.response.start":
            pass
        elif 400 <= message["status"] < 500:
            line.reason = BY_VLLM
        elif passed.looked and message["status"] < 400:
            message.setdefault("headers", [])
            headers = MutableHeaders(scope=message)
            headers["X-Steering-Mask"] = line.mask = plane.in_force(passed.own_mask)
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
