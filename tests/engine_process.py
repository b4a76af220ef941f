"""Engines in processes of their own, several at a time: tests start them, and compare what came.

    answer = finish(start(job, **environment))

A job is JSON: `model` and `options` of `vllm.LLM`, `prompts` (token ids), and `rounds`, each traced
into a store of its own:

    store, masks (that requests may name), global (mask or None),
    requests (for each prompt: `wishes` of TraceRequest, `sampling` of SamplingParams)
    comes    global mask that comes while all requests run, after STEPS, and goes after as many more

With `every_rank`, tensor-parallel rank N > 0 is traced too, into the folder `STORE-rankN`.

The answer has the `generated` token ids of every round, vLLM's counts of `drafts`, and whether
load balancing `moved` experts.
"""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch

ANSWER, STEPS = "answer: ", 8
# Where a process finds this module, as its workers must for `Collectives`.
PYTHONPATH = os.pathsep.join(
    [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)
# One thread: more of them would wait for one another while other engines run.
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}


def start(job, **environment):
    # Files and no pipes: another process may be waited for while this one writes.
    given, output, errors = (tempfile.TemporaryFile("w+") for _ in range(3))  # noqa: SIM115
    given.write(json.dumps(job))
    given.seek(0)
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=given,
        stdout=output,
        stderr=errors,
        env=os.environ | {"PYTHONPATH": PYTHONPATH} | environment,
    )
    return process, output, errors


def finish(started):
    process, output, errors = started
    try:
        status = process.wait(timeout=600)
    finally:
        process.kill()
    for file in (output, errors):
        file.seek(0)
    # vLLM's processes say on one what went wrong, and on the other that something did.
    assert status == 0, f"{output.read()[-20_000:]}\n{errors.read()[-20_000:]}"
    line = next(line for line in output if line.startswith(ANSWER))
    return json.loads(line.removeprefix(ANSWER))


class Collectives:
    """A worker extension: what vLLM 0.32's CPU communicator lacks for data-parallel experts.

    `CpuCommunicator` inherits `all_gatherv` and `reduce_scatterv`, which raise NotImplementedError,
    and the dispatch of tokens between replicas calls both. Here they are, over gloo.
    """


def _all_gatherv(self, input_, dim=0, sizes=None):
    if isinstance(input_, list):
        return [_all_gatherv(self, each, dim, sizes) for each in input_]
    assert dim == 0
    sizes = sizes or [len(input_)] * self.world_size
    padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
    padded[: len(input_)] = input_
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded, group=self.cpu_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _reduce_scatterv(self, input_, dim=0, sizes=None):
    assert dim == 0
    sizes = sizes or [len(input_) // self.world_size] * self.world_size
    whole = input_.clone()
    torch.distributed.all_reduce(whole, group=self.cpu_group)
    start = sum(sizes[: self.rank_in_group])
    return whole[start : start + sizes[self.rank_in_group]]


if os.environ.get("ENGINE_PROCESS_COLLECTIVES"):
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator.all_gatherv = _all_gatherv
    CpuCommunicator.reduce_scatterv = _reduce_scatterv


# What runs in the workers: sent by value, so these import what they need.


def record_too(worker, store):
    """Let a rank that does not record do so, into a store of its own."""
    from dataclasses import replace

    from vllm.distributed.parallel_state import get_tp_group

    from moescope.tracer.settings import load_settings

    rank, tracer = get_tp_group().rank_in_group, worker.model_runner.moescope
    if rank:
        place = tracer._place
        tracer._place = replace(place, records=True)
        tracer.recorder.detach()
        tracer.attach(f"{store}-rank{rank}", load_settings())
        tracer._place = place


def physical_experts(worker):
    """Which expert lies where: [layers, physical experts] of every balanced model."""
    state = getattr(worker.model_runner, "eplb_state", None)
    models = [] if state is None else state.model_states.values()
    return [model.physical_to_logical_map.tolist() for model in models]


def run(job):
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    from moescope.tracer import Mask, TraceRequest, masks, steer, trace

    given = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 64,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }
    llm = LLM(model=job["model"], **given | job["options"])
    if job["options"].get("pipeline_parallel_size", 1) > 1 and current_platform.is_cpu():
        # vLLM 0.32 allocates what later stages receive in a dummy run, and eager CPU engines run
        # none.
        llm.collective_rpc("execute_dummy_batch")
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    every_rank = job.get("every_rank", False)
    generated, placed = [], llm.collective_rpc(physical_experts) if every_rank else None
    for each in job["rounds"]:
        named = [Mask.model_validate(mask) for mask in each.get("masks", [])]
        whole = Mask.model_validate(each["global"]) if each.get("global") else None
        params = [
            SamplingParams(
                **{"temperature": 0, "ignore_eos": True} | request["sampling"],
                extra_args=TraceRequest(**request["wishes"]).extra_args(),
            )
            for request in each["requests"]
        ]
        with trace(llm, store=each["store"]):
            if every_rank:
                llm.collective_rpc(record_too, args=(each["store"],))
            with (
                masks(llm, *named) if named else nullcontext(),
                steer(llm, whole) if whole else nullcontext(),
            ):
                llm.enqueue(prompts, params, use_tqdm=False)
                if each.get("comes"):
                    _step(llm)
                    with steer(llm, Mask.model_validate(each["comes"])):
                        _step(llm)
                outputs = llm.wait_for_completion(use_tqdm=False)
        generated.append([list(output.outputs[0].token_ids) for output in outputs])
    drafts = {
        metric.name.removeprefix("vllm:spec_decode_num_"): metric.value
        for metric in llm.get_metrics()
        if metric.name.startswith("vllm:spec_decode_num_") and hasattr(metric, "value")
    }
    moved = every_rank and llm.collective_rpc(physical_experts) != placed
    return {"generated": generated, "drafts": drafts, "moved": moved}


def _step(llm):
    for _ in range(STEPS):
        llm.llm_engine.step()


if __name__ == "__main__":
    # A line of its own: vLLM's processes write here too.
    print("\n" + ANSWER + json.dumps(run(json.load(sys.stdin))), flush=True)
