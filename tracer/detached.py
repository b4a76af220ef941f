"""A process that outlives whoever started it, even if all of that one's descendants are killed.

vLLM ends a server by SIGKILL to its engine and to every descendant of it. The trace writer must
not be one: what it has of finished requests would be lost. So a shell starts it and is gone, and
both sides watch each other by file descriptors that become readable when a process has ended.
"""

import os
import select
import signal
import subprocess
from collections.abc import Sequence


class Detached:
    """A process with nothing on its standard input, and its standard output on our error output."""

    def __init__(self, command: Sequence[str], pass_fds: Sequence[int]) -> None:
        """Start it, in a session of its own: Ctrl-C is for the one who starts it."""
        started = subprocess.run(
            ["/bin/sh", "-c", '"$@" </dev/null >&2 & echo $!', "sh", *command],
            pass_fds=pass_fds,
            start_new_session=True,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        self.pid = int(started.stdout)
        self._ended = os.pidfd_open(self.pid)

    def running(self) -> bool:
        """Whether it has not ended."""
        return not has_ended(self._ended)

    def wait(self) -> None:
        """Wait for its end."""
        select.select([self._ended], [], [])

    def kill(self) -> None:
        """End it at once."""
        if self.running():
            signal.pidfd_send_signal(self._ended, signal.SIGKILL)

    def close(self) -> None:
        """Look at it no more."""
        os.close(self._ended)


def has_ended(process: int) -> bool:
    """Whether the process of this descriptor (`os.pidfd_open`) has."""
    return bool(select.select([process], [], [], 0)[0])
