"""One engine of the GPU benchmark, in a process of its own: commands in, measurements out.

    stdin    {"arm": "traced", "workload": [count, prompt, output], "seed": 3, "repeats": 1}
    fd N     {"waits": true}, when all is prepared
    stdin    {"go": true}; false if another replica could not prepare
    fd N     {"seconds": 1.84, "tokens": 36608, ...}

At first there is {"ready": ...}, and in place of an answer there may be {"error": "..."}.

Everything else that vLLM prints goes to the log. The end of stdin is the end of the engine, so
that none is left behind when the benchmark is killed.
"""

import gc
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

# The batches of the workloads, and those between: fewer graphs to capture than by default.
_GRAPH_SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
# A nonzero bias takes the tokens through the whole edit, and this one changes no logit.
_NO_BIAS = 1e-30
_NUM_MASKS, _STEERED_EXPERTS = 8, 4
_WARM_UP_STEPS = 8
_TICKS = os.sysconf("SC_CLK_TCK")


# What runs in vLLM's worker: sent by value, so these import what they need.


def look(worker: Any) -> dict[str, Any]:
    """What the tracer of a worker holds, and how far its writer is behind."""
    import torch

    tracer = getattr(worker.model_runner, "moescope", None)
    out: dict[str, Any] = {}
    if torch.cuda.is_available():
        out["allocated_bytes"] = torch.cuda.memory_allocated()
        out["reserved_bytes"] = torch.cuda.memory_reserved()
    if tracer is None or tracer.recorder is None:
        return out
    device = worker.device.type
    storages, seen, todo = {}, set(), [tracer]
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            if thing.device.type == device:
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, dict):
            todo += thing.values()
        elif isinstance(thing, list | tuple):
            todo += thing
        elif type(thing).__module__.startswith("moescope"):
            names = {*getattr(thing, "__dict__", ()), *getattr(thing, "__slots__", ())}
            # Correction biases are the model's.
            todo += [getattr(thing, name, None) for name in names - {"_biases"}]
    out["device_bytes"] = sum(storages.values())
    ring = getattr(tracer.recorder.sink, "_ring", None)
    if ring is not None:
        from moescope.tracer.ring import HEAD, TAIL

        out["ring_bytes"] = ring.nbytes
        out["behind_rows"] = ring.word(HEAD) - ring.word(TAIL)
        out["writer"] = tracer.recorder.sink._process.pid
    return out


def save_logits(worker: Any, folder: str) -> int:
    """Let every router save its logits as SteerMoE does; returns the number of layers."""
    import itertools

    import numpy
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    modules = worker.model_runner.get_model().modules()
    runners = [module for module in modules if isinstance(module, MoERunner)]
    for runner in runners:
        steps = itertools.count()

        def saving(
            hidden_states: Any,
            router_logits: Any,
            *args: Any,
            compute: Any = runner.router._compute_routing,
            layer: int = runner.layer_id,
            steps: Any = steps,
            **kwargs: Any,
        ) -> Any:
            numpy.save(f"{folder}/{layer}-{next(steps)}.npy", router_logits.float().cpu().numpy())
            return compute(hidden_states, router_logits, *args, **kwargs)

        runner.router._compute_routing = saving
    return len(runners)


# What runs here.


def open_llm(given: dict[str, Any]) -> Any:
    """The engine of these options; see `bench_gpu.Engine`."""
    from vllm import LLM

    options: dict[str, Any] = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
        "max_num_seqs": 256,
        # With the KV cache's size given, this is only what must be free at the start.
        "gpu_memory_utilization": 0.02,
        "kv_cache_memory_bytes": given["kv_cache_bytes"],
        "hf_overrides": {"num_hidden_layers": given["layers"]},
    }
    if given["tensor_parallel"] > 1:
        options["tensor_parallel_size"] = given["tensor_parallel"]
    if given["kind"] == "capture":
        options["enable_return_routed_experts"] = True
    if given["kind"] == "steermoe":
        options |= {"max_num_seqs": 1, "enforce_eager": True}
    if not (given["cpu"] or given["kind"] == "steermoe"):
        options["compilation_config"] = {"cudagraph_capture_sizes": _GRAPH_SIZES}
    if given["cpu"]:
        options |= {"dtype": "float32", "enforce_eager": True, "attention_backend": "CPU_MLA"}
        options |= {"max_num_batched_tokens": 1024}
    return LLM(given["config"], **options)


@contextmanager
def around(llm: Any, arm: str, store: Path) -> Iterator[None]:
    """What an arm puts around `llm.generate`."""
    with ExitStack() as stack:
        if arm in ("traced", "tenth", "both", "drop"):
            from moescope.tracer import trace

            settings = {"policy": "drop", "ring_mib": 1} if arm == "drop" else {}
            stack.enter_context(trace(llm, store=store, **settings))
        if arm in ("masks", "both"):
            from moescope.tracer import masks

            stack.enter_context(masks(llm, *_harmless_masks(llm)))
        yield


def _harmless_masks(llm: Any) -> list[Any]:
    from moescope.tracer import Mask
    from moescope.tracer.worker import call_workers

    facts = call_workers(llm, "status")[0]["facts"]
    entries = [
        {"layer": layer, "expert": expert, "action": "bias", "value": _NO_BIAS}
        for layer in facts["moe_layers"]
        for expert in range(_STEERED_EXPERTS)
    ]
    fields = [{"name": f"m{number}", "entries": entries} for number in range(_NUM_MASKS)]
    return [Mask.model_validate(one) for one in fields]


def _params(arm: str, index: int, output: int, traced: bool = True) -> Any:
    from vllm import SamplingParams

    wishes: dict[str, Any] = {}
    if not traced or (arm == "tenth" and index % 10):
        wishes["moescope_trace"] = "off"
    if arm in ("masks", "both"):
        wishes["moescope_mask"] = f"m{index % _NUM_MASKS}"
    return SamplingParams(
        max_tokens=output,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        extra_args=wishes or None,
    )


def warm_up(llm: Any, arm: str, batch: list[Any], output: int) -> None:
    """Run a batch for a few steps, untraced: the engine waited while others ran."""
    output = min(output, _WARM_UP_STEPS)
    params = [_params(arm, index, output, traced=False) for index in range(len(batch))]
    llm.generate(batch, params, use_tqdm=False)


def measure(
    llm: Any,
    given: dict[str, Any],
    command: dict[str, Any],
    saved: Path,
    wait: Callable[[], None],
) -> dict[str, Any]:
    """Run one timed unit; `wait` returns when it may begin."""
    import numpy as np

    arm, repeats = command["arm"], command["repeats"]
    count, prompt, output = command["workload"]
    rng = np.random.default_rng([command["seed"], command.get("rank", 0)])
    # New ones in every round, the same for all arms of it: none is in a prefix cache.
    ids = rng.integers(10, min(given["vocab"], 30_000), (repeats + 1, count, prompt)).tolist()
    first, *batches = [[{"prompt_token_ids": one} for one in batch] for batch in ids]
    params = [_params(arm, index, output) for index in range(count)]
    llm.reset_prefix_cache()
    gc.collect()
    with tempfile.TemporaryDirectory(dir=given["folder"]) as folder:
        store = Path(folder) / "traces"
        with around(llm, arm, store):
            if arm != "steermoe":  # which saves what it runs
                warm_up(llm, arm, first, output)
            before = llm.collective_rpc(look)[0]
            pid = before.pop("writer", None)
            cpu = 0.0 if pid is None else _cpu_seconds(pid)
            with _stopped(pid if arm == "drop" else None):
                wait()
                start = time.perf_counter()
                for batch in batches:
                    llm.generate(batch, params, use_tqdm=False)
                seconds = time.perf_counter() - start
            out = {"seconds": seconds, "tokens": repeats * count * (prompt + output - 1)}
            if pid is not None:
                from moescope.tracer.session import settle

                out |= llm.collective_rpc(look)[0]
                settle(llm)
                out["to_disk_s"] = time.perf_counter() - start - seconds
                out["writer_cpu_s"] = _cpu_seconds(out.pop("writer")) - cpu
                out["writer_memory_bytes"] = _own_memory(pid)
        if pid is not None:
            out |= _stored(store, arm, repeats, count, prompt + output - 1)
    if arm == "steermoe":
        out["files"] = sum(1 for _ in saved.iterdir())
        shutil.rmtree(saved)
        saved.mkdir()
    return out


def _stored(store: Path, arm: str, repeats: int, count: int, tokens: int) -> dict[str, Any]:
    """What the store says of itself, and whether every token is accounted for."""
    from moescope.tracer.store import read_writers

    [counters] = read_writers(store)
    traced = repeats * len(range(0, count, 10 if arm == "tenth" else 1))
    counted = counters.rows + counters.dropped_rows + counters.dropped_requests * tokens
    return {
        "rows": counters.rows,
        "dropped_rows": counters.dropped_rows,
        "dropped_requests": counters.dropped_requests,
        "incomplete_requests": counters.incomplete_requests,
        "bytes": counters.bytes,
        "exact": counted == traced * tokens,
    }


@contextmanager
def _stopped(pid: int | None) -> Iterator[None]:
    """A writer that does nothing, as when its disk hangs."""
    if pid is None:
        yield
        return
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _own_memory(pid: int) -> int:
    """Bytes of a process that it shares with no other (the ring is shared)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("RssAnon:")]
    return int(line.split()[1]) << 10


def main() -> None:
    """Start, then answer commands until there are no more."""
    given = json.loads(sys.argv[1])
    os.sched_setaffinity(0, given["cores"])
    with os.fdopen(given["answers"], "w") as answers:

        def answer(**fields: Any) -> None:
            print(json.dumps(fields), file=answers, flush=True)

        start = time.perf_counter()
        llm = open_llm(given)
        saved = Path(given["folder"]) / "logits"
        saved.mkdir(exist_ok=True)
        if given["kind"] == "steermoe":
            llm.collective_rpc(save_logits, args=(str(saved),))
        seconds = round(time.perf_counter() - start, 1)
        answer(ready=True, start_s=seconds, **llm.collective_rpc(look)[0])

        def wait() -> None:
            answer(waits=True)
            if not (said := sys.stdin.readline()):
                sys.exit()
            if not json.loads(said)["go"]:
                raise RuntimeError("another replica could not prepare")

        while line := sys.stdin.readline():
            try:
                answer(**measure(llm, given, json.loads(line), saved, wait))
            except Exception:
                traceback.print_exc()
                answer(error=traceback.format_exc(limit=-3)[-2000:])
        llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
