"""Ends a process and what it has started when its owner is gone, however that came about.

Ray ends an actor by SIGKILL, and its children too. A server that ends so leaves its engine behind,
with the GPUs. So a process that is nobody's child waits for the end of a pipe.
"""

import os
from contextlib import suppress

from moescope.tracer.detached import Detached

_GRACE_S = 30
# $1: the process, which leads a group. $2: the pipe. A line in it says that nothing is to be done.
_SCRIPT = f"""
read -r line < /proc/self/fd/$2 && exit
kill -TERM "$1"
n=0
while kill -0 "$1" && [ $n -lt {_GRACE_S} ]; do sleep 1; n=$((n + 1)); done
kill -KILL -"$1"
"""


class Guard:
    """Stands over the process group of `pid` from now on, until it is released or we are gone."""

    def __init__(self, pid: int) -> None:
        told, self._pipe = os.pipe()
        try:
            command = ["/bin/sh", "-c", f"exec 2>/dev/null; {_SCRIPT}", "sh", str(pid), str(told)]
            self._process = Detached(command, [told])
        finally:
            os.close(told)

    def release(self) -> None:
        """The group has ended: its number may be another's soon."""
        with suppress(BrokenPipeError):
            os.write(self._pipe, b"done\n")
        os.close(self._pipe)
        self._process.close()
