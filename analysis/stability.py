"""How far a ranking of experts would hold with other examples: split halves and resamples."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from moescope.analysis.inference import (
    Array,
    Stratum,
    both_sides,
    draws_at_once,
    weighted_differences,
)

RANGE = (0.025, 0.975)


def half_differences(
    strata: Sequence[Stratum], splits: int, rng: np.random.Generator
) -> tuple[Array, Array]:
    """[splits, experts] of random halves of the examples, and of the other halves.

    Pairs stay together; every stratum and condition is halved, an odd example falling to either.
    """
    parts: tuple[list[Array], list[Array]] = ([], [])
    for draws in draws_at_once(strata, splits):
        halves = [both_sides(s, partial(_halves, rng, draws)) for s in strata]
        parts[0].append(weighted_differences(strata, halves))
        others = [(1 - first, 1 - second) for first, second in halves]
        parts[1].append(weighted_differences(strata, others))
    return np.concatenate(parts[0]), np.concatenate(parts[1])


def _halves(rng: np.random.Generator, draws: int, examples: int) -> Array:
    """[draws, examples]: 1 for a random half of them."""
    half = np.zeros((draws, examples))
    half[:, : examples // 2] = 1
    if examples % 2:
        half[:, examples // 2] = rng.integers(0, 2, draws)
    return rng.permuted(half, axis=1)


def can_halve(strata: Sequence[Stratum]) -> bool:
    """Whether each half has examples of both conditions in every stratum."""
    return all(
        s.pairs >= 2 or min(len(size) - s.pairs for size in (s.positive_size, s.negative_size)) >= 2
        for s in strata
    )


def compare_rankings(first: Array, second: Array, top: int) -> dict[str, dict[str, float]]:
    """How alike the rankings of each row of `first` and `second` [draws, experts] are.

    `spearman`: the rank correlation of the risk differences; `overlap`: the share of the `top`
    experts by |RD| that are in both; `jaccard`: those in both over those in either. Of each the
    mean and the middle 95 % of the draws.
    """
    ranks = [stats.rankdata(values, axis=1) for values in np.broadcast_arrays(first, second)]
    centred = [rank - rank.mean(axis=1, keepdims=True) for rank in ranks]
    norms = [np.sqrt((rank**2).sum(axis=1)) for rank in centred]
    with np.errstate(invalid="ignore"):
        spearman = (centred[0] * centred[1]).sum(axis=1) / (norms[0] * norms[1])
    tops = [_is_top(values, top) for values in np.broadcast_arrays(first, second)]
    both = (tops[0] & tops[1]).sum(axis=1)
    return {
        "spearman": _summary(spearman),
        "overlap": _summary(both / top),
        "jaccard": _summary(both / (2 * top - both)),
    }


def _is_top(values: Array, top: int) -> NDArray[np.bool_]:
    """Whether an expert is among the `top` of its row by magnitude."""
    places = np.argpartition(-np.abs(values), top - 1, axis=1)[:, :top]
    chosen = np.zeros(values.shape, bool)
    np.put_along_axis(chosen, places, True, axis=1)
    return chosen


def _summary(values: Array) -> dict[str, float]:
    low, high = np.quantile(values, RANGE)
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def rank_stability(
    halves: tuple[Array, Array] | None, resampled: Array, observed: Array, top: int
) -> dict[str, Any]:
    """The facts that a ranking's metadata keep under `stability`.

    `split_half` (None with too few examples) compares two halves of the examples, so it speaks of
    rankings from half as many; its `reliability` is the mean Spearman correlation r stepped up to
    all examples, 2 r / (1 + r) (Spearman 1910, Brown 1910). `bootstrap` compares resamples with
    the ranking itself; that is optimistic, since a resample shares examples with it.
    """
    facts: dict[str, Any] = {"top": top, "split_half": None}
    if halves is not None:
        facts["splits"] = len(halves[0])
        compared = compare_rankings(*halves, top)
        r = compared["spearman"]["mean"]
        facts["split_half"] = {**compared, "reliability": 2 * r / (1 + r) if r > -1 else -1.0}
    facts["resamples"] = len(resampled)
    facts["bootstrap"] = compare_rankings(resampled, observed[None], top)
    return facts
