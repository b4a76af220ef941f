"""Engines of their own: what can't share one with other tests."""

import pytest
import torch
from engines import as_prompts, open_engine

from moescope.analysis import open_store
from moescope.tracer import trace
from moescope.tracer.errors import MoescopeError, UnsupportedModelError
from moescope.tracer.vllm_model import find_runners
from moescope.tracer.vllm_seam import install

pytestmark = pytest.mark.engine


def test_a_request_aborted_in_its_prompt_is_incomplete(specimen, prompts, tmp_path):
    from vllm import SamplingParams

    short = SamplingParams(max_tokens=6, temperature=0)
    options = {"max_num_batched_tokens": 16, "max_num_seqs": 4}
    with open_engine(specimen("qwen3_moe"), **options) as llm, trace(llm, store=tmp_path):
        [aborted] = llm.enqueue(as_prompts([prompts[60]]), short, use_tqdm=False)
        llm.llm_engine.step()
        llm.llm_engine.abort_request([aborted], internal=True)
        llm.generate(as_prompts([prompts[1]]), short, use_tqdm=False)
    complete = (
        open_store(tmp_path)
        .execute("SELECT complete, tokens < prompt_tokens FROM requests ORDER BY 1")
        .fetchall()
    )
    assert complete == [(False, True), (True, False)]


def test_a_dense_model_is_refused_with_what_to_do(tmp_path, prompts):
    from transformers import LlamaConfig, LlamaForCausalLM
    from vllm import SamplingParams

    short = SamplingParams(max_tokens=2, detokenize=False)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=1000,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    with open_engine(tmp_path / "dense", skip_tokenizer_init=True) as llm:
        with (
            pytest.raises(UnsupportedModelError, match="choose a mixture-of-experts model"),
            trace(llm, store=tmp_path / "s"),
        ):
            pass
        llm.generate(as_prompts(prompts[:1]), short, use_tqdm=False)
    assert not (tmp_path / "s").exists()


def test_routing_that_never_arrives_is_refused_at_start(specimen, prompts, tmp_path, monkeypatch):
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    with open_engine(specimen("qwen3_moe")) as llm:
        [runners] = llm.apply_model(find_runners)
        routers = {runner.layer_id: runner.router for runner in runners}
        wrapped = routers[2]._compute_routing
        # Layer 2 goes another way, as a kernel that routes inside would.
        monkeypatch.setattr(routers[2], "_compute_routing", wrapped.__wrapped__)
        with (
            pytest.raises(UnsupportedModelError, match=r"layers \[2\].*--moe-backend"),
            trace(llm, store=tmp_path / "s"),
        ):
            pass
        monkeypatch.setattr(routers[2], "_compute_routing", wrapped)
        with trace(llm, store=tmp_path / "s"):
            llm.generate(as_prompts(prompts[:1]), use_tqdm=False)
        # What says so by itself is refused while the model loads.
        monkeypatch.setattr(MoERunner, "is_monolithic", True)
        with pytest.raises(UnsupportedModelError, match=r"layer 0 .*monolithic.*--moe-backend"):
            find_runners(torch.nn.ModuleList(runners))


def test_a_vllm_without_a_symbol_is_refused_by_version(monkeypatch):
    from vllm.v1.engine.input_processor import InputProcessor

    monkeypatch.delattr(InputProcessor, "process_inputs")
    with pytest.raises(MoescopeError, match=r"supports vLLM 0\.32.*process_inputs"):
        install()
