"""`make bench`: what tracing costs an engine on this CPU, what the writer alone can do, and RD.

Every round has all arms, in random order, and ratios are taken round by round, since the speed of a
shared machine drifts; the medians are what to quote. docs/experiments.md keeps results.

    make bench                       everything
    make bench BENCH="engine"        one of: engine, writer, rd, layout
"""

import argparse
import os
import random
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from moescope.analysis.esft import import_esft
from moescope.tracer.ring import Rows
from moescope.tracer.settings import Settings
from moescope.tracer.sink import RingSink
from moescope.tracer.store import committed_files, read_manifest, read_writers

ESFT = Path(__file__).parents[3] / "shared/data/esft_routing/expert_scores.tar.xz"
ARMS = ("plain", "idle", "null sink", "traced", "global mask", "8 masks")
console = Console()


def bench_engine(rounds: int, arms: list[str]) -> None:
    """Throughput of the demo model: plain, idle, recorded, traced to disk, and under masks.

    The masks have entries that change nothing, so that the experts stay the same: removing experts
    would make the model faster.
    """
    from engines import as_prompts, open_engine
    from vllm import SamplingParams

    from moescope.clients.specimen import make_specimen
    from moescope.tracer import Mask, TraceRequest, masks, steer, trace
    from moescope.tracer.vllm_model import find_runners

    rng = np.random.default_rng(0)
    folder = Path(tempfile.mkdtemp())
    make_specimen(folder / "deepseek_v2")
    workloads = {
        "prefill 64 x 256": (as_prompts(rng.integers(10, 900, (64, 256)).tolist()), 1),
        "decode 64 x 64": (as_prompts(rng.integers(10, 900, (64, 16)).tolist()), 64),
    }
    with open_engine(folder / "deepseek_v2", max_num_seqs=64) as llm:
        [runners] = llm.apply_model(find_runners)
        wrapped = {runner.router: runner.router._compute_routing for runner in runners}
        entries = [
            {"layer": runner.layer_id, "expert": 0, "action": "bias", "value": 0.0}
            for runner in runners
        ]
        zeros = [Mask.model_validate({"name": f"m{i}", "entries": entries}) for i in range(8)]

        def run(arm: str, prompts: list[dict[str, list[int]]], max_tokens: int) -> float:
            for router, compute in wrapped.items():
                router._compute_routing = compute.__wrapped__ if arm == "plain" else compute
            params: Any = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
            params.detokenize = False

            def timed() -> float:
                start = time.perf_counter()
                llm.generate(prompts, params, use_tqdm=False)
                return time.perf_counter() - start

            if arm == "global mask":
                with steer(llm, zeros[0]):
                    return timed()
            if arm == "8 masks":
                wishes = [TraceRequest(trace=False, mask=f"m{i % 8}") for i in range(len(prompts))]
                given = [params.clone() for _ in prompts]
                for one, wish in zip(given, wishes, strict=True):
                    one.extra_args = wish.extra_args()
                params = given
                with masks(llm, *zeros):
                    return timed()
            if arm in ("plain", "idle"):
                return timed()
            with trace(llm, store=None if arm == "null sink" else folder / "traces"):
                return timed()

        table = Table("workload", "arm", "tokens/s", "ratio to plain: median", "min", "max")
        for name, (prompts, max_tokens) in workloads.items():
            tokens = sum(len(p["prompt_token_ids"]) + max_tokens - 1 for p in prompts)
            times: dict[str, list[float]] = {arm: [] for arm in arms}
            for index in range(rounds + 1):
                # No arm always follows the same other one.
                for arm in random.Random(f"{name} {index}").sample(arms, len(arms)):
                    seconds = run(arm, prompts, max_tokens)
                    if index:  # the first round warms up
                        times[arm].append(seconds)
            for arm in arms:
                ratios = [p / t for p, t in zip(times["plain"], times[arm], strict=True)]
                rate = tokens / statistics.median(times[arm])
                spread = [statistics.median(ratios), min(ratios), max(ratios)]
                table.add_row(name, arm, f"{rate:,.0f}", *(f"{ratio:.3f}" for ratio in spread))
    console.print(table)


def _esft_store(folder: Path) -> Path:
    if not ESFT.exists():
        sys.exit(f"this benchmark needs real routing: {ESFT.name} is not beside the repository")
    with tarfile.open(ESFT) as archive:
        archive.extractall(folder, filter="data")
    import_esft(folder / "results" / "expert_scores", folder / "esft")
    return folder / "esft"


def bench_writer(rounds: int) -> None:
    """Rows through the ring and the writer process to disk, on real routing."""
    import pyarrow.parquet as pq

    folder = Path(tempfile.mkdtemp())
    esft = _esft_store(folder)
    facts = read_manifest(esft)
    table = pq.read_table(committed_files(esft)[0], columns=["expert_ids", "gate_weights"])
    experts = table["expert_ids"].combine_chunks().values.to_numpy()
    weights = table["gate_weights"].combine_chunks().values.to_numpy(zero_copy_only=False)
    total, routes = table.num_rows, facts.shape.num_routes
    repeats, length = 40, 500
    rows = Rows(
        np.zeros(total, np.uint32),
        np.arange(total, dtype=np.int32) % length,
        np.arange(total, dtype=np.int32) % 32_000,
        experts.reshape(total, routes),
        weights.astype(np.float16).reshape(total, routes),
    )
    rates, cpu_rates = [], []
    for index in range(rounds):
        store = folder / f"writer-{index}"
        sink = RingSink(store, facts, Settings())
        process = psutil.Process(sink._process.pid)
        cores = sorted(os.sched_getaffinity(0))
        process.cpu_affinity(cores[:1])
        if len(cores) > 1:
            os.sched_setaffinity(0, cores[1:])
        start, cpu = time.perf_counter(), sum(process.cpu_times()[:2])
        for request in range(repeats * total // length):
            at = request * length % (total - length)
            part = rows[at : at + length]
            part.request[:], part.position[:] = request + 1, np.arange(length)
            message = {"request_id": f"r{request}", "run": "bench", "prompt_tokens": length}
            sink.send({"op": "begin", "request": request + 1} | message)
            sink.write(part)
            sink.send({"op": "finish", "request": request + 1, "lost_rows": 0})
        sink.sync()
        seconds = time.perf_counter() - start
        count = (request + 1) * length
        rates.append(count / seconds)
        cpu_rates.append(count / (sum(process.cpu_times()[:2]) - cpu))
        sink.close()
        os.sched_setaffinity(0, cores)
        [counters] = read_writers(store)
    console.print(
        f"writer on one core, {count:,} rows of real routing ({routes} experts a token): "
        f"median {statistics.median(rates):,.0f} tokens/s (min {min(rates):,.0f}, "
        f"max {max(rates):,.0f}); {statistics.median(cpu_rates):,.0f} tokens per CPU second; "
        f"{counters.bytes / counters.rows:.1f} bytes/token"
    )


def bench_rd(rounds: int) -> None:
    """Risk differences over millions of tokens of real routing (bench_rd.py)."""
    import bench_rd

    bench_rd.bench_rd(_esft_store(Path(tempfile.mkdtemp())), rounds)


def bench_layout(rounds: int) -> None:
    """Bytes and speed of several Parquet layouts of real routing (bench_layout.py)."""
    import bench_layout as layout

    layout.bench_layout(_esft_store(Path(tempfile.mkdtemp())), rounds)


def main() -> None:
    """Run the benchmarks that were asked for."""
    benches = {
        "engine": bench_engine,
        "writer": bench_writer,
        "rd": bench_rd,
        "layout": bench_layout,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benches", nargs="*", help=f"any of {', '.join(benches)}; default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--arms", help="of engine, comma-separated; default: all")
    given = parser.parse_args()
    if unknown := set(given.benches) - benches.keys():
        parser.error(f"unknown benchmark {sorted(unknown)}; there are {', '.join(benches)}")
    wanted = given.arms.split(",") if given.arms else ARMS
    if unknown := set(wanted) - set(ARMS):
        parser.error(f"--arms: no {', '.join(sorted(unknown))}; there is {', '.join(ARMS)}")
    arms = [arm for arm in ARMS if arm in {"plain", *wanted}]
    for name in given.benches or benches:
        console.rule(name)
        if name == "engine":
            bench_engine(given.rounds, arms)
        else:
            benches[name](given.rounds)


if __name__ == "__main__":
    main()
