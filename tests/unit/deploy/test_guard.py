"""Real processes, whose owner is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# The owner starts a server that has a child, guards it, says who they are, and waits.
OWNER = """
import subprocess, sys
from moescope.deploy.guard import Guard
server = subprocess.Popen(
    ["/bin/sh", "-c", sys.argv[1]], start_new_session=True, stdout=subprocess.PIPE, text=True
)
child = server.stdout.readline().strip()
guard = Guard(server.pid)
print(server.pid, child, flush=True)
if sys.stdin.readline():
    guard.release()
    print("released", flush=True)
    sys.stdin.readline()
"""


def start(script):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return owner, [int(pid) for pid in owner.stdout.readline().split()]


def runs(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def gone(pids, timeout_s):
    deadline = time.monotonic() + timeout_s
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(runs, pids))


@pytest.mark.parametrize("kill_server", [False, True])
def test_a_server_and_its_engine_end_with_their_owner(kill_server):
    owner, pids = start("sleep 1000 & echo $!; wait")
    assert all(map(runs, pids))
    if kill_server:  # as Ray does with an actor's children
        os.kill(pids[0], signal.SIGKILL)
    owner.kill()
    owner.wait()
    assert gone(pids, 20)


def test_the_server_is_asked_first(tmp_path):
    said = tmp_path / "said"
    trap = f"trap 'kill $child; echo bye > {said}; exit' TERM; "
    owner, pids = start(trap + "sleep 1000 & child=$!; echo $child; wait")
    owner.kill()
    owner.wait()
    assert gone(pids, 20)
    assert said.read_text() == "bye\n"


def test_a_guard_that_is_released_does_nothing():
    owner, pids = start("sleep 1000 & echo $!; wait")
    owner.stdin.write("go\n")
    owner.stdin.flush()
    assert owner.stdout.readline() == "released\n"
    owner.kill()
    owner.wait()
    assert not gone(pids, 2)
    os.killpg(pids[0], signal.SIGKILL)
