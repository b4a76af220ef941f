"""On a GPU, with CUDA graphs, torch.compile and both model runners as vLLM sets them by default.

VLLM_USE_V2_MODEL_RUNNER=0 pytest tests/gpu     the first runner; without it, the default one
"""

import os
import time

import numpy as np
import pytest
from engines import as_prompts, traced_rows

from moescope.tracer import Mask, TraceRequest, masks, trace

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

NUM_TOKENS = 24
SECOND_RUNNER = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "0"


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    os.environ["MOESCOPE_STEER"] = "on"
    from vllm import LLM

    from moescope.clients.specimen import make_specimen

    model = tmp_path_factory.mktemp("model") / "qwen3_moe"
    make_specimen(model, "qwen3_moe")
    return LLM(
        str(model),
        dtype="bfloat16",
        max_model_len=1024,
        gpu_memory_utilization=0.02,
        kv_cache_memory_bytes=1 << 30,
        enable_return_routed_experts=SECOND_RUNNER,  # which the first one can't
        max_num_seqs=64,
    )


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(7)
    return [rng.integers(10, 900, 5 + 7 * i % 200).tolist() for i in range(64)]


def sampling(index, **wishes):
    from vllm import SamplingParams

    wishes = TraceRequest(example_id=f"{index}", **wishes)
    return SamplingParams(
        max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, extra_args=wishes.extra_args()
    )


@pytest.mark.parametrize("few_rows", [0, 256])
def test_a_slow_copy_is_not_overtaken_by_the_next_steps(
    llm, prompts, tmp_path, monkeypatch, few_rows
):
    """Every copy into the ring takes longer than several steps; rows of 256 need none."""
    from moescope.tracer import side_stream
    from moescope.tracer.side_stream import SideStream

    monkeypatch.setattr(side_stream, "_FEW_ROWS", few_rows)
    copy = SideStream.copy

    def slow_copy(self, *args):
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(20_000_000)
        return copy(self, *args)

    monkeypatch.setattr(SideStream, "copy", slow_copy)
    params = [sampling(i, trace=i % 3 > 0) for i in range(64)]
    with trace(llm, store=tmp_path):
        outputs = llm.generate(as_prompts(prompts), params, use_tqdm=False)
    rows = traced_rows(tmp_path)
    assert len(rows) == 42
    for key, (tokens, experts, _) in rows.items():
        output = outputs[int(key)].outputs[0]
        assert tokens == prompts[int(key)] + list(output.token_ids)[:-1]
        if SECOND_RUNNER:
            theirs = np.asarray(output.routed_experts)[: len(experts)]
            assert (np.sort(theirs, -1) == np.sort(experts[: len(theirs)], -1)).all()


@pytest.mark.skipif(not SECOND_RUNNER, reason="vLLM's own capture needs the second runner")
def test_traced_experts_are_those_that_vllm_captures_itself(llm, prompts, tmp_path):
    params = [sampling(i) for i in range(64)]
    with trace(llm, store=tmp_path):
        outputs = llm.generate(as_prompts(prompts), params, use_tqdm=False)
    rows = traced_rows(tmp_path)
    compared = 0
    for index, output in enumerate(outputs):
        tokens, experts, weights = rows[f"{index}"]
        assert tokens == prompts[index] + list(output.outputs[0].token_ids)[:-1]
        theirs = np.asarray(output.outputs[0].routed_experts)
        if getattr(output, "prompt_routed_experts", None) is not None:
            theirs = np.concatenate([output.prompt_routed_experts, theirs])
        count = min(len(theirs), len(experts))
        assert count >= len(prompts[index])
        same = np.sort(theirs[:count], -1) == np.sort(experts[:count], -1)
        assert same.all()
        assert (np.diff(weights, axis=-1) <= 0).all()
        compared += count
    print(f"{compared} tokens compared with vLLM's own capture")


def test_masks_under_graphs_show_no_violation(llm, prompts, tmp_path):
    rng = np.random.default_rng(0)
    given = []
    for number in range(8):
        entries = []
        for layer in range(4):
            off, on = rng.choice(16, 2, replace=False).tolist()
            entries += [
                {"layer": layer, "expert": off, "action": "deactivate"},
                {"layer": layer, "expert": on, "action": "activate"},
            ]
        given.append(Mask.model_validate({"name": f"m{number}", "entries": entries}))
    params = [sampling(i, mask=f"m{i % 8}" if i % 2 else None) for i in range(64)]
    with trace(llm, store=tmp_path), masks(llm, *given):
        steered = llm.generate(as_prompts(prompts), params, use_tqdm=False)
    free = llm.generate(
        as_prompts(prompts), [sampling(i, trace=False) for i in range(64)], use_tqdm=False
    )
    for key, (_, experts, _) in traced_rows(tmp_path).items():
        index = int(key)
        if index % 2 == 0:
            continue
        for entry in given[index % 8].entries:
            chosen = (experts[:, entry.layer] == entry.expert).any(-1)
            assert chosen.all() if entry.action == "activate" else not chosen.any()
    changed = sum(
        a.outputs[0].token_ids != b.outputs[0].token_ids for a, b in zip(steered, free, strict=True)
    )
    print(f"{changed} of 64 outputs differ, 32 were steered")
    assert changed > 16


def test_the_cost_is_printed(llm, prompts, tmp_path):
    rates = {"idle": [], "traced": []}
    for _ in range(5):
        for arm, times in rates.items():
            params = [sampling(i, trace=arm == "traced") for i in range(64)]
            with trace(llm, store=tmp_path, default=False):
                start = time.perf_counter()
                llm.generate(as_prompts(prompts), params, use_tqdm=False)
                times.append(time.perf_counter() - start)
    print({arm: round(float(np.median(times)), 4) for arm, times in rates.items()}, "seconds")
