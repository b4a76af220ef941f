"""Route tokens under masks, after vLLM's own routing, each by the mask of its slot.

vLLM chooses first. A token whose slot doesn't touch the layer keeps that outcome bit for bit; the
others are routed again from the same logits:

    logits [n, E] ─ edit ─▶ edited ─ score, tiers, top-k ─▶ ids [n, k] ─ score ─▶ gate weights
                     │                   ▲                                             │
            bias, or steermoe's      activate,                               scale, renormalise
            max + ε and min − ε      deactivate

Tiers make the guarantees. Experts are chosen in the order

    3 activated   2 in a chosen group   1 in another group   0 deactivated

and within a tier by the router's own score; then those that vLLM chose, then lower ids. A layer has
at most k activated experts and at least k that are not deactivated (`MaskTable` promises it), so
all of the former are chosen and none of the latter, whatever the logits and groups are.

Nothing here waits for the device or has a shape that depends on data: a CUDA graph can capture it.
"""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray

from moescope.tracer.format import MoeShape
from moescope.tracer.mask import ACTIVATE, DEACTIVATE, MaskTable, RouterSpec

_SCORES = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}
_LEAST_SUM = 1e-37  # below it float32 loses what a sum of weights could be rescaled by


class SteerTables:
    """The masks in force, one a slot, and every token's slot: tensors at fixed addresses.

    [slots, layers, experts]  action int8, bias float32, scale float32, as in mask.py
    [slots, layers]           touched bool: the layer's tokens are steered
                              reroutes bool: choice or scores change, not only `scale`
    [slots]                   steermoe bool, epsilon float32, renormalise bool
    [max_tokens]              token_slots int32: the slot of each token of the step

    A fresh slot touches nothing. Write between steps only.
    """

    def __init__(
        self, shape: MoeShape, num_slots: int, max_tokens: int, device: torch.device | str = "cpu"
    ) -> None:
        by_layer = num_slots, len(shape.layers)
        by_expert = *by_layer, shape.num_experts
        self.shape = shape
        self.action = torch.zeros(by_expert, dtype=torch.int8, device=device)
        self.bias = torch.zeros(by_expert, dtype=torch.float32, device=device)
        self.scale = torch.ones(by_expert, dtype=torch.float32, device=device)
        self.touched = torch.zeros(by_layer, dtype=torch.bool, device=device)
        self.reroutes = torch.zeros(by_layer, dtype=torch.bool, device=device)
        self.steermoe = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self.epsilon = torch.zeros(num_slots, dtype=torch.float32, device=device)
        self.renormalise = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self.token_slots = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self._touched_on_host: NDArray[np.bool_] = np.zeros(by_layer, np.bool_)

    def set_slot(self, slot: int, table: MaskTable) -> None:
        """Put a mask into a slot, in place."""
        if table.shape != self.shape:
            raise ValueError(f"the table is for {table.shape}, not for {self.shape}")
        reroutes = ((table.action != 0) | (table.bias != 0)).any(axis=1)
        for name, values in (
            ("action", table.action),
            ("bias", table.bias),
            ("scale", table.scale),
            ("touched", table.touched),
            ("reroutes", reroutes),
        ):
            getattr(self, name)[slot].copy_(torch.from_numpy(values))
        self.steermoe[slot].fill_(table.steermoe)
        self.epsilon[slot].fill_(table.epsilon)
        self.renormalise[slot].fill_(bool(table.renormalise))
        self._touched_on_host[slot] = table.touched

    def clear_slot(self, slot: int) -> None:
        """Let a slot touch nothing."""
        self.touched[slot].zero_()
        self._touched_on_host[slot] = False

    def touches(self, layer: int) -> bool:
        """Whether any slot touches the layer (the host knows); if not, `steer` changes nothing."""
        return bool(self._touched_on_host[:, layer].any())


def steer(
    layer: int,
    logits: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    token_slots: torch.Tensor,
    tables: SteerTables,
    spec: RouterSpec,
    correction_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The routing of one layer under the masks of its tokens' slots.

    Args:
        layer: 0-based among the MoE layers.
        logits: [n, experts], what vLLM's router was given.
        weights: [n, k], what vLLM's router made of it.
        ids: integers [n, k], likewise; logical ids. A row with an id outside 0..experts-1 is
            padding and stays as it is.
        token_slots: integers [n], the slot of each token.
        tables: the masks.
        spec: the layer's router.
        correction_bias: [experts], of routers that have one.

    Returns:
        weights and ids of the dtypes given, contiguous.

    """
    slots, old_ids = token_slots.long(), ids.long()
    safe_ids = old_ids.clamp(0, logits.shape[-1] - 1)
    action = tables.action[:, layer][slots]
    edited = _edit(logits.float(), action, tables.bias[:, layer][slots], slots, tables, spec)
    rerouted = tables.reroutes[:, layer][slots].unsqueeze(1)
    new_ids = torch.where(
        rerouted, _choose(edited, action, safe_ids, spec, correction_bias), safe_ids
    )
    gate = torch.where(rerouted, _weigh(edited, new_ids, spec), weights.float())
    scaled = gate * tables.scale[:, layer][slots.unsqueeze(1), new_ids]
    before, after = gate.sum(-1, keepdim=True), scaled.sum(-1, keepdim=True)
    rescaled = tables.renormalise[slots].unsqueeze(1) & (after > _LEAST_SUM)
    new_weights = scaled * torch.where(rescaled, before / after, 1.0)
    steered = tables.touched[:, layer][slots].unsqueeze(1)
    steered = steered & (old_ids == safe_ids).all(-1, keepdim=True)
    return (
        torch.where(steered, new_weights.to(weights.dtype), weights).contiguous(),
        torch.where(steered, new_ids, old_ids).to(ids.dtype).contiguous(),
    )


def _edit(
    logits: torch.Tensor,
    action: torch.Tensor,
    bias: torch.Tensor,
    slots: torch.Tensor,
    tables: SteerTables,
    spec: RouterSpec,
) -> torch.Tensor:
    """The logits that the router shall see, [n, E]: with the bias, or as SteerMoE edits them.

    SteerMoE (arXiv 2509.09660): s = log_softmax(logits); s of activated experts := max s + ε, of
    deactivated ones := min s - ε, with max and min over the token's s before the edit.
    """
    hard = logits + bias
    if spec.scoring != "softmax":
        return hard
    scores = logits.log_softmax(-1)
    least, most = scores.aminmax(dim=-1, keepdim=True)
    epsilon = tables.epsilon[slots].unsqueeze(1)
    soft = torch.where(action == ACTIVATE, most + epsilon, scores)
    soft = torch.where(action == DEACTIVATE, least - epsilon, soft)
    return torch.where(tables.steermoe[slots].unsqueeze(1), soft, hard)


def _choose(
    edited: torch.Tensor,
    action: torch.Tensor,
    old_ids: torch.Tensor,
    spec: RouterSpec,
    correction_bias: torch.Tensor | None,
) -> torch.Tensor:
    """The experts of each token, [n, k], by tier and by the router's scores.

    Scores are vLLM's (router/cpu_router.py): plain softmax chooses by the logits themselves, which
    keep their order where softmax underflows; grouped ones and those with a bias by the score.
    """
    chosen_before = torch.zeros_like(edited, dtype=torch.bool).scatter_(1, old_ids, True)
    usable = action != DEACTIVATE
    if spec.scoring == "softmax" and spec.num_groups == 1 and correction_bias is None:
        scores = edited
    else:
        scores = _SCORES[spec.scoring](edited)
        if correction_bias is not None:
            scores = scores + correction_bias.float()
    tier = 2 * usable.long()
    if spec.num_groups > 1:
        grouped = scores.masked_fill(~usable, -torch.inf).unflatten(-1, (spec.num_groups, -1))
        group_scores = grouped.amax(-1)
        if correction_bias is not None and grouped.shape[-1] > 1:
            best, second = grouped.topk(2, -1).values.unbind(-1)
            group_scores = best + second.masked_fill(second == -torch.inf, 0.0)
        before = chosen_before.unflatten(-1, (spec.num_groups, -1)).any(-1)
        groups = _top(spec.topk_groups, group_scores, before)
        chosen = torch.zeros_like(before).scatter_(1, groups, True)
        in_chosen = chosen.unsqueeze(-1).expand_as(grouped).flatten(1)
        tier = usable.long() * (1 + in_chosen.long())
    tier = torch.where(action == ACTIVATE, 3, tier)
    return _top(old_ids.shape[-1], scores, chosen_before, tier)


def _top(
    count: int, scores: torch.Tensor, before: torch.Tensor, tier: torch.Tensor | int = 0
) -> torch.Tensor:
    """Indices [n, count] of the first ones by tier, score, chosen before, and lower index.

    All of it is one integer a candidate, so that no tie is left to the kernel's whim: a float32's
    bits, with those of negative numbers flipped, are ordered as the numbers are.
    """
    num = scores.shape[-1]
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0: -0.0 is 0.0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    rank = (tier * 2**33 + order * 2 + before) * num
    return (rank - torch.arange(num, device=rank.device)).topk(count, dim=-1).indices


def _weigh(edited: torch.Tensor, ids: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    """The router's own weights of the chosen experts, [n, k]; softmax is over all experts."""
    chosen = edited.gather(1, ids)
    if spec.scoring == "softmax":  # in logarithms: what is left may be tiny
        others = chosen if spec.renormalize else edited
        gate = (chosen - others.logsumexp(-1, keepdim=True)).exp()
    else:
        gate = _SCORES[spec.scoring](chosen)
        if spec.renormalize:
            gate = gate / gate.sum(-1, keepdim=True).clamp_min(_LEAST_SUM)
    return gate * spec.scaling
