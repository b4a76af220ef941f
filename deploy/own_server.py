"""The `moescope serve` process of one replica: started, asked, ended.

It listens on a Unix socket in a folder of its own, so that nobody gets past the replica, and its
masks lie there too: a copy of the shared registry, made anew with every start.
"""

import asyncio
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from moescope.deploy.guard import Guard
from moescope.deploy.target import Step
from moescope.server.registry import RegistryCopy, write_copy
from moescope.tracer.errors import MoescopeError

_POLL_S = 0.1
_STOP_TIMEOUT_S = 30.0
_ADMIN_KEY = "MOESCOPE_ADMIN_KEY"
# Shorter than the 5 s after which vLLM closes idle connections: none is used as it is closed.
_KEEP_S = 2.0


class ServerError(MoescopeError):
    """The replica's own server has ended, or has not done what it was told."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What all replicas' servers have in common."""

    model: str
    store: str | None
    slots: int | None
    own_mask: str | None
    engine_args: Sequence[str]

    def command(self, masks: Path, socket: Path) -> list[str]:
        """How it is started."""
        command = [sys.executable, "-m", "moescope.clients.cli", "serve", self.model]
        command += ["--masks", str(masks)]
        for option in ("store", "slots", "own_mask"):
            value = getattr(self, option)
            if value is not None:
                command += [f"--{option.replace('_', '-')}", str(value)]
        # Asked all the time; who wants to see it says so in an option of his own.
        command += ["--", "--disable-access-log-for-endpoints", "/health"]
        return [*command, *self.engine_args, "--uds", str(socket)]


class OwnServer:
    """A server with these masks, from `start` to `stop`."""

    def __init__(self, options: ServerOptions, masks: RegistryCopy) -> None:
        self._options = options
        self._folder = Path(tempfile.mkdtemp(prefix="moescope-"))
        self._socket = self._folder / "http"
        write_copy(self._folder / "masks", masks)
        # A key that there is anyway is good for inference too (docs/server.md).
        key = os.environ.get(_ADMIN_KEY) or secrets.token_urlsafe(32)
        self._admin = {"Authorization": f"Bearer {key}"}
        self._environment = os.environ | {_ADMIN_KEY: key}
        self._process: asyncio.subprocess.Process | None = None
        self._guard: Guard | None = None
        self.http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(
                uds=str(self._socket),
                limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEEP_S),
            ),
            base_url="http://replica",
            timeout=None,
        )

    async def start(self) -> None:
        """Come back when it serves; ServerError if it ends before."""
        self._process = await asyncio.create_subprocess_exec(
            *self._options.command(self._folder / "masks", self._socket),
            env=self._environment,
            start_new_session=True,
        )
        self._guard = Guard(self._process.pid)
        while not await self.healthy():
            if self._process.returncode is not None:
                raise ServerError(f"{self.how_it_ended()} before it served: its log says why")
            await asyncio.sleep(_POLL_S)

    async def ended(self) -> str:
        """Wait for its end; returns how it ended."""
        assert self._process is not None
        await self._process.wait()
        return self.how_it_ended()

    def how_it_ended(self) -> str:
        """In words."""
        code = None if self._process is None else self._process.returncode
        if code is not None and code < 0:
            return f"its server was ended by {signal.Signals(-code).name}"
        return f"its server has ended with exit code {code}"

    async def healthy(self) -> bool:
        """Whether it serves, and its engine runs."""
        try:
            return (await self.http.get("/health")).status_code == 200
        except httpx.TransportError:
            return False

    async def get(self, path: str) -> Any:
        """What a page says: JSON, or text. ServerError if it can't be had."""
        answer = await self._ask("GET", path)
        is_json = answer.headers.get("content-type", "").startswith("application/json")
        return answer.json() if is_json else answer.text

    async def take(self, step: Step) -> None:
        """Make one change; ServerError if it does not come out as it must."""
        match step.what:
            case "put":
                name = str(step.name).partition("@")[0]
                answer = await self._ask("PUT", f"/v1/masks/{name}", step.mask)
                key = answer.json()["key"]
                if key != step.name:
                    raise ServerError(f"its server took mask {step.name} as {key}")
            case "delete":
                await self._ask("DELETE", f"/v1/masks/{step.name}")
            case "steer" if step.name is None:
                await self._ask("DELETE", "/v1/steering")
            case "steer":
                await self._ask("PUT", "/v1/steering", {"mask": step.name})
            case "start" | "stop":
                await self._ask("POST", f"/v1/traces/{step.name}/{step.what}")

    async def _ask(self, method: str, path: str, body: Any = None) -> httpx.Response:
        try:
            answer = await self.http.request(method, path, json=body, headers=self._admin)
        except httpx.TransportError as error:
            raise ServerError(f"its server gives no answer to {method} {path}: {error}") from None
        if answer.status_code >= 400:
            raise ServerError(f"its server answers {method} {path} with {answer.text}")
        return answer

    async def stop(self) -> None:
        """End it; what it has traced is on disk then."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT_S)
        self.clear()
        await self.http.aclose()

    def clear(self) -> None:
        """End what a killed server has left behind: its engine runs on without it."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        if self._guard is not None:
            self._guard.release()
            self._guard = None
        shutil.rmtree(self._folder, ignore_errors=True)
