"""Rank stability: against scipy and sets, and where the answer is known."""

import numpy as np
import pytest
from scipy import stats

from moescope.analysis.inference import Stratum, bootstrap_differences
from moescope.analysis.stability import (
    can_halve,
    compare_rankings,
    half_differences,
    rank_stability,
)


def pairs(rates):
    ones = np.ones(len(rates))
    return Stratum(rates, ones, np.zeros_like(rates), ones, len(rates))


def facts(strata, top=5, seed=0):
    rng = np.random.default_rng(seed)
    halves = half_differences(strata, 100, rng)
    mean = strata[0].positive.mean(axis=0)
    return rank_stability(halves, bootstrap_differences(strata, 100, rng), mean, top)


def test_compares_as_scipy_and_sets_do():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 30)), rng.normal(size=(7, 30))
    a[:, ::5] = 0  # ties
    found = compare_rankings(a, b, 6)
    spearman = [stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    tops = [[set(np.argsort(-np.abs(row))[:6]) for row in rows] for rows in (a, b)]
    overlap = [len(x & y) / 6 for x, y in zip(*tops, strict=True)]
    jaccard = [len(x & y) / len(x | y) for x, y in zip(*tops, strict=True)]
    for name, values in (("spearman", spearman), ("overlap", overlap), ("jaccard", jaccard)):
        assert found[name]["mean"] == pytest.approx(np.mean(values))
        assert found[name]["low"] == pytest.approx(np.quantile(values, 0.025))
        assert found[name]["high"] == pytest.approx(np.quantile(values, 0.975))


def test_examples_that_agree_rank_alike():
    same = np.tile(np.linspace(-0.5, 0.4, 40), (10, 1))
    found = facts([pairs(same)])
    assert found["split_half"]["spearman"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert found["split_half"]["overlap"]["low"] == 1
    assert found["bootstrap"]["jaccard"]["low"] == 1
    assert found["split_half"]["reliability"] == 1


def test_noise_ranks_by_chance():
    noise = [np.random.default_rng(seed).normal(size=(40, 300)) for seed in range(10)]
    found = [facts([pairs(one)], top=30) for one in noise]
    halves = [one["split_half"] for one in found]
    assert abs(np.mean([half["spearman"]["mean"] for half in halves])) < 0.05
    assert np.mean([half["overlap"]["mean"] for half in halves]) == pytest.approx(0.1, abs=0.02)
    # A resample shares examples with the ranking itself: it agrees where there is nothing.
    assert np.mean([one["bootstrap"]["spearman"]["mean"] for one in found]) > 0.6


def test_the_reliability_is_that_of_all_examples():
    """Split halves stepped up predict how two whole samples of that size agree."""
    rng = np.random.default_rng(2)
    truth = rng.normal(0, 0.3, 400)
    samples = [rng.normal(truth, 1, (30, 400)) for _ in range(2)]
    agreed = stats.spearmanr(*(sample.mean(axis=0) for sample in samples)).statistic
    assert facts([pairs(samples[0])])["split_half"]["reliability"] == pytest.approx(
        agreed, abs=0.06
    )


def test_halves_keep_pairs_and_conditions_together():
    """Each half is a half of every group, and together they are all."""
    rng = np.random.default_rng(3)
    s = Stratum(rng.random((9, 4)), np.ones(9), rng.random((7, 4)), np.ones(7), 3)
    first, second = half_differences([s], 50, rng)
    assert not np.allclose(first, second)
    paired = pairs(rng.random((6, 4)))
    first, second = half_differences([paired], 50, rng)
    assert (first + second) / 2 == pytest.approx(np.tile(paired.positive.mean(axis=0), (50, 1)))


def test_too_few_examples_cannot_be_halved():
    assert can_halve([pairs(np.ones((2, 1)))])
    assert not can_halve([pairs(np.ones((1, 1)))])
    assert not can_halve([Stratum(np.ones((4, 1)), np.ones(4), np.ones((1, 1)), np.ones(1), 0)])
    found = rank_stability(None, np.ones((3, 4)), np.arange(4.0), 2)
    assert found["split_half"] is None
