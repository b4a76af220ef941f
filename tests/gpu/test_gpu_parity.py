"""On a GPU: traced routing against transformers on the same GPU, and against a model's own logits.

In bfloat16 two right implementations differ in the last bits of every hidden state, so experts with
nearly the same score change places. How much that is, transformers itself shows, in bfloat16 and in
float32: vLLM may differ from the former by no more than twice as much. The counts are printed.
"""

import os

import numpy as np
import pytest
from engines import as_prompts, open_engine, traced_rows
from reference_routing import assert_as_near_as_rounding

from moescope.tracer import trace

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
OPTIONS = {"dtype": "bfloat16", "gpu_memory_utilization": 0.02, "kv_cache_memory_bytes": 1 << 30}


@pytest.fixture(scope="module")
def specimen(tmp_path_factory):
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from moescope.clients.specimen import make_specimen

    def make(arch):
        folder = tmp_path_factory.mktemp(arch) / arch
        # What the attention of GPUs is made for.
        more = {"qk_nope_head_dim": 128, "v_head_dim": 128} if "deepseek" in arch else {}
        make_specimen(folder, arch, **more)
        return folder

    return make


@pytest.mark.parametrize(
    "arch", ["deepseek_v2", "deepseek_v2_group", "deepseek_v3", "qwen3_moe", "olmoe", "mixtral"]
)
def test_traced_routing_is_transformers_routing(specimen, tmp_path, arch):
    from vllm import SamplingParams

    model = specimen(arch)
    rng = np.random.default_rng(7)
    prompts = [rng.integers(10, 900, 5 + 9 * i).tolist() for i in range(16)]
    with open_engine(model, **OPTIONS) as llm, trace(llm, store=tmp_path):
        llm.generate(
            as_prompts(prompts), SamplingParams(max_tokens=12, temperature=0), use_tqdm=False
        )
    assert assert_as_near_as_rounding(arch, model, traced_rows(tmp_path)).compared > 1000


@pytest.mark.parametrize("arch", ["qwen3_moe", "olmoe"])
def test_weights_are_the_softmax_of_the_models_own_logits(specimen, tmp_path, arch):
    from vllm import SamplingParams

    from moescope.tracer.vllm_model import find_runners

    seen = {}
    with open_engine(specimen(arch), **OPTIONS) as llm:
        core = llm.llm_engine.engine_core.engine_core
        model = core.model_executor.driver_worker.worker.model_runner.get_model()
        for index, runner in enumerate(find_runners(model)):
            compute = runner.router._compute_routing

            def keep(hidden, logits, *args, index=index, compute=compute, **kwargs):
                seen[index] = logits.float().clone()
                return compute(hidden, logits, *args, **kwargs)

            runner.router._compute_routing = keep
        renormalized = runner.router.renormalize
        with trace(llm, store=tmp_path):
            prompt = list(range(20, 320))
            llm.generate(as_prompts([prompt]), SamplingParams(max_tokens=1), use_tqdm=False)
    [(_, experts, weights)] = traced_rows(tmp_path).values()
    for index, logits in seen.items():
        gates, ids = logits[: len(prompt)].softmax(-1).topk(experts.shape[-1], dim=-1)
        if renormalized:
            gates = gates / gates.sum(-1, keepdim=True)
        assert len(experts) == len(prompt)
        same = np.sort(ids.cpu().numpy(), -1) == np.sort(experts[:, index], -1)
        assert same.all(-1).mean() > 0.99  # logits in bfloat16 tie
        np.testing.assert_allclose(weights[:, index], gates.cpu().numpy(), atol=5e-4)
