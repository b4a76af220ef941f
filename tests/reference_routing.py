"""What the routing of a sequence should be, computed by transformers and nothing of ours.

vLLM's router hands `BaseRouter._compute_routing` results on to the experts; a trace records those.
Where they differ from the weights in transformers' routers (read in vLLM 0.32's source):

- `routed_scaling_factor`. DeepSeek-V2/V3 and GLM-4 ask `FusedMoEFactory` to
  `apply_routed_scale_to_output` everywhere but on ROCm with AITER. The router is then built with a
  factor of 1 and `MoERunner` multiplies the experts' sum: traced weights are *without* the factor,
  transformers' are with it. Here it is divided out.
- Renormalising is the router's own in both. vLLM takes `norm_topk_prob` from the config for
  DeepSeek, GLM-4 and Qwen3, and fixes False for OLMoE and True for Mixtral; transformers obeys it
  for OLMoE and never reads it for DeepSeek-V2. The specimens' configs make the two agree.
- Grouping. vLLM always groups DeepSeek's experts by `n_group`, whatever `topk_method` says.
- Order. Both may return a token's experts in any order (`sorted=False`): compare them by id.

The correction bias takes part in the choice of experts and never in their weights, in both.

To compare exactly, run vLLM in float32. On CPUs with AMX its latent attention is bfloat16 only:
there DeepSeek models need `attention_backend="CPU_MLA"` too, which knows no chunked prefill.
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM

# Under this margin (`top_k_margin`) two right float32 implementations may choose differently.
NEAR_TIE = 1e-4


class LayerRouting(NamedTuple):
    """The routing of one sequence in one MoE layer.

    `ids` and `weights` are [tokens, top_k], in descending order of weight (ties: lower id first).
    `scores` [tokens, experts] are what the choice is made by: probabilities, with the correction
    bias where there is one, and -inf for experts of groups that were not chosen.
    """

    ids: np.ndarray
    weights: np.ndarray
    scores: np.ndarray


def reference_routing(
    model_dir: Path,
    token_ids: list[int],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[int, LayerRouting]:
    """The routing of one sequence, by the model's own layer numbers.

    Loaded models are kept: a directory must not change its model during a test run.
    """
    model = _load(model_dir, dtype, device)
    seen: dict[int, tuple[torch.Tensor, ...]] = {}
    routers = _routers(model)
    hooks = [
        # Every router of transformers 5 returns (logits, weights, ids), one row a token.
        router.register_forward_hook(lambda *args, layer=layer: seen.update({layer: args[2]}))
        for layer, router in routers.items()
    ]
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([token_ids], device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: _routing(router, *seen[layer]) for layer, router in routers.items()}


def top_k_margin(scores: np.ndarray, top_k: int) -> np.ndarray:
    """How far each token's choice is from another, [tokens]: last chosen minus first left out.

    Experts of groups left out don't count, so a near-tie between whole groups isn't seen.
    """
    ordered = -np.sort(-scores, axis=1)
    return ordered[:, top_k - 1] - ordered[:, top_k]


class Differences:
    """How far a routing is from a reference: token-layers with other experts, and near-ties."""

    def __init__(self):
        self.compared = self.differ = 0
        self.margins, self.gaps = [], []

    def add(self, ids, weights, reference):
        same = (np.sort(ids, -1) == np.sort(reference.ids, -1)).all(-1)
        self.compared += len(same)
        self.differ += int((~same).sum())
        self.margins += top_k_margin(reference.scores, ids.shape[1])[~same].tolist()
        mine, theirs = np.argsort(ids, -1), np.argsort(reference.ids, -1)
        gap = np.abs(
            np.take_along_axis(weights, mine, -1)
            - np.take_along_axis(reference.weights, theirs, -1)
        )
        self.gaps += gap[same].mean(-1).tolist()

    @property
    def rate(self):
        return self.differ / self.compared

    @property
    def margin(self):
        """Between the last chosen and the first left out, where the choice differs: 95 % below."""
        return np.quantile(self.margins, 0.95) if self.margins else 0.0

    @property
    def gap(self):
        """Of the weights of the same experts, on average."""
        return np.mean(self.gaps)

    def __str__(self):
        return (
            f"differs in {self.differ} of {self.compared} token-layers, margins there below "
            f"{self.margin:.4f}, weights by {self.gap:.5f} on average"
        )


def assert_as_near_as_rounding(name: str, model_dir: Path, rows: dict[str, Any]) -> Differences:
    """Rows (`traced_rows`) of a bfloat16 engine differ from transformers' in bfloat16 by rounding.

    By no more than twice as much, that is, as transformers itself does in float32. On a GPU.
    Returns the differences from transformers, and prints them.
    """
    ours, noise = Differences(), Differences()
    for tokens, experts, weights in rows.values():
        exact = reference_routing(model_dir, tokens, torch.float32, "cuda")
        rounded = reference_routing(model_dir, tokens, torch.bfloat16, "cuda")
        for index, layer in enumerate(sorted(rounded)):
            ours.add(experts[:, index], weights[:, index], rounded[layer])
            noise.add(exact[layer].ids, exact[layer].weights, rounded[layer])
    print(f"\n{name}: vLLM {ours}; float32 {noise}")
    assert ours.rate <= 2 * noise.rate + 0.005
    assert ours.margin <= 2 * noise.margin
    assert ours.gap <= 2 * noise.gap
    return ours


@lru_cache(maxsize=4)
def _load(model_dir: Path, dtype: torch.dtype, device: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    return model.to(device).eval()


def _routers(model: Any) -> dict[int, Any]:
    """The router modules, by layer: the classes are `Qwen3MoeTopKRouter` and the like."""
    found = {}
    for name, module in model.named_modules():
        if type(module).__name__.lower().endswith("topkrouter"):
            match = re.search(r"\blayers\.(\d+)\.", name)
            assert match, f"router {name} stands in no numbered layer"
            found[int(match[1])] = module
    return found


def _routing(
    router: Any, logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> LayerRouting:
    weights = weights / getattr(router, "routed_scaling_factor", 1.0)
    scores = _scores(router, logits.float()).cpu()
    ids, weights = ids.cpu(), weights.float().cpu()
    # The scores are the one thing recomputed here: they must lead to the model's own choice, but
    # for ties, which bfloat16 has.
    chosen = scores.topk(ids.shape[1], dim=-1).values
    assert torch.equal(chosen.sort(-1).values, scores.gather(1, ids).sort(-1).values)
    ids_np, weights_np = ids.numpy(), weights.numpy()
    order = np.lexsort((ids_np, -weights_np), axis=1)
    return LayerRouting(
        np.take_along_axis(ids_np, order, axis=1),
        np.take_along_axis(weights_np, order, axis=1),
        scores.numpy(),
    )


def _scores(router: Any, logits: torch.Tensor) -> torch.Tensor:
    """What experts are chosen by, [tokens, experts], from the router's own logits."""
    bias = getattr(router, "e_score_correction_bias", None)
    scores = logits.softmax(-1) if bias is None else logits.sigmoid() + bias
    if bias is None and getattr(router, "topk_method", None) != "group_limited_greedy":
        return scores
    grouped = scores.unflatten(-1, (router.num_group, -1))
    group_scores = grouped.amax(-1) if bias is None else grouped.topk(2, -1).values.sum(-1)
    left_out = torch.ones_like(group_scores, dtype=torch.bool)
    left_out.scatter_(1, group_scores.topk(router.topk_group, -1).indices, False)
    return grouped.masked_fill(left_out.unsqueeze(-1), float("-inf")).flatten(1)
