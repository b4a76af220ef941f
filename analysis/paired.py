"""Means of paired differences: intervals by bootstrap over examples, and tests.

Everything takes *strata*: a list of arrays `[rows, examples]` of differences, one row a comparison.
A row's estimate is the mean over strata of the mean over their examples; with one stratum, the
mean. All rows share the resamples. docs/evaluation-statistics.md says why these intervals.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Strata = Sequence[Floats]

CONFIDENCE = 0.95
# A studentised interval needs a variance in (nearly) every resample.
MIN_EXAMPLES = 5
_TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)


def estimate(strata: Strata) -> Floats:
    """Each row's mean over strata of the mean over examples: [rows]."""
    return np.mean([part.mean(axis=1) for part in strata], axis=0)


def smoothed_interval(strata: Strata, *, seed: int = 0, resamples: int = 2000) -> Floats:
    """95 % interval of differences between -1 and 1, most of them -1, 0 or 1: [2, rows].

    Two examples are added to each stratum, a half of one of difference 1, a half of -1 and one of
    0, which is 1/2 in each cell of a table of pairs (Agresti & Min, Statistics in Medicine 24,
    2005, 729-740); then the percentile bootstrap. So a hundred examples without a change are no
    proof that there never is one.
    """
    means = np.zeros((len(strata[0]), resamples))
    for index, part in enumerate(strata):
        n = part.shape[1]
        added = np.broadcast_to([1.0, -1.0, 0.0], (len(part), 3))
        counts = _counts(n, True, seed, index, resamples)
        means += np.concatenate([part, added], axis=1) @ counts.T / ((n + 2) * len(strata))
    low, high = np.quantile(means, _TAILS, axis=1)
    # The added ones pull towards 0, by less than the interval's width; never past the estimate.
    middle = estimate(strata)
    return np.stack([np.minimum(low, middle), np.maximum(high, middle)])


def studentised_interval(strata: Strata, *, seed: int = 0, resamples: int = 2000) -> Floats:
    """95 % interval of any differences, by the bootstrap-t: [2, rows].

    Efron & Tibshirani, An Introduction to the Bootstrap, 1993, eq. 12.22, with the standard error
    of a mean. NaN where a stratum has fewer than MIN_EXAMPLES examples.
    """
    middle, rows = estimate(strata), len(strata[0])
    if min(part.shape[1] for part in strata) < MIN_EXAMPLES:
        return np.full((2, rows), np.nan)
    means, variances = np.zeros((2, rows, resamples))
    variance = np.zeros(rows)
    for index, part in enumerate(strata):
        n = part.shape[1]
        counts = _counts(n, False, seed, index, resamples)
        # About its mean, so that the difference of squares below is exact enough.
        centred = part - part.mean(axis=1, keepdims=True)
        mean = centred @ counts.T / n
        means += mean / len(strata)
        variances += (centred**2 @ counts.T / n - mean**2) / (n * len(strata) ** 2)
        variance += part.var(axis=1) / (n * len(strata) ** 2)
    # Differences that are all equal have no spread to resample; rounding leaves a trace of one.
    even = variance <= 1e-24 * np.maximum(1.0, middle**2)
    floor = np.where(even, 1.0, 1e-6 * variance)[:, None]
    low, high = np.quantile(means / np.sqrt(np.maximum(variances, floor)), _TAILS, axis=1)
    error = np.where(even, 0.0, np.sqrt(variance))
    return np.stack([middle - high * error, middle - low * error])


def sign_flip_p(strata: Strata, *, seed: int = 0, resamples: int = 2000) -> Floats:
    """Two-sided p-value of "the difference is as likely as its opposite": [rows].

    The share of random sign flips that give a mean at least as far from 0, the observed one
    counted in (Phipson & Smyth, 2010), so never below 1 / (resamples + 1).
    """
    flipped = np.zeros((len(strata[0]), resamples))
    for index, part in enumerate(strata):
        signs = _signs(part.shape[1], seed, index, resamples)
        flipped += part @ signs.T / (part.shape[1] * len(strata))
    observed = np.abs(estimate(strata))[:, None]
    as_far = np.abs(flipped) >= observed * (1 - 1e-9)
    return (1 + as_far.sum(axis=1)) / (1 + resamples)


def mcnemar_p(differences: Floats) -> Floats:
    """Exact two-sided p-value of McNemar's test for each row of differences of 0/1 values."""
    from statsmodels.stats.contingency_tables import mcnemar

    ups, downs = (differences > 0).sum(axis=1), (differences < 0).sum(axis=1)
    tables = ([[0, up], [down, 0]] for up, down in zip(ups, downs, strict=True))
    return np.array([mcnemar(table, exact=True).pvalue if np.any(table) else 1 for table in tables])


# The metrics of one evaluation are mostly over equally many examples.
@lru_cache(maxsize=8)
def _counts(num: int, smoothed: bool, seed: int, stratum: int, resamples: int) -> Floats:
    """How often each resample has each example, and the three added ones: [resamples, examples]."""
    rng = np.random.default_rng([seed, 0, stratum, num])
    weights = np.append(np.ones(num), [0.5, 0.5, 1.0] if smoothed else [])
    total = round(weights.sum())
    return rng.multinomial(total, weights / total, size=resamples).astype(np.float64)


@lru_cache(maxsize=8)
def _signs(num: int, seed: int, stratum: int, resamples: int) -> Floats:
    """Random signs, -1 or 1: [resamples, examples]."""
    rng = np.random.default_rng([seed, 1, stratum, num])
    return rng.choice([-1.0, 1.0], (resamples, num))
