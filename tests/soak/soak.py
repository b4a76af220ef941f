"""`make soak`: ten rough minutes for a server on the CPU, and what must hold after them.

While clients ask for other masks, or none, and some hang up in the middle, masks get new versions,
the global mask changes, the trace writer is killed twice and the disk is full for a while. At the
end:

- *No wrong steering.* A response names one version of the mask that was asked for; every row of its
  request says that version, and no expert that it switches off was chosen.
- *No lost accounting.* Every traced request whose answer came is in the store, whole or marked
  incomplete, or among those that the store counts as lost; a complete one has as many rows as the
  answer says tokens were computed.
- *Memory is flat.* No process of the server holds much more at the end than after the first fifth.

The store lies on a small tmpfs of its own, for which the script starts itself again in a mount
namespace (`unshare`), without which it can't run.

    make soak                                ten minutes
    make soak SOAK="--minutes 2 --seed 1"    other lengths and draws
"""

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from rich.console import Console
from servers import PROMPT, Server

from moescope.analysis import open_store
from moescope.analysis.verify import verify_store
from moescope.clients.specimen import make_specimen
from moescope.tracer.store import read_writers

DISK_MIB, NUM_EXPERTS, SLOTS, CLIENTS = 48, 16, 4, 12
NAMES = ("calm", "storm", "wind", "rain")
GROWTH_MIB, GROWTH = 48, 1.1  # of a process, from its first fifth to its end

console = Console(width=100)


@dataclass
class Seen:
    """What clients and the control plane saw."""

    statuses: Counter[str] = field(default_factory=Counter)
    answers: dict[str, tuple[str | None, int]] = field(default_factory=dict)  # own mask, rows
    experts: dict[str, set[int]] = field(default_factory=dict)  # NAME@VERSION: switched off
    wrong: list[str] = field(default_factory=list)
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)

    def note(self, started: float, what: str) -> None:
        """Keep and print an event with its time."""
        self.events.append(f"{time.monotonic() - started:6.1f} s  {what}")
        console.print(self.events[-1])


def main() -> None:
    """Run, print the result, and exit with 1 if something did not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = _own_disk()
    model = folder / "model"
    make_specimen(model, "qwen3_moe")
    server = Server(folder, model, slots=SLOTS)
    seen = Seen()
    try:
        server.wait()
        asyncio.run(_soak(server, seen, given.minutes * 60, random.Random(given.seed)))
        in_use = server.slots_in_use()
    except BaseException:
        console.print(f"the server's log is {server.log}")
        raise
    finally:
        server.stop()
    if in_use:
        seen.wrong.append(f"slots are in use after the last request: {in_use}")
    _check_store(server.store, seen)
    _check_memory(seen)
    console.print(dict(seen.statuses))
    for line in seen.wrong[:20]:
        console.print(f"WRONG: {line}")
    sys.exit(1 if seen.wrong else 0)


def _own_disk() -> Path:
    """A folder whose traces lie on a tmpfs, in a mount namespace that ends with us."""
    place = os.environ.get("MOESCOPE_SOAK_FOLDER")
    if place is None:
        place = tempfile.mkdtemp(prefix="moescope-soak-")
        root = [] if os.geteuid() == 0 else ["--map-root-user"]
        again = ["unshare", "--mount", *root, sys.executable, *sys.argv]
        os.execvpe("unshare", again, os.environ | {"MOESCOPE_SOAK_FOLDER": place})
    disk = Path(place, "disk")
    disk.mkdir()
    size = ["-o", f"size={DISK_MIB}m"]
    subprocess.run(["mount", "-t", "tmpfs", *size, "moescope-soak", str(disk)], check=True)
    Path(disk, "traces").mkdir()
    Path(place, "traces").symlink_to(disk / "traces")
    return Path(place)


async def _soak(server: Server, seen: Seen, seconds: float, draw: random.Random) -> None:
    started = time.monotonic()
    until = started + seconds
    # The server ends a connection that nobody has used for 5 s, maybe just as it is used again.
    limits = httpx.Limits(keepalive_expiry=2)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        for name in NAMES:
            await _new_version(client, seen, name, draw)
        work = [_client(client, seen, number, until, draw) for number in range(CLIENTS)]
        work += [
            _every(0.7, until, lambda: _new_version(client, seen, draw.choice(NAMES), draw)),
            _every(2.9, until, lambda: _change_global(client, seen, draw)),
            _every(1.0, until, lambda: _weigh(server, seen, time.monotonic() - started)),
            _trouble(server, seen, started, seconds),
        ]
        await asyncio.gather(*work)


async def _every(seconds: float, until: float, work: Callable[[], Awaitable[None]]) -> None:
    while time.monotonic() < until:
        await work()
        await asyncio.sleep(seconds)


async def _new_version(
    client: httpx.AsyncClient, seen: Seen, name: str, draw: random.Random
) -> None:
    """Switch other experts off under this name."""
    experts = set(draw.sample(range(NUM_EXPERTS), 3))
    entries = [
        {"layer": layer, "expert": expert, "action": "deactivate"}
        for layer in range(4)
        for expert in experts
    ]
    answer = await client.put(f"/v1/masks/{name}", json={"name": name, "entries": entries})
    if answer.status_code != 200:
        seen.wrong.append(f"PUT {name}: {answer.status_code} {answer.text}")
        return
    seen.experts[answer.json()["key"]] = experts


async def _change_global(client: httpx.AsyncClient, seen: Seen, draw: random.Random) -> None:
    mask = draw.choice([None, *NAMES])
    if mask is None:
        answer = await client.delete("/v1/steering")
    else:
        answer = await client.put("/v1/steering", json={"mask": mask})
    seen.statuses[f"global {answer.status_code}"] += 1
    if answer.status_code not in (200, 429):
        seen.wrong.append(f"global mask {mask}: {answer.status_code} {answer.text}")


async def _client(
    client: httpx.AsyncClient, seen: Seen, number: int, until: float, draw: random.Random
) -> None:
    count = 0
    while time.monotonic() < until:
        example, count = f"{number}-{count}", count + 1
        mask = draw.choice([None, None, "none", *NAMES, "no-such-mask" if count % 9 == 0 else None])
        try:
            await _ask(client, seen, example, mask, draw)
        except httpx.TransportError as error:
            seen.wrong.append(f"{example}: {error!r}")


async def _ask(
    client: httpx.AsyncClient, seen: Seen, example: str, mask: str | None, draw: random.Random
) -> None:
    body = {
        "model": "specimen",
        "prompt": PROMPT * draw.randrange(1, 12),
        "max_tokens": draw.randrange(2, 60),
        "ignore_eos": True,
        "vllm_xargs": {"moescope_example_id": example},
    }
    headers = {"X-Trace-Run": "soak"} | ({} if mask is None else {"X-Steering-Mask": mask})
    if draw.random() < 0.15:
        async with client.stream(
            "POST", "/v1/completions", json=body | {"stream": True}, headers=headers
        ) as stream:
            async for _ in stream.aiter_lines():
                break  # and hang up
        seen.statuses["hung up"] += 1
        return
    answer = await client.post("/v1/completions", json=body, headers=headers)
    seen.statuses[str(answer.status_code)] += 1
    if mask == "no-such-mask":
        if answer.status_code != 404:
            seen.wrong.append(f"{example}: an unknown mask was answered {answer.status_code}")
    elif answer.status_code == 200:
        said, usage = answer.headers["x-steering-mask"], answer.json()["usage"]
        if mask is not None and said.partition("@")[0] != mask:
            seen.wrong.append(f"{example}: asked for {mask}, answered {said}")
        # The last token is not fed back, so nothing routes it.
        seen.answers[example] = None if mask is None else said, usage["total_tokens"] - 1
    elif answer.status_code != 429:
        seen.wrong.append(f"{example}: {answer.status_code} {answer.text[:300]}")


async def _trouble(server: Server, seen: Seen, started: float, seconds: float) -> None:
    """Kill the writer twice; fill the disk in between."""

    async def at(share: float) -> None:
        await asyncio.sleep(max(0.0, started + share * seconds - time.monotonic()))

    ballast = server.store.parent / "disk/ballast"
    await at(0.25)
    seen.note(started, f"killed the trace writer, {_kill_writers(server)} process")
    await at(0.45)
    with ballast.open("wb") as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    seen.note(started, "the disk is full")
    await at(0.6)
    ballast.unlink()
    seen.note(started, "there is room again")
    await at(0.75)
    seen.note(started, f"killed the trace writer, {_kill_writers(server)} process")


def _processes(server: Server) -> dict[str, psutil.Process]:
    """The server's processes by what they are; the writers were detached from it."""
    family = [psutil.Process(server.process.pid)]
    family += family[0].children(recursive=True)
    found = {}
    for process in family:
        with suppress(psutil.Error):
            name = process.name()
            found["server" if process.pid == server.process.pid else name] = process
    for process in _writers(server):
        found["writer"] = process
    return found


def _writers(server: Server) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "moescope.tracer.writer" in words and str(server.store) in words[-1]:
            found.append(process)
    return found


def _kill_writers(server: Server) -> int:
    writers = _writers(server)
    for process in writers:
        process.kill()
    return len(writers)


async def _weigh(server: Server, seen: Seen, at: float) -> None:
    for name, process in _processes(server).items():
        with suppress(psutil.Error):
            mib = process.memory_full_info().uss / 2**20
            seen.memory.setdefault(name, []).append((at, mib))


def _check_store(store: Path, seen: Seen) -> None:
    """Every claim about steering and accounting, from the store alone."""
    seen.wrong += [f"verify: {problem}" for problem in verify_store(store)]
    con = open_store(store)
    requests = con.sql(
        "SELECT example_id, request_id, tokens, complete FROM requests WHERE run = 'soak'"
    ).fetchall()
    masks = con.sql(
        "SELECT example_id, list(DISTINCT coalesce(t.mask, 'none')), "
        "list(DISTINCT {'mask': t.mask, 'expert': expert}) "
        "FROM routing AS t JOIN requests USING (request_id) WHERE run = 'soak' GROUP BY example_id"
    ).fetchall()
    there = {example: (tokens, complete) for example, _, tokens, complete in requests}
    if len(there) != len(requests):
        seen.wrong.append(f"{len(requests) - len(there)} requests are there twice")
    for example, found, chosen in masks:
        said, _ = seen.answers.get(example, (None, 0))
        # A request has one version of its own mask from start to end; the global one may change.
        if said is not None and found != [said]:
            seen.wrong.append(f"{example}: answered {said}, its rows say {found}")
        seen.wrong += [
            f"{example}: expert {pair['expert']} is off in {pair['mask']} and was chosen"
            for pair in chosen
            if pair["expert"] in seen.experts.get(pair["mask"], ())
        ]
    short = [
        example
        for example, (tokens, complete) in there.items()
        if complete and example in seen.answers and tokens != seen.answers[example][1]
    ]
    seen.wrong += [f"{example} is complete with {there[example][0]} rows" for example in short]
    writers = read_writers(store)
    lost = sum(each.dropped_requests + each.unfinished_requests for each in writers)
    missing = seen.answers.keys() - there.keys()
    if len(missing) > lost:
        seen.wrong.append(f"{len(missing)} answered requests are gone, {lost} are counted as lost")
    incomplete = sum(not complete for _, complete in there.values())
    rows = sum(each.rows for each in writers)
    dropped = sum(each.dropped_rows for each in writers)
    console.print(
        f"{len(seen.answers):,} answered requests: {len(missing):,} not in the store, {lost:,} "
        f"counted as lost; {len(there):,} in the store, {incomplete:,} of them incomplete\n"
        f"{rows:,} rows, {dropped:,} counted as dropped, by {len(writers)} writers "
        f"({', '.join(each.state for each in writers)})"
    )


def _check_memory(seen: Seen) -> None:
    for name, samples in sorted(seen.memory.items()):
        end = samples[-1][0]
        if end < 30:
            continue
        early, late = (
            statistics.median([mib for at, mib in samples if low * end <= at <= high * end] or [0])
            for low, high in ((0.1, 0.25), (0.85, 1.0))
        )
        if not early:
            continue
        console.print(f"memory of {name}: {early:,.0f} MiB after a fifth, {late:,.0f} at the end")
        if late > early * GROWTH + GROWTH_MIB:
            seen.wrong.append(f"{name} grew from {early:,.0f} to {late:,.0f} MiB")


if __name__ == "__main__":
    main()
