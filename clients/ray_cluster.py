"""A Ray cluster to work on: started here or found at an address, and what fits on it."""

import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moescope.tracer.errors import InputError

LOCAL, AUTO = "local", "auto"
ADDRESS_FORM = "local|auto|HOST:PORT"  # in the commands' help

_CONNECT_TIMEOUT_S = 5.0
_CLIENT_SCHEME = "ray://"

# No reports of usage; and what Ray and the actors' failures say is in log files, not among ours.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's coming default; without it, a warning
}


@contextmanager
def ray_cluster(address: str) -> Iterator[Any]:
    """The module `ray`, connected to a cluster; "local" starts one here, and ends it.

    `address` is "local", "auto" (the cluster that this machine belongs to) or HOST:PORT. Raises
    InputError where there is none, within seconds if nobody listens there.
    """
    ray = check_address(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        options["include_dashboard"] = False
    try:
        with _hidden_stderr():
            context = ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "on this machine" if address == AUTO else f"at {address}"
        raise InputError(
            f"can't join a Ray cluster {where}: {error}. `--ray local` starts one here; "
            "`ray start` on the machines makes one of several; one that asks for a token takes it "
            "from RAY_AUTH_TOKEN or ~/.ray/auth_token (docs/ray.md)."
        ) from None
    try:
        for name in ("ray", "ray.data"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with context:
            yield ray
    finally:
        ray.shutdown()


@contextmanager
def _hidden_stderr() -> Iterator[None]:
    """Nothing reaches the terminal's error output: Ray's core writes there past Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def check_address(address: str) -> Any:
    """The module `ray`, if it is installed and somebody listens at the address; else InputError."""
    if address not in (LOCAL, AUTO):
        _check_reachable(address)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)  # before the import, which reads them
    if address != LOCAL and "ray" not in sys.modules and _has_token():
        # `ray start` asks for the token where there is one; `ray.init` alone doesn't show it. Of
        # a cluster that it starts itself it sees to that, and must not be told after its import.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError(
            f"--ray needs Ray, which is not installed here ({error}): "
            "pip install 'moescope[ray]', on every machine of the cluster"
        ) from None
    return ray


def _has_token() -> bool:
    """Whether this user has a token for Ray clusters (docs.ray.io: token authentication)."""
    given = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return given or (Path.home() / ".ray" / "auth_token").exists()


def _check_reachable(address: str) -> None:
    """Ray itself would try for a minute."""
    if address.startswith(_CLIENT_SCHEME):
        raise InputError(
            f"--ray {address}: Ray Data does not work through Ray's client port. Run the command "
            "on a machine of the cluster, with `--ray auto`; from outside, `ray job submit -- "
            "moescope …` does that."
        )
    host, separator, port = address.rpartition(":")
    if not (separator and host and port.isdigit() and "/" not in host):
        raise InputError(
            f"--ray {address!r} is no address: give `local`, `auto` or HOST:PORT (as `ray start "
            "--head` prints it)"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"no Ray cluster answers at {address} ({error}): `ray status` on its head node says "
            "whether it runs, and `ray start --head` prints the address"
        ) from None


def node_resources(ray: Any) -> list[dict[str, float]]:
    """What every living machine of the cluster has: {"CPU": 8.0, "GPU": 4.0, …}."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def size_replicas(
    nodes: Sequence[Mapping[str, float]], replicas: int | None, gpus_each: int
) -> tuple[int, float, int]:
    """(replicas, CPUs each, GPUs each) that fit on these machines.

    A replica lies within one machine. Where the cluster has GPUs, each takes `gpus_each` of
    them and one CPU, and None is as many replicas as fit. Where it has none, they share the
    CPUs, and None is one a machine. InputError if so many do not fit.
    """
    if any(node.get("GPU", 0) for node in nodes):
        fit = sum(int(node.get("GPU", 0) // gpus_each) for node in nodes)
        if not fit or (replicas or 0) > fit:
            most = max(int(node.get("GPU", 0)) for node in nodes)
            raise InputError(
                f"{replicas or 1} replicas of {gpus_each} GPUs do not fit: {len(nodes)} machines "
                f"with up to {most} GPUs each hold {fit}. Lower --replicas or "
                "--tensor-parallel-size, or start more machines first."
            )
        return replicas or fit, 1.0, gpus_each
    cpus = [node.get("CPU", 0.0) for node in nodes]
    wanted = replicas or max(1, sum(cpu >= 1 for cpu in cpus))
    for each in range(int(max(cpus, default=0)), 0, -1):
        if sum(int(cpu // each) for cpu in cpus) >= wanted:
            return wanted, float(each), 0
    # More replicas than cores: they take turns.
    total = sum(cpus)
    if total <= 0:
        raise InputError("the Ray cluster has no CPU to give: start machines with `ray start`")
    return wanted, int(min(cpu for cpu in cpus if cpu) * 100 / wanted) / 100, 0
