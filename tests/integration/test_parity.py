"""Traced routing against transformers' own router outputs, for every kind of router."""

import numpy as np
import pytest
from engines import as_prompts, open_engine, traced_rows
from reference_routing import NEAR_TIE, reference_routing, top_k_margin

from moescope.tracer import trace

pytestmark = pytest.mark.engine

ARCHITECTURES = [
    "deepseek_v2",
    "deepseek_v2_group",
    "qwen3_moe",
    "olmoe",
    "mixtral",
    "deepseek_v3",
    "glm4_moe",
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_traced_routing_is_transformers_routing(specimen, prompts, tmp_path, arch):
    from vllm import SamplingParams

    model = specimen(arch)
    with open_engine(model) as llm, trace(llm, store=tmp_path):
        llm.generate(
            as_prompts(prompts[:16]), SamplingParams(max_tokens=12, temperature=0), use_tqdm=False
        )
    compared = differ = 0
    for tokens, experts, weights in traced_rows(tmp_path).values():
        reference = reference_routing(model, tokens)
        assert len(reference) == experts.shape[1]
        for index, layer in enumerate(sorted(reference)):
            ids, gates, scores = reference[layer]
            ours = np.sort(experts[:, index], -1)
            same = (ours == np.sort(ids, -1)).all(-1)
            compared += len(same)
            differ += (~same).sum()
            assert (top_k_margin(scores, ids.shape[1])[~same] < NEAR_TIE).all()
            # Weights by expert, where the sets are the same.
            order, expected = np.argsort(experts[:, index], -1), np.argsort(ids, -1)
            gap = np.abs(
                np.take_along_axis(weights[:, index], order, -1)
                - np.take_along_axis(gates, expected, -1)
            )
            assert gap[same].max() < 1e-3
    assert compared > 1000
    assert differ <= 0.001 * compared
