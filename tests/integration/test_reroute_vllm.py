"""Our routing against vLLM's own functions: without actions it is theirs, edit for edit."""

import numpy as np
import pytest
import torch

from moescope.tracer.format import MoeShape
from moescope.tracer.mask import ACTIVATE, DEACTIVATE, RouterSpec, compile_mask, make_mask
from moescope.tracer.reroute import SteerTables, steer

pytestmark = pytest.mark.engine

TOKENS = 512
# (experts, k) and router, as the published models have them. DeepSeek-V2-Lite and GLM go through
# the grouped function with one group.
MODELS = {
    "qwen3": (128, 8, RouterSpec("softmax", True)),
    "olmoe": (64, 8, RouterSpec("softmax", False)),
    "mixtral": (8, 2, RouterSpec("softmax", True)),
    "deepseek_v2_lite": (64, 6, RouterSpec("softmax", False, 1, 1)),
    "deepseek_v2": (160, 6, RouterSpec("softmax", False, 8, 3, scaling=16.0)),
    "deepseek_v3": (256, 8, RouterSpec("sigmoid", True, 8, 4, True, 2.5)),
    "glm4_moe": (128, 8, RouterSpec("sigmoid", True, 1, 1, True)),
    "deepseek_v4": (256, 6, RouterSpec("sqrtsoftplus", True, 1, 1, True, 1.5)),
}
UNGROUPED = ("qwen3", "olmoe", "mixtral")
models = pytest.mark.parametrize("model", MODELS)


@pytest.fixture(autouse=True)
def vllm_can_route(request):
    """DeepSeek-V4's kernel is in vLLM's build for processors with AVX512-BF16 alone: on the others
    vLLM itself cannot run the model. tests/unit/tracer/test_reroute.py proves its routing there."""
    from vllm import _custom_ops  # noqa: F401  (loads the build for this processor)

    model = request.node.callspec.params["model"]
    if MODELS[model][2].scoring == "sqrtsoftplus" and not hasattr(torch.ops._C, "biased_topk_cpu"):
        pytest.skip(f"vLLM's build for this processor has no router for {model}")


def vllm_routing(model, logits, correction):
    """(weights, ids) as CPURouter computes them."""
    from vllm.model_executor.layers.fused_moe.router import cpu_router

    _, top_k, spec = MODELS[model]
    if spec.scoring == "sqrtsoftplus":
        return cpu_router._sqrtsoftplus_bias_topk(
            logits, top_k, spec.renormalize, correction, spec.scaling, None, None
        )
    if model in UNGROUPED:
        return cpu_router._softmax_topk(logits, top_k, spec.renormalize)
    return cpu_router._grouped_topk(
        logits,
        top_k,
        spec.renormalize,
        spec.num_groups,
        spec.topk_groups,
        spec.scoring,
        spec.scaling,
        correction,
    )


def inputs(model, seed, *, ties):
    generator = torch.Generator().manual_seed(seed)
    experts, _, spec = MODELS[model]
    logits = torch.randn(TOKENS, experts, generator=generator) * 2
    logits = (logits * 2).round() / 2 if ties else logits
    correction = torch.rand(experts, generator=generator) if spec.correction_bias else None
    return logits, correction


def steered(model, logits, correction, entries, **fields):
    """vLLM's routing, and what becomes of it under a mask (of one layer, number 0)."""
    experts, top_k, spec = MODELS[model]
    shape = MoeShape((0,), experts, top_k)
    tables = SteerTables(shape, 1, TOKENS)
    tables.set_slot(0, compile_mask(make_mask(name="m", entries=entries, **fields), shape))
    tables.touched[:] = tables.reroutes[:] = True
    routing = vllm_routing(model, logits, correction)
    return routing, steer(0, logits, *routing, tables.token_slots, tables, spec, correction)


def by_id(weights, ids):
    order = ids.long().argsort(-1)
    return weights.gather(1, order), ids.gather(1, order)


def entries_of(**actions):
    return [
        {"layer": 0, "expert": int(e), "action": action}
        for action, experts in actions.items()
        for e in experts
    ]


@models
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_without_actions_the_routing_is_vllms(model, ties, seed):
    routing, new = steered(model, *inputs(model, seed, ties=ties), [])
    (weights, ids), (new_weights, new_ids) = by_id(*routing), by_id(*new)
    assert (new_weights.dtype, new_ids.dtype) == (weights.dtype, ids.dtype)
    assert torch.equal(new_ids, ids)
    torch.testing.assert_close(new_weights, weights, rtol=1e-6, atol=1e-6)


@models
def test_deactivated_experts_might_as_well_not_be_there(model):
    """vLLM's own functions, with scores that no expert can be chosen by."""
    experts, top_k, spec = MODELS[model]
    logits, correction = inputs(model, 5, ties=False)
    off = np.random.default_rng(5).permutation(experts)[: (experts - top_k) // 2]
    _, new = steered(model, logits, correction, entries_of(deactivate=off))
    gone = torch.zeros(experts, dtype=torch.bool)
    gone[torch.from_numpy(off)] = True
    if correction is None:
        # -inf on a logit also takes the expert out of softmax's sum, which masks do not.
        weights, ids = vllm_routing(model, logits.masked_fill(gone, -torch.inf), None)
        if not spec.renormalize:
            share = logits.softmax(-1).masked_fill(gone, 0).sum(-1, keepdim=True)
            weights = weights * share
    else:
        weights, ids = vllm_routing(model, logits, correction.masked_fill(gone, -1e6))
    (weights, ids), (new_weights, new_ids) = by_id(weights, ids), by_id(*new)
    assert torch.equal(new_ids, ids)
    torch.testing.assert_close(new_weights, weights, rtol=1e-5, atol=1e-6)


@models
def test_a_bias_is_a_change_of_the_logits(model):
    experts, _, _ = MODELS[model]
    logits, correction = inputs(model, 6, ties=False)
    bias = np.random.default_rng(6).normal(size=experts).astype(np.float32)
    entries = [
        {"layer": 0, "expert": e, "action": "bias", "value": float(b)} for e, b in enumerate(bias)
    ]
    _, new = steered(model, logits, correction, entries)
    weights, ids = by_id(*vllm_routing(model, logits + torch.from_numpy(bias), correction))
    new_weights, new_ids = by_id(*new)
    assert torch.equal(new_ids, ids)
    torch.testing.assert_close(new_weights, weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", UNGROUPED)
def test_steermoe_mode_is_vllms_routing_of_the_papers_logits(model):
    experts, top_k, _ = MODELS[model]
    logits, _ = inputs(model, 7, ties=False)
    order = np.random.default_rng(7).permutation(experts)
    action = np.zeros(experts)
    action[order[: top_k // 2]], action[order[top_k : top_k + experts // 4]] = ACTIVATE, DEACTIVATE
    entries = entries_of(
        activate=np.flatnonzero(action == ACTIVATE), deactivate=np.flatnonzero(action == DEACTIVATE)
    )
    _, new = steered(model, logits, None, entries, mode="steermoe")
    # The paper's rule (arXiv 2509.09660), with the epsilon of its code.
    scores = logits.double().numpy()
    scores = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    most, least = scores.max(-1, keepdims=True), scores.min(-1, keepdims=True)
    scores = np.where(action == ACTIVATE, most + 0.01, scores)
    scores = np.where(action == DEACTIVATE, least - 0.01, scores)
    weights, ids = by_id(*vllm_routing(model, torch.from_numpy(scores).float(), None))
    new_weights, new_ids = by_id(*new)
    assert torch.equal(new_ids, ids)
    torch.testing.assert_close(new_weights, weights, rtol=1e-5, atol=1e-6)
