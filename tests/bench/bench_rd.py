"""`make bench BENCH=rd`: risk differences, their intervals, and SteerMoE's loop on real routing.

ESFT's published routing, tiled to a number of tokens; half of its domains are one condition and
half the other, so that every token counts. Wall time is what an idle machine takes; CPU time is
also told, since a machine that does something else besides makes wall time meaningless.
"""

import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from moescope.analysis.aggregate import FILE_NAME, build_aggregate
from moescope.analysis.inference import (
    Stratum,
    bootstrap_differences,
    bootstrap_interval,
    permutation_p,
)
from moescope.analysis.rd import risk_difference
from moescope.tracer.store import StoreWriter, committed_files, read_manifest

POSITIVE_DOMAINS = {"intent", "law"}
SIDES = {"positive": "positive", "negative": "negative", "segment": "prompt"}

console = Console(width=200)


def tile(esft: Path, folder: Path, copies: int) -> tuple[Path, int]:
    """A store of `copies` times ESFT's requests, each copy under names of its own."""
    tokens, requests = (
        pa.concat_tables(map(pq.read_table, files)).unify_dictionaries().combine_chunks()
        for files in committed_files(esft)
    )
    sides = [
        "positive" if domain in POSITIVE_DOMAINS else "negative"
        for domain in requests["condition"].to_pylist()
    ]
    requests = requests.set_column(3, "condition", pa.array(sides))
    names, column = requests["request_id"].to_pylist(), tokens["request_id"].chunk(0)
    known = column.dictionary.to_pylist()
    store = folder / f"tiled-{copies}"
    with StoreWriter(store, read_manifest(esft)) as writer:
        for copy in range(copies):
            ids = pa.array([f"{copy}-{name}" for name in names])
            renamed = pa.DictionaryArray.from_arrays(
                column.indices, pa.array([f"{copy}-{name}" for name in known])
            )
            writer.commit(
                tokens.set_column(0, "request_id", renamed),
                requests.set_column(0, "request_id", ids).set_column(2, "example_id", ids),
            )
    return store, copies * tokens.num_rows


def timed(rounds: int, work: Callable[[], Any]) -> tuple[list[float], float]:
    """Seconds of each round, and the median of their CPU seconds."""
    wall, cpu = [], []
    for _ in range(rounds):
        gc.collect()
        start, used = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    return wall, statistics.median(cpu)


def bench_rd(esft: Path, rounds: int, copies: tuple[int, ...] = (31, 301)) -> None:
    """Everything about risk differences that has a goal; a line as soon as it is known."""
    folder = Path(tempfile.mkdtemp())
    try:
        _bench(folder, esft, rounds, copies)
    finally:
        shutil.rmtree(folder)  # ten million tokens are 3.5 GB
    console.print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


def _bench(folder: Path, esft: Path, rounds: int, copies: tuple[int, ...]) -> None:
    row("what", "tokens", "seconds: median", "min", "max", "CPU seconds", "peak MiB")
    for count in copies:
        store, tokens = tile(esft, folder, count)
        few = rounds if count < 100 else 1
        for options in _rd_options():
            measured(f"RD, {_name(options)}", f"{tokens:,}", *alone(store, options, few))
        measured(
            "building the aggregate", f"{tokens:,}", *timed(1, partial(build_aggregate, store))
        )
        for options in _rd_options():
            what = f"RD of the aggregate, {_name(options)}"
            measured(what, f"{tokens:,}", *alone(store, options, few))
    rng = np.random.default_rng(0)
    rates = rng.binomial(150, 0.1, (2, 2000, 1664)) / 150
    ones = np.ones(2000)
    pairs = [Stratum(rates[0], ones, rates[1], ones, 2000)]
    draw = np.random.default_rng(1)

    def bootstrap() -> None:
        bootstrap_interval(pairs, bootstrap_differences(pairs, 2000, draw))

    size = "2,000 pairs x 1,664"
    measured("2,000 resamples and intervals", size, *timed(rounds, bootstrap))
    flips = timed(rounds, lambda: permutation_p(pairs, lambda _: pairs, 2000, 0))
    measured("2,000 sign flips", size, *flips)
    _compare_with_loop(folder / f"tiled-{copies[0]}", esft)


def row(*cells: str) -> None:
    """Print a line of the table."""
    console.print(f"{cells[0]:42}" + "".join(f"{cell:>20}" for cell in cells[1:]))


def measured(what: str, size: str, wall: list[float], cpu: float, peak: str = "") -> None:
    """Print what `timed` gave."""
    times = (statistics.median(wall), min(wall), max(wall), cpu)
    row(what, size, *(f"{seconds:.2f}" for seconds in times), peak)


def _rd_options() -> list[dict[str, Any]]:
    return [
        {"estimator": estimator, "gate_mass": gate_mass, "resamples": 0}
        for estimator in ("token", "sequence")
        for gate_mass in (False, True)
    ]


def _name(options: dict[str, Any]) -> str:
    return options["estimator"] + (", gate mass" if options["gate_mass"] else "")


def _work(store: Path, options: dict[str, Any]) -> Callable[[], Any]:
    return lambda: risk_difference(store, **SIDES, **options)


def alone(store: Path, options: dict[str, Any], rounds: int) -> tuple[list[float], float, str]:
    """What `timed` gives for this risk difference in a process of its own, and its peak memory."""
    code = f"import bench_rd; bench_rd.report({str(store)!r}, {options!r}, {rounds})"
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, stdout=subprocess.PIPE, text=True, check=True
    )
    wall, cpu, peak = json.loads(done.stdout)
    return wall, cpu, f"{peak:,.0f}"


def report(store: str, options: dict[str, Any], rounds: int) -> None:
    """Print what `alone` returns."""
    wall, cpu = timed(rounds, _work(Path(store), options))
    # Of this program alone; getrusage would count what the parent had before it.
    lines = Path("/proc/self/status").read_text().splitlines()
    [most] = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    print(json.dumps([wall, cpu, int(most) / 1024]))


def steermoe_loop(
    ids: np.ndarray[Any, Any], positive: np.ndarray[Any, Any], num_experts: int
) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Counts as SteerMoE's code makes them: a Python loop over tokens and layers.

    Written from its description (arXiv 2509.09660): of each token and layer, the counters of the
    chosen experts under the token's condition go up by one. Returns counts
    [2, layers, experts] and the tokens of both conditions.
    """
    counts = np.zeros((2, ids.shape[1], num_experts), np.int64)
    tokens = [0, 0]
    for token in range(len(ids)):
        side = 0 if positive[token] else 1
        tokens[side] += 1
        for layer in range(ids.shape[1]):
            counts[side, layer, ids[token, layer]] += 1
    return counts, tokens


def _compare_with_loop(store: Path, esft: Path) -> None:
    """The loop over ESFT's own tokens and ours over those and over `store`, per token.

    The loop takes its ids from memory; ours reads the store. The numbers must be the same.
    """
    once, tokens = tile(esft, Path(tempfile.mkdtemp()), 1)
    facts = read_manifest(once).shape
    [[file], [requests]] = committed_files(once)
    sides = pq.read_table(requests, columns=["request_id", "condition"]).to_pydict()
    side_of = dict(zip(sides["request_id"], sides["condition"], strict=True))
    read = pq.read_table(file, columns=["request_id", "expert_ids"])
    positive = np.array([side_of[name] == "positive" for name in read["request_id"].to_pylist()])
    ids = read["expert_ids"].combine_chunks().flatten().to_numpy()
    ids = ids.reshape(tokens, len(facts.layers), facts.top_k)
    found: list[Any] = []
    loop = timed(1, lambda: found.append(steermoe_loop(ids, positive, facts.num_experts)))
    measured("SteerMoE's loop", f"{tokens:,}", *loop)
    options = {"estimator": "token", "resamples": 0}
    counts, sizes = found[0]
    for expert in risk_difference(once, **SIDES, **options).to_pylist():
        at = facts.layers.index(expert["layer"])
        a1, a2 = (int(counts[side, at, expert["expert"]]) for side in (0, 1))
        assert (expert["a1"], expert["a2"]) == (a1, a2)
        assert expert["rd"] == a1 / sizes[0] - a2 / sizes[1]
    (store / FILE_NAME).unlink(missing_ok=True)
    times = {"from tokens": timed(3, _work(store, options))}
    build_aggregate(store)
    times["from the aggregate"] = timed(3, _work(store, options))
    copies = len(committed_files(store)[0])
    for name, (wall, cpu) in times.items():
        ratio = copies * loop[0][0] / statistics.median(wall)
        console.print(
            f"{name}, {copies * tokens:,} tokens: {ratio:,.0f} times as fast as the loop "
            f"({copies * loop[1] / cpu:,.0f} by CPU time), and equal to the bit"
        )
