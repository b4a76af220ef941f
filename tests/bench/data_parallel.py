"""The environments of vLLM processes that are replicas of one data-parallel engine."""

import random
import socket
from contextlib import ExitStack
from pathlib import Path

# vLLM 0.32 takes ports from the master's upwards, and keeps this many for itself.
_PORTS = 10
_LOWEST, _TRIES = 15_000, 1000


def replicas(count: int) -> list[dict[str, str]]:
    """One environment for each of `count` replicas on this host."""
    port = _free_ports()
    return [
        {
            "VLLM_DP_RANK": f"{rank}",
            "VLLM_DP_RANK_LOCAL": f"{rank}",
            "VLLM_DP_SIZE": f"{count}",
            "VLLM_DP_MASTER_IP": "127.0.0.1",
            "VLLM_DP_MASTER_PORT": f"{port}",
        }
        for rank in range(count)
    ]


def _free_ports() -> int:
    """The first of `_PORTS` free ports in a row, none of which the system gives to others.

    Replicas listen only when their models are loaded. Other engines that start meanwhile ask the
    system for any free port, so this looks below the range from which it gives them.
    """
    given = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    for _ in range(_TRIES):
        first = random.randrange(_LOWEST, int(given[0]) - _PORTS)
        with ExitStack() as stack:
            try:
                for port in range(first, first + _PORTS):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        return first
    raise OSError(f"no {_PORTS} free ports in a row between {_LOWEST} and {given[0]}")
