"""What tracing costs on a GPU at a real shape: two engines on one card, used in turn.

    python tests/bench/bench_gpu.py CONFIG_FOLDER --rounds 6

One engine runs without moescope, the other with it; both are loaded at once and the arms
alternate, so that neither the process nor the moment decides. Weights are dummies: speed needs
the shape only. Prints a line of JSON an arm and workload.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORKLOADS = {"prefill": (128, 512, 1), "mixed": (256, 128, 64), "decode": (256, 16, 128)}
ARMS = ("plain", "idle", "null", "traced", "tenth")


def engine(config: str) -> None:
    """Serve commands from standard input: ARM WORKLOAD -> seconds."""
    import numpy as np
    from vllm import LLM, SamplingParams

    llm = LLM(
        config,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_seqs=256,
        gpu_memory_utilization=0.43,
        enable_prefix_caching=False,
    )
    rng = np.random.default_rng(0)
    prompts = {
        workload: [{"prompt_token_ids": rng.integers(10, 30_000, n).tolist()} for _ in range(count)]
        for workload, (count, n, _) in WORKLOADS.items()
    }
    print("ready", flush=True)
    for line in sys.stdin:
        arm, workload = line.split()
        tokens = WORKLOADS[workload][2]

        def sample(index: int, tokens: int = tokens, arm: str = arm) -> SamplingParams:
            off = {"moescope_trace": "off"} if arm == "tenth" and index % 10 else None
            return SamplingParams(
                max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, extra_args=off
            )

        params = [sample(index) for index in range(len(prompts[workload]))]

        def timed(workload: str = workload, params: list[SamplingParams] = params) -> float:
            start = time.perf_counter()
            llm.generate(prompts[workload], params, use_tqdm=False)
            return time.perf_counter() - start

        if arm in ("plain", "idle"):
            seconds = timed()
        else:
            from moescope.tracer import trace

            with tempfile.TemporaryDirectory() as folder:
                store = None if arm == "null" else Path(folder) / "traces"
                with trace(llm, store=store):
                    seconds = timed()
        print(json.dumps(seconds), flush=True)


def start(config: str, plugins: str) -> subprocess.Popen[str]:
    """An engine in a process of its own."""
    return subprocess.Popen(
        [sys.executable, __file__, config, "--engine"],
        env=os.environ | {"VLLM_PLUGINS": plugins},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen[str]) -> str:
    """The next line that is an answer of ours, and not vLLM's chatter."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "ready" or line.strip().replace(".", "").isdigit():
            return line.strip()
    sys.exit("the engine ended")


def main() -> None:
    """Run the arms in turn and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="folder with a config.json")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.engine:
        engine(given.config)
        return
    plain = start(given.config, "")
    answer(plain)
    ours = start(given.config, "moescope")
    answer(ours)
    for workload, (count, prompt, output) in WORKLOADS.items():
        times: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for index in range(given.rounds + 1):
            for arm in ARMS[index % len(ARMS) :] + ARMS[: index % len(ARMS)]:
                process = plain if arm == "plain" else ours
                assert process.stdin is not None
                process.stdin.write(f"{arm} {workload}\n")
                process.stdin.flush()
                seconds = float(answer(process))
                if index:
                    times[arm].append(seconds)
        for arm in ARMS:
            ratios = [p / t for p, t in zip(times["plain"], times[arm], strict=True)]
            rate = count * (prompt + output - 1) / statistics.median(times[arm])
            result = {
                "workload": workload,
                "arm": arm,
                "tokens_per_s": round(rate),
                "ratio": round(statistics.median(ratios), 4),
                "min": round(min(ratios), 4),
                "max": round(max(ratios), 4),
            }
            print(json.dumps(result), flush=True)
    for process in (plain, ours):
        process.kill()


if __name__ == "__main__":
    main()
