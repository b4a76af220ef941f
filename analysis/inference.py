"""How sure a risk difference is: intervals, p-values, q-values and effect sizes by example.

Tokens of one text are alike, so the example is what is drawn, flipped and counted here, never the
token. Everything is done for all experts at once: resampling is a product of a matrix of weights
[resamples, examples] with the examples' rates [examples, experts]. docs/statistics.md has the
definitions and what they assume.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

Array = NDArray[np.float64]

CONFIDENCE = 0.95
EXACT_PAIRS = 13  # up to 2^13 sign patterns are enumerated
_TIE = 1e-12  # sums of rates in another order differ by less
_WEIGHT_VALUES = 1 << 22  # of weights at a time: 32 MiB
_REFINED_VALUES = 100_000_000  # signs drawn at most for the experts that no permutation reached


@dataclass(frozen=True, slots=True)
class Stratum:
    """The examples of one stratum.

    A row of `positive` or `negative` [examples, experts] is an example's sum, over its requests of
    that condition, of rates (estimator `sequence`) or of tokens (`token`); its size says of how
    many requests or tokens. The first `pairs` rows of both are the same examples in one order.
    RD = positive.sum(0) / positive_size.sum() - the same of the negative; `weight` is the share of
    this stratum's RD in the combined one.
    """

    positive: Array
    positive_size: Array
    negative: Array
    negative_size: Array
    pairs: int
    weight: float = 1.0

    @property
    def examples(self) -> int:
        """How many examples there are; a pair is one."""
        return len(self.positive_size) + len(self.negative_size) - self.pairs

    @property
    def differences(self) -> Array:
        """Of each pair, the difference of its rates: [pairs, experts]."""
        first, second = self.rates()
        return first[: self.pairs] - second[: self.pairs]

    def rates(self) -> tuple[Array, Array]:
        """Each example's rate under the positive and under the negative condition."""
        return self.positive / self.positive_size[:, None], (
            self.negative / self.negative_size[:, None]
        )


# The same strata with only some of their experts.
Load = Callable[[NDArray[np.int64]], Sequence[Stratum]]


def is_paired(strata: Sequence[Stratum]) -> bool:
    """Whether every example has both conditions."""
    return all(s.pairs == len(s.positive_size) == len(s.negative_size) for s in strata)


def degrees_of_freedom(strata: Sequence[Stratum]) -> int:
    """Of the mean difference of pairs; otherwise of the smaller condition's mean."""
    sides = [len(s.positive_size) for s in strata], [len(s.negative_size) for s in strata]
    return min(sum(side) for side in sides) - len(strata)


def difference(strata: Sequence[Stratum]) -> Array:
    """The (combined) risk difference [experts], but for the last bits as in rd.py."""
    ones = [
        (np.ones((1, len(s.positive_size))), np.ones((1, len(s.negative_size)))) for s in strata
    ]
    return weighted_differences(strata, ones)[0]


def weighted_differences(
    strata: Sequence[Stratum], weights: Sequence[tuple[Array, Array]]
) -> Array:
    """[draws, experts]: risk differences where each example counts by its weight.

    `weights`: of each stratum [draws, examples], of the positive condition and of the negative.
    """
    total: Array | None = None
    for s, (first, second) in zip(strata, weights, strict=True):
        part: Array = (first @ s.positive) / (first @ s.positive_size)[:, None]
        part -= (second @ s.negative) / (second @ s.negative_size)[:, None]
        part *= s.weight
        total = part if total is None else total + part
    assert total is not None
    return total


def draws_at_once(strata: Sequence[Stratum], draws: int) -> Iterator[int]:
    """`draws`, cut so that their weights take little memory."""
    examples = sum(s.examples for s in strata)
    step = max(1, _WEIGHT_VALUES // max(examples, 1))
    for start in range(0, draws, step):
        yield min(step, draws - start)


def both_sides(s: Stratum, draw: Callable[[int], Array]) -> tuple[Array, Array]:
    """Weights of the positive condition's examples and of the negative's; the same for pairs.

    `draw` gives those of so many examples, [draws, examples].
    """
    pairs = draw(s.pairs)
    alone = [draw(len(size) - s.pairs) for size in (s.positive_size, s.negative_size)]
    first, second = (np.hstack([pairs, more]) if more.size else pairs for more in alone)
    return first, second


def bootstrap_differences(
    strata: Sequence[Stratum], resamples: int, rng: np.random.Generator
) -> Array:
    """[resamples, experts]: the risk difference of examples drawn with replacement.

    Pairs, examples of the positive condition alone and those of the negative alone are drawn each
    within their stratum, so that every resample has the design of the data.
    """
    parts = []
    for draws in draws_at_once(strata, resamples):
        weights = [both_sides(s, partial(_multinomial, rng, draws)) for s in strata]
        parts.append(weighted_differences(strata, weights))
    return np.concatenate(parts)


def _multinomial(rng: np.random.Generator, draws: int, examples: int) -> Array:
    """[draws, examples]: how often each is drawn, of as many draws as there are examples."""
    if not examples:
        return np.zeros((draws, 0))
    picks = rng.integers(0, examples, size=(draws, examples))
    picks += np.arange(draws)[:, None] * examples
    counts = np.bincount(picks.ravel(), minlength=draws * examples)
    return counts.reshape(draws, examples).astype(np.float64)


def bootstrap_interval(
    strata: Sequence[Stratum], resampled: Array, confidence: float = CONFIDENCE
) -> tuple[Array, Array]:
    """The expanded percentile interval of each expert (Hesterberg 2015, arXiv 1411.5279, 5.3).

    A percentile interval of few examples is too narrow, by sqrt((n - 1) / n) and by the normal's
    quantile in place of Student's; so its percentiles are moved outwards by as much.
    """
    df = degrees_of_freedom(strata)
    if df < 1:
        nothing = np.full(resampled.shape[1], np.nan)
        return nothing, nothing
    quantile = stats.t.ppf((1 + confidence) / 2, df) * np.sqrt((df + len(strata)) / df)
    tail = stats.norm.sf(quantile)
    low, high = np.quantile(resampled, [tail, 1 - tail], axis=0, method="median_unbiased")
    return low, high


def permutation_p(strata: Sequence[Stratum], load: Load, resamples: int, seed: int) -> Array:
    """Two-sided p-values [experts] of "which condition an example was under makes no difference".

    Pairs have their two conditions swapped (the sign of their difference flips); other examples'
    conditions are shuffled within the stratum. All patterns are enumerated for up to 13 pairs;
    otherwise p = (as extreme + 1) / (drawn + 1) (Phipson and Smyth 2010, eq. 2). Experts that no
    permutation reached are drawn for again, many times as often, if they are few: with 1,664
    experts, 1 / 2,001 is no small p-value. That p-value is valid too: it is only ever taken in the
    place of the smallest one that the first round could give.
    """
    experts = strata[0].positive.shape[1]
    size = sum(s.examples for s in strata)
    if is_paired(strata) and size <= EXACT_PAIRS:
        patterns = (np.arange(2**size)[:, None] >> np.arange(size) & 1).astype(np.float64)
        return _count_extreme(strata, iter([patterns])) / len(patterns)
    extreme = _count_extreme(strata, _random_swaps(strata, resamples, [seed, 1]))
    p = (extreme + 1) / (resamples + 1)
    unreached = np.flatnonzero(extreme == 0)
    draws = min(100 * max(experts, resamples), _REFINED_VALUES // max(size, 1))
    # More of them than this are significant together at the resolution that there is.
    if 0 < len(unreached) <= max(1, experts // 10) and draws > resamples:
        few = load(unreached)
        extreme = _count_extreme(few, _random_swaps(few, draws, [seed, 2]))
        p[unreached] = np.minimum((extreme + 1) / (draws + 1), p[unreached])
    return p


def _random_swaps(
    strata: Sequence[Stratum], draws: int, seed: list[int]
) -> Iterator[NDArray[np.float64]]:
    """Blocks [draws, examples], over all strata: 1 where an example changes its condition."""
    rng = np.random.default_rng(seed)
    for some in draws_at_once(strata, draws):
        columns = []
        for s in strata:
            columns.append(rng.integers(0, 2, (some, s.pairs), np.int8))
            first, second = len(s.positive_size) - s.pairs, len(s.negative_size) - s.pairs
            if first and second:
                sides = np.repeat(np.array([[0, 1]], np.int8), [first, second], axis=1)
                shuffled = rng.permuted(np.repeat(sides, some, axis=0), axis=1)
                columns.append(shuffled != sides)
            else:
                columns.append(np.zeros((some, first + second), np.int8))
        yield np.hstack(columns).astype(np.float64)


def _count_extreme(strata: Sequence[Stratum], swaps: Iterator[Array]) -> NDArray[np.int64]:
    """How many of the swapped differences are as far from 0 as the observed one."""
    prepared = [_Swapped(s) for s in strata]
    observed = np.abs(sum(p.differences(np.zeros((1, p.examples))) for p in prepared))
    extreme: NDArray[np.int64] = np.zeros(observed.shape[1], np.int64)
    edges = np.cumsum([0, *(p.examples for p in prepared)])
    for block in swaps:
        total: Any = 0.0
        for at, one in enumerate(prepared):
            total = total + one.differences(block[:, edges[at] : edges[at + 1]])
        extreme += np.count_nonzero(np.abs(total) >= observed - _TIE, axis=0)
    return extreme


class _Swapped:
    """A stratum's difference when examples change their condition.

    A swapped example takes its sum and size out of the one condition and into the other: the sums
    change by `moves`, one row an example: pairs, the positive alone, the negative alone.
    """

    def __init__(self, s: Stratum) -> None:
        p = s.pairs
        self.weight = s.weight
        self._sums = s.positive.sum(axis=0), s.negative.sum(axis=0)
        self._sizes = s.positive_size.sum(), s.negative_size.sum()
        self._moves = np.vstack([s.negative[:p] - s.positive[:p], -s.positive[p:], s.negative[p:]])
        self._size_moves = np.concatenate(
            [
                s.negative_size[:p] - s.positive_size[:p],
                -s.positive_size[p:],
                s.negative_size[p:],
            ]
        )
        self.examples = len(self._size_moves)

    def differences(self, swaps: Array) -> Array:
        """[draws, experts] for `swaps` [draws, examples]."""
        moved, resized = swaps @ self._moves, (swaps @ self._size_moves)[:, None]
        out = (self._sums[0] + moved) / (self._sizes[0] + resized)
        np.subtract(self._sums[1], moved, out=moved)
        moved /= self._sizes[1] - resized
        out -= moved
        out *= self.weight
        return out


def q_values(p: Array) -> Array:
    """Benjamini-Hochberg q-values over all experts: the false discovery rate at each p-value."""
    return stats.false_discovery_control(p, method="bh")


def effect_sizes(strata: Sequence[Stratum]) -> Array:
    """The standardised difference [experts]; NaN where examples don't vary but differ.

    Of pairs, Cohen's d_z: the mean of the differences over their standard deviation. Otherwise
    Hedges' g: the difference of the conditions' means over the pooled standard deviation, times
    the correction for few examples J = Γ(df / 2) / (sqrt(df / 2) Γ((df - 1) / 2)) (Hedges 1981).
    Both take deviations from the means of strata.
    """
    mean = np.zeros(strata[0].positive.shape[1])
    squares, df, correction = np.zeros_like(mean), 0, 1.0
    paired = is_paired(strata)
    for s in strata:
        samples = (s.differences,) if paired else s.rates()
        means = [sample.mean(axis=0) for sample in samples]
        mean += s.weight * (means[0] if paired else means[0] - means[1])
        for sample, middle in zip(samples, means, strict=True):
            squares += ((sample - middle) ** 2).sum(axis=0)
            df += len(sample) - 1
    if not paired and df > 1:
        log_j = special.gammaln(df / 2) - special.gammaln((df - 1) / 2) - np.log(df / 2) / 2
        correction = float(np.exp(log_j))
    # What is left of the squares of equal numbers by rounding is no variation.
    deviation = np.sqrt(np.where(squares > _TIE**2, squares, 0) / df) if df else np.zeros_like(mean)
    with np.errstate(divide="ignore", invalid="ignore"):
        effect = correction * mean / deviation
    effect[deviation == 0] = np.nan
    effect[np.abs(mean) <= _TIE] = 0.0
    return effect
