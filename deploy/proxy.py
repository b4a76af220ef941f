"""The HTTP side of a replica: requests on their way to its server, or to the coordinator.

    /v1/masks, /v1/steering, /v1/traces,     ▶ the coordinator
    /v1/moe, /v1/replicas, /metrics
    POST                                     ▶ admission: may it run, under which version? ▶ server
    anything else                            ▶ server

Answers pass through as they come; their headers too.
"""

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from moescope.deploy.admission import Admission, OutError
from moescope.deploy.own_server import ServerError
from moescope.server.errors import RETRY_AFTER_S, refusal
from moescope.server.middleware import PATHS
from moescope.server.routes import CONTROL_PATHS
from moescope.server.wishes import MASK, MASK_HEADER, XARGS
from moescope.tracer.errors import MoescopeError
from moescope.tracer.mask_format import NO_MASK

COORDINATED = (*CONTROL_PATHS, "/v1/replicas", "/metrics")
# What holds for one connection only (RFC 9110, 7.6.1), or is said anew.
_OF_CONNECTION = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
# What Serve's own proxy puts into every answer.
_OF_SERVE = frozenset((b"date", b"server", b"x-request-id"))


@dataclass(frozen=True, slots=True)
class Call:
    """A whole HTTP request, as the coordinator gets it."""

    method: str
    url: str
    headers: list[tuple[bytes, bytes]]
    body: bytes
    client: tuple[str, int]


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole HTTP answer."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Proxy:
    """An ASGI app that answers HTTP requests.

    Args:
        server: a client of the replica's server.
        admission: says which requests may pass.
        coordinate: has the coordinator answer.

    """

    def __init__(
        self,
        server: httpx.AsyncClient,
        admission: Admission,
        coordinate: Callable[[Call], Awaitable[Reply]],
    ) -> None:
        self._server, self._admission, self._coordinate = server, admission, coordinate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "no websockets here"})
            return
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:
            return
        headers = _end_to_end(scope["headers"])
        try:
            if scope["path"].startswith(COORDINATED):
                call = Call(scope["method"], _url(scope), headers, body, tuple(scope["client"]))
                reply = await self._coordinate(call)
                await _respond(reply, scope, receive, send)
                return
            if scope["method"] == "POST":
                headers, body = await self._admitted(scope["path"], headers, body)
        except MoescopeError as error:
            response = refusal(error)
            if isinstance(error, OutError):
                response.headers["Retry-After"] = str(RETRY_AFTER_S)
            await response(scope, receive, send)
            return
        await self._pass_on(scope, receive, send, headers, body)

    async def _admitted(
        self, path: str, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """The request with every mask that it names in the version that counts for it."""
        if path not in PATHS:
            await self._admission.admit(())
            return headers, body
        said = Headers(raw=headers).getlist(MASK_HEADER)
        data = _with_mask(body)
        named = [text.strip() for text in said] + ([data[XARGS][MASK]] if data else [])
        # Several headers, or none that makes sense: the server says what is wrong with them.
        keys = await self._admission.admit({text for text in named if text != NO_MASK})
        if not keys:
            return headers, body
        changed = MutableHeaders(raw=list(headers))
        if len(said) == 1:
            text = said[0].strip()
            changed[MASK_HEADER] = keys.get(text, text)
        if data:
            text = data[XARGS][MASK]
            data[XARGS] = data[XARGS] | {MASK: keys.get(text, text)}
            body = json.dumps(data).encode()
            changed["content-length"] = str(len(body))
        return changed.raw, body

    async def _pass_on(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        headers: list[tuple[bytes, bytes]],
        body: bytes,
    ) -> None:
        url = self._server.base_url.join(_url(scope))
        request = httpx.Request(scope["method"], url, headers=headers, content=body)
        started = False
        try:
            answer = await self._server.send(request, stream=True)
            try:
                start: Message = {
                    "type": "http.response.start",
                    "status": answer.status_code,
                    "headers": [
                        header
                        for header in _end_to_end(answer.headers.raw)
                        if header[0].lower() not in _OF_SERVE
                    ],
                }
                started = True
                await send(start)
                async for part in answer.aiter_raw():
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            finally:
                await answer.aclose()
        except httpx.TransportError as error:
            if started:
                raise  # the connection breaks, and the client sees that the answer is not whole
            problem = ServerError(f"the replica's server gave no answer ({error!r}): ask again")
            await refusal(problem)(scope, receive, send)


def _with_mask(body: bytes) -> dict[str, Any] | None:
    """The body if its `vllm_xargs` name a mask; what is malformed is the server's to refuse."""
    if MASK.encode() not in body and b"\\u" not in body:
        return None
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return None
    xargs = data.get(XARGS) if isinstance(data, dict) else None
    return data if isinstance(xargs, dict) and isinstance(xargs.get(MASK), str) else None


def _url(scope: Scope) -> str:
    """The path and the query, as they were sent."""
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope.get("query_string", b"")
    return (path.partition(b"?")[0] + (b"?" + query if query else b"")).decode("latin-1")


def _end_to_end(headers: Any) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name.lower() not in _OF_CONNECTION]


async def _respond(reply: Reply, scope: Scope, receive: Receive, send: Send) -> None:
    response = Response(reply.body, reply.status)
    response.raw_headers = reply.headers
    await response(scope, receive, send)
