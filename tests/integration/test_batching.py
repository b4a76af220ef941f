"""However the engine batches, chunks, preempts or compiles: the same rows.

On Qwen3-MoE, since vLLM's latent attention on a CPU does not do chunked prefill.
"""

import numpy as np
import pytest
from engines import as_prompts, open_engine, traced_rows

from moescope.tracer import TraceRequest, trace

pytestmark = pytest.mark.engine

MAX_TOKENS = 16


def trace_all(llm, prompts, store):
    """Trace every prompt with its index as example; returns the generated token ids."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            max_tokens=MAX_TOKENS,
            temperature=0,
            ignore_eos=True,
            extra_args=TraceRequest(example_id=f"{i}").extra_args(),
        )
        for i in range(len(prompts))
    ]
    with trace(llm, store=store):
        outputs = llm.generate(as_prompts(prompts), params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def assert_same(store, expected_store):
    """Equal keys, tokens and routing; float noise may swap experts whose scores nearly tie."""
    got, expected = traced_rows(store), traced_rows(expected_store)
    assert got.keys() == expected.keys()
    compared = differ = 0
    for key, (tokens, experts, weights) in expected.items():
        other_tokens, other_experts, other_weights = got[key]
        assert other_tokens == tokens, key
        same = (np.sort(experts, -1) == np.sort(other_experts, -1)).all(-1)
        compared += same.size
        differ += (~same).sum()
        # Weights stand in descending order, so even a swapped near-tie has almost equal ones.
        np.testing.assert_allclose(other_weights, weights, atol=2e-3)
    assert compared > 10_000
    assert differ <= 0.001 * compared


@pytest.fixture(scope="module")
def alone(specimen, prompts, tmp_path_factory):
    """The store of one request at a time, which nothing can mix up."""
    store = tmp_path_factory.mktemp("alone")
    with open_engine(specimen("qwen3_moe"), max_num_seqs=1) as llm:
        trace_all(llm, prompts, store)
    return store


def test_the_reference_has_every_row(alone, prompts):
    rows = traced_rows(alone)
    assert len(rows) == 64
    for key, (tokens, _, _) in rows.items():
        prompt = prompts[int(key)]
        assert tokens[: len(prompt)] == prompt
        # The last sampled token is never computed, so nothing routed it.
        assert len(tokens) == len(prompt) + MAX_TOKENS - 1


def test_64_requests_at_once(specimen, prompts, tmp_path, alone):
    with open_engine(specimen("qwen3_moe"), max_num_seqs=64) as llm:
        trace_all(llm, prompts, tmp_path)
    assert_same(tmp_path, alone)


def test_chunked_prefill_of_16_tokens(specimen, prompts, tmp_path, alone):
    options = {"max_num_batched_tokens": 16, "max_num_seqs": 8, "enable_chunked_prefill": True}
    with open_engine(specimen("qwen3_moe"), **options) as llm:
        scheduler = llm.llm_engine.vllm_config.scheduler_config
        assert (scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens) == (True, 16)
        trace_all(llm, prompts, tmp_path)
    assert_same(tmp_path, alone)


def test_forced_preemption(specimen, prompts, tmp_path, alone):
    # Room for 512 tokens of cache, where 16 running requests need up to 2,200.
    options = {"num_gpu_blocks_override": 17, "block_size": 32, "max_num_seqs": 16}
    with open_engine(specimen("qwen3_moe"), disable_log_stats=False, **options) as llm:
        trace_all(llm, prompts, tmp_path)
        preemptions = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    assert preemptions > 0
    assert_same(tmp_path, alone)


@pytest.mark.parametrize("again", [False, True], ids=["compiled", "from the compile cache"])
def test_torch_compile(specimen, prompts, tmp_path, alone, again, compile_cache):
    assert any(compile_cache.iterdir()) == again
    with open_engine(specimen("qwen3_moe"), enforce_eager=False) as llm:
        trace_all(llm, prompts, tmp_path)
    assert_same(tmp_path, alone)


@pytest.fixture(scope="module")
def compile_cache(tmp_path_factory):
    """A cache of compiled graphs that only this module fills."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("compiled")
        patch.setenv("VLLM_CACHE_ROOT", str(folder))
        yield folder
