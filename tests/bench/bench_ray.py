"""How a job on Ray scales on this machine: replicas of a tiny engine, and writers of one store.

    PYTHONPATH=tests:tests/bench .venv/bin/python tests/bench/bench_ray.py [writers|replicas] [N …]

Writers take rows of real routing as fast as they can. A shared machine's wall time says little: the
rows of a writer's CPU second are what to compare, and the load average is printed beside them.
"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
from bench import _esft_store

from moescope.tracer.ring import Rows
from moescope.tracer.settings import Settings
from moescope.tracer.sink import RingSink
from moescope.tracer.store import committed_files, read_manifest, read_writers

ROWS, LENGTH = 600_000, 500
REQUESTS = 256
ENGINE = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8"]


def bench_writers(numbers: list[int]) -> None:
    """So many writers at once, each fed by a process of its own, into one store."""
    folder = Path(tempfile.mkdtemp())
    esft = _esft_store(folder)
    facts = read_manifest(esft)
    table = pq.read_table(committed_files(esft)[0], columns=["expert_ids", "gate_weights"])
    experts, weights = (
        table[name].combine_chunks().values.to_numpy(zero_copy_only=False).reshape(len(table), -1)
        for name in ("expert_ids", "gate_weights")
    )
    context = multiprocessing.get_context("fork")
    for number in numbers:
        store, answers = folder / f"{number}-{time.time()}", context.Queue()
        arguments = (store, facts, experts, weights.astype(np.float16), answers)
        processes = [context.Process(target=_feed, args=arguments) for _ in range(number)]
        for process in processes:
            process.start()
        found = [answers.get() for _ in processes]
        for process in processes:
            process.join()
        seconds = max(end for _, end, _ in found) - min(start for start, _, _ in found)
        writers = read_writers(store)
        files, size = (sum(getattr(w, name) for w in writers) for name in ("files", "bytes"))
        print(
            f"{number} writers: {number * ROWS / seconds:,.0f} rows/s, "
            f"{ROWS * number / sum(cpu for *_, cpu in found):,.0f} rows a CPU second, "
            f"{2 * files} files, {size / (number * ROWS):.1f} bytes/row, "
            f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        )


def _feed(store, facts, experts, weights, answers) -> None:
    total = len(experts)
    numbers = np.arange(total, dtype=np.int32)
    rows = Rows(np.zeros(total, np.uint32), numbers % LENGTH, numbers % 32_000, experts, weights)
    sink = RingSink(store, facts, Settings())
    writer = psutil.Process(sink._process.pid)
    start, cpu = time.monotonic(), sum(writer.cpu_times()[:2])
    for request in range(ROWS // LENGTH):
        at = request * LENGTH % (total - LENGTH)
        part = rows[at : at + LENGTH]
        part.request[:], part.position[:] = request + 1, np.arange(LENGTH)
        said = {"request_id": f"{os.getpid()}-{request}", "run": "bench", "prompt_tokens": LENGTH}
        sink.send({"op": "begin", "request": request + 1} | said)
        sink.write(part)
        sink.send({"op": "finish", "request": request + 1, "lost_rows": 0})
    sink.sync()
    answers.put((start, time.monotonic(), sum(writer.cpu_times()[:2]) - cpu))
    sink.close()


def bench_replicas(numbers: list[int]) -> None:
    """The same job of generation by so many replicas."""
    from moescope.clients.specimen import make_specimen

    folder = Path(tempfile.mkdtemp())
    make_specimen(folder / "model", "qwen3_moe")
    generate = {"max_tokens": 128, "temperature": 0, "ignore_eos": True}
    lines = [
        {"example_id": f"e{n}", "condition": "c", "prompt": f"Lamp {n}?", "generate": generate}
        for n in range(REQUESTS)
    ]
    job = folder / "job.jsonl"
    job.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number in numbers:
        store = folder / f"{number}-{time.time()}"
        command = [
            *(sys.executable, "-m", "moescope.clients.cli", "trace", job, "--store", store),
            *("--model", folder / "model", "--ray", "local", "--replicas", number, "--", *ENGINE),
        ]
        output = subprocess.run(
            [str(part) for part in command],
            env=os.environ | {"COLUMNS": "200"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        tokens, seconds = re.search(r"([\d,]+) tokens in ([\d.]+) s", output).groups()
        rate = int(tokens.replace(",", "")) / float(seconds)
        files = 2 * sum(writer.files for writer in read_writers(store))
        print(
            f"{number} replicas: {tokens} tokens in {seconds} s, {rate:,.0f} tokens/s, "
            f"{files} files, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        )


if __name__ == "__main__":
    what = sys.argv[1:2] or ["writers", "replicas"]
    counts = [int(text) for text in sys.argv[2:]] or [1, 2, 1, 2]
    for name in what:
        {"writers": bench_writers, "replicas": bench_replicas}[name](counts)
