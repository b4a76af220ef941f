"""Ports of this host for servers that tests and benchmarks start."""

import random
import socket
from contextlib import ExitStack
from pathlib import Path

_LOWEST, _HIGHEST, _TRIES = 15_000, 60_000, 1000
_RANDOM = random.SystemRandom()  # tests seed the other, and would then all get the same ports


def free_port(in_a_row: int = 1) -> int:
    """A port that nobody has and that the system gives to nobody, the first of some in a row.

    A server listens only seconds or minutes after its port was chosen. Whatever asks the system
    for any free port meanwhile, every outgoing connection too, gets one of the range that the
    kernel keeps for that, so these are below it, unless it begins so low that nothing is.
    """
    given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    end = given if given > _LOWEST + in_a_row else _HIGHEST
    for _ in range(_TRIES):
        first = _RANDOM.randrange(_LOWEST, end - in_a_row)
        with ExitStack() as stack:
            try:
                for port in range(first, first + in_a_row):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        return first
    raise OSError(f"no {in_a_row} free ports in a row between {_LOWEST} and {end}")
