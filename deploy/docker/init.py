#!/usr/bin/env -S python -I
"""The first process of a container: starts the command, and waits for all that comes of it.

A container ends with its first process. A server's trace writer outlives the server, to write
what it has of finished requests; if the server were the first process, that would be lost.
"""

import os
import signal
import sys
from types import FrameType

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


def main(command: list[str]) -> int:
    """Run the command until it and every process that it left behind have ended; its status."""
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    try:
        child = os.posix_spawnp(command[0], command, os.environ, setsigmask=())
    except OSError as error:
        print(f"moescope-init: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127

    def forward(number: int, _: FrameType | None) -> None:
        if status is None:
            os.kill(child, number)

    status: int | None = None
    for number in FORWARDED:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    while True:
        try:
            ended, how = os.wait()
        except ChildProcessError:  # nobody is left
            break
        if ended == child:
            status = os.waitstatus_to_exitcode(how)
    assert status is not None
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
