"""Latency over HTTP: vLLM's own server against `moescope serve`, on one card, in turn.

Requests arrive at random (Poisson), as the seed of the round says, so every arm of a round gets
the same ones at the same moments. bench_gpu.py --http starts this, once a card.
"""

import asyncio
import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from ports import free_port

PROMPT, OUTPUT = 128, 128
CPU_PROMPT, CPU_OUTPUT = 16, 16
ARMS = {"plain": "plain", "idle": "ours", "traced": "ours"}
_START_TIMEOUT_S, _WARM_UP_S = 480.0, 4.0
_FLUSH_S = "5"  # rather than 30: the end waits for it


def _end_with_parent() -> None:
    """Let this process get SIGTERM when the one that started it is gone, however it ended."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


class Server:
    """An OpenAI server: `plain` is vLLM's own, `ours` is `moescope serve`."""

    def __init__(self, kind: str, job: dict[str, Any], cores: list[int]) -> None:
        port = free_port()
        folder = Path(job["folder"])
        name = f"{job['shape']}-{job['card']}-{kind}-http"
        self.url = f"http://127.0.0.1:{port}"
        self.store = folder / f"{name}-{job['session']}"
        self.log = folder / f"{name}.log"
        options = ["--load-format", "dummy", "--skip-tokenizer-init", "--max-model-len", "1024"]
        options += ["--max-num-seqs", "256", "--gpu-memory-utilization", "0.02"]
        options += ["--kv-cache-memory-bytes", str(job["kv_cache_bytes"])]
        options += ["--hf-overrides", json.dumps({"num_hidden_layers": job["layers"]})]
        options += ["--served-model-name", "shape"]
        if job["cpu"]:
            options += ["--dtype", "float32", "--enforce-eager", "--attention-backend", "CPU_MLA"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MOESCOPE_")}
        environment |= {
            "CUDA_VISIBLE_DEVICES": str(job["card"]),
            "VLLM_CACHE_ROOT": str(folder / f"cache-{job['card']}-{kind}-http"),
            "HF_HUB_OFFLINE": "1",
        }
        address = ["--host", "127.0.0.1", "--port", str(port)]
        if kind == "plain":
            environment["VLLM_PLUGINS"] = ""
            command = ["-m", "vllm.entrypoints.openai.api_server", "--model", job["config"]]
            command += [*address, *options]
        else:
            environment.pop("VLLM_PLUGINS", None)
            environment["MOESCOPE_FLUSH_SECONDS"] = _FLUSH_S
            command = ["-m", "moescope.clients.cli", "serve", job["config"]]
            command += ["--store", str(self.store), "--masks", f"{self.store}-masks"]
            command += [*address, "--", *options]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: (os.sched_setaffinity(0, cores), _end_with_parent()),
            )

    def wait(self) -> None:
        """Return when it answers."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            if self._process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{self.log} ends: {self.log.read_text(errors='replace')[-2000:]}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)

    def stop(self, timeout_s: float) -> None:
        """Let it end by itself, then end what is left of it."""
        self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=timeout_s)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


async def load(
    url: str, seed: int, seconds: float, rate: float, size: tuple[int, int], traced: bool
) -> dict[str, Any]:
    """Send a window's requests; returns the latencies in milliseconds."""
    draw = random.Random(seed)
    arrivals, at = [], 0.0
    while (at := at + draw.expovariate(rate)) < seconds:
        arrivals.append((at, [draw.randrange(10, 900) for _ in range(size[0])]))
    headers = {"X-Trace": "on"} if traced else {}
    begun = time.perf_counter()
    timeout = aiohttp.ClientTimeout(total=seconds + 120)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as client:

        async def send(after: float, prompt: list[int]) -> list[float]:
            await asyncio.sleep(max(0.0, begun + after - time.perf_counter()))
            body = {"model": "shape", "prompt": prompt, "max_tokens": size[1], "temperature": 0}
            body |= {"ignore_eos": True, "stream": True}
            times = [time.perf_counter()]
            async with client.post(f"{url}/v1/completions", json=body, headers=headers) as answer:
                if answer.status != 200:
                    raise aiohttp.ClientError(f"{answer.status}: {await answer.text()}")
                async for line in answer.content:
                    if line.startswith(b"data: {"):
                        times.append(time.perf_counter())
            return times

        tasks = [send(after, prompt) for after, prompt in arrivals]
        answers = await asyncio.gather(*tasks, return_exceptions=True)
    took = time.perf_counter() - begun
    failures = [answer for answer in answers if isinstance(answer, BaseException)]
    times = [np.array(a) for a in answers if not isinstance(a, BaseException) and len(a) > 1]
    if failures or len(times) < len(answers):
        print(f"{len(answers) - len(times)} requests failed: {failures[:1]}", flush=True)
    if not times:
        return {"requests": 0, "failed": len(answers)}
    figures = {
        "ttft_ms": np.array([t[1] - t[0] for t in times]),
        "itl_ms": np.concatenate([np.diff(t[1:]) for t in times]),  # between events
        "tpot_ms": np.array([(t[-1] - t[1]) / (size[1] - 1) for t in times]),  # a request's mean
    }
    return {
        "requests": len(times),
        "failed": len(answers) - len(times),
        "events_per_request": round(sum(len(t) - 1 for t in times) / len(times), 1),
        "tokens_per_s": round(len(times) * size[1] / took),
        **{
            f"{name}_p{q}": round(1000 * float(np.percentile(values, q)), 3)
            for name, values in figures.items()
            for q in (50, 99)
        },
    }


def save(job: dict[str, Any], kind: str, **fields: Any) -> None:
    """Append a line to the results."""
    facts = {name: job[name] for name in ("session", "shape", "layers", "of", "card", "rate")}
    with Path(job["out"]).open("a") as file:
        file.write(json.dumps({"kind": kind, **facts, **fields}) + "\n")


def main() -> None:
    """Start both servers, then load them in turn."""
    job = json.loads(sys.argv[1])
    deadline = time.monotonic() + job["seconds"]
    size = (CPU_PROMPT, CPU_OUTPUT) if job["cpu"] else (PROMPT, OUTPUT)
    cores = job["cores"]
    if len(cores) > 4:
        os.sched_setaffinity(0, cores[-2:])
        cores = cores[:-2]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    _end_with_parent()
    servers = {kind: Server(kind, job, cores) for kind in ("plain", "ours")}
    traced_requests, tokens = 0, sum(size) - 1
    try:
        for server in servers.values():
            server.wait()
        print(f"{job['shape']}, card {job['card']}: both servers are ready", flush=True)
        arms = list(ARMS)
        for number in range(job["rounds"] + 1):  # the first warms up
            seconds = job["window_s"] if number else min(_WARM_UP_S, job["window_s"])
            if time.monotonic() + len(arms) * (seconds + 3) > deadline:
                print("no time left", flush=True)
                break
            answers = {}
            turn = number % len(arms)
            for arm in arms[turn:] + arms[:turn]:
                url, traced = servers[ARMS[arm]].url, arm == "traced"
                answer = asyncio.run(load(url, number, seconds, job["rate"], size, traced))
                answers[arm] = answer
                traced_requests += answer["requests"] if traced else 0
            if number:
                fields = {"size": f"{size[0]} in, {size[1]} out", "window_s": seconds}
                save(job, "http", round=number, arms=answers, **fields)
                p99 = {arm: answer.get("itl_ms_p99") for arm, answer in answers.items()}
                print(f"{job['shape']}: round {number}, p99 between tokens {p99} ms", flush=True)
        save(job, "http-store", **_stored(servers["ours"].store, traced_requests * tokens))
    finally:
        servers["plain"].stop(0.0)
        servers["ours"].stop(10.0)


def _stored(store: Path, expected: int) -> dict[str, int]:
    """What became of the expected rows; waits while some are on their way."""
    from moescope.tracer.store import read_writers

    deadline = time.monotonic() + 3 * float(_FLUSH_S)
    while True:
        counters = read_writers(store)
        rows, dropped = sum(c.rows for c in counters), sum(c.dropped_rows for c in counters)
        if rows + dropped >= expected or time.monotonic() > deadline:
            print(f"{rows} rows stored and {dropped} dropped of {expected}", flush=True)
            return {"rows": rows, "dropped_rows": dropped, "expected_rows": expected}
        time.sleep(0.2)


if __name__ == "__main__":
    main()
