"""On a GPU: speculating engines, FP8 weights, and eager engines, which can always be steered."""

import os
import time

import numpy as np
import pytest
from engines import as_prompts, open_engine, traced_rows
from mask_cases import mask_of, violations
from reference_routing import assert_as_near_as_rounding

from moescope.tracer import Mask, TraceRequest, masks, trace

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
OPTIONS = {
    "dtype": "bfloat16",
    "gpu_memory_utilization": 0.02,
    "kv_cache_memory_bytes": 1 << 30,
    "disable_log_stats": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from moescope.clients.specimen import make_specimen

    folder = tmp_path_factory.mktemp("model") / "qwen3_moe"
    make_specimen(folder, "qwen3_moe")
    return folder


@pytest.fixture(scope="module")
def prompts():
    """Prompts that repeat a phrase, so that drafts are found."""
    rng = np.random.default_rng(7)
    phrase = rng.integers(10, 900, 12).tolist()
    return [rng.integers(10, 900, 5 + 3 * i).tolist() + 4 * phrase for i in range(16)]


def sampling(index, tokens=40, **wishes):
    from vllm import SamplingParams

    wishes = TraceRequest(example_id=f"{index}", **wishes).extra_args()
    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, extra_args=wishes)


@pytest.mark.parametrize("eager", [True, False])
def test_drafts_in_vain_leave_no_rows(model, prompts, tmp_path, eager):
    speculative = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    speculative |= {"prompt_lookup_min": 1}
    options = OPTIONS | {"speculative_config": speculative, "enforce_eager": eager}
    with open_engine(model, **options) as llm:
        with trace(llm, store=tmp_path):
            outputs = llm.generate(as_prompts(prompts), [sampling(i) for i in range(16)])
        counts = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    drafted = counts["vllm:spec_decode_num_draft_tokens"]
    accepted = counts["vllm:spec_decode_num_accepted_tokens"]
    print(f"{accepted} of {drafted} drafts accepted")
    assert 0 < accepted < drafted
    rows = traced_rows(tmp_path)
    for index, output in enumerate(outputs):
        assert rows[f"{index}"][0] == prompts[index] + list(output.outputs[0].token_ids)[:-1]
    assert_as_near_as_rounding("speculating", model, rows)


def test_an_idle_engine_has_stored_its_last_request(model, prompts, tmp_path, monkeypatch):
    """No step follows that would see that the last rows have arrived."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("MOESCOPE_STORE", str(tmp_path / "traces"))
    monkeypatch.setenv("MOESCOPE_FLUSH_SECONDS", "0.5")
    with open_engine(model, **OPTIONS, enforce_eager=False) as llm:
        llm.generate(as_prompts(prompts), [sampling(i) for i in range(16)])
        deadline = time.monotonic() + 20
        while len(traced_rows(tmp_path / "traces")) < 16 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert len(traced_rows(tmp_path / "traces")) == 16


def test_fp8_weights_are_traced_as_vllm_captures_them(model, prompts, tmp_path):
    options = {"quantization": "fp8", "enable_return_routed_experts": True, "enforce_eager": False}
    with (
        open_engine(model, **OPTIONS | options | {"enable_prefix_caching": True}) as llm,
        trace(llm, store=tmp_path),
    ):
        outputs = llm.generate(as_prompts(prompts), [sampling(i) for i in range(16)])
    compared = 0
    for index, output in enumerate(outputs):
        _, experts, _ = traced_rows(tmp_path)[f"{index}"]
        theirs = np.asarray(output.outputs[0].routed_experts)
        if getattr(output, "prompt_routed_experts", None) is not None:
            theirs = np.concatenate([output.prompt_routed_experts, theirs])
        count = min(len(theirs), len(experts))
        assert (np.sort(theirs[:count], -1) == np.sort(experts[:count], -1)).all()
        compared += count
    print(f"{compared} tokens of an FP8 engine compared")
    assert compared > 1000


def test_masks_without_graphs(model, prompts, tmp_path):
    given = [mask_of(name, seed) for seed, name in enumerate("AB")]
    params = [sampling(i, mask=(None, "A", "B")[i % 3]) for i in range(16)]
    with (
        open_engine(model, **OPTIONS, enforce_eager=True) as llm,
        trace(llm, store=tmp_path),
        masks(llm, *(Mask.model_validate(mask) for mask in given)),
    ):
        llm.generate(as_prompts(prompts), params)
    for key, (_, experts, _) in traced_rows(tmp_path).items():
        for number, mask in enumerate(given, 1):
            assert (violations(mask, experts) == 0) == (int(key) % 3 == number)
