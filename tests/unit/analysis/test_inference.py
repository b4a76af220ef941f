"""Intervals, p-values and effects: against scipy and statsmodels, and by simulation."""

import itertools

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestIndPower, TTestPower

from moescope.analysis import inference
from moescope.analysis.inference import Stratum
from moescope.analysis.power import power_note

SIZES = (8, 40)  # tokens of an example, from to


def stratum(positive, negative, pairs=0, weight=1.0):
    """Examples that have one request in each condition that they have."""
    ones = [np.ones(len(rates)) for rates in (positive, negative)]
    return Stratum(positive, ones[0], negative, ones[1], pairs, weight)


def load_of(strata):
    def load(columns):
        return [
            Stratum(
                s.positive[:, columns], s.positive_size, s.negative[:, columns], s.negative_size,
                s.pairs, s.weight,
            )
            for s in strata
        ]  # fmt: skip

    return load


def p_values(strata, resamples=2000, seed=0):
    return inference.permutation_p(strata, load_of(strata), resamples, seed)


def intervals(strata, resamples=1000, seed=0):
    draws = inference.bootstrap_differences(strata, resamples, np.random.default_rng(seed))
    return inference.bootstrap_interval(strata, draws)


def texts(rng, examples, experts, shift=0.0, pull=3.0):
    """Rates [examples, experts] of texts whose tokens are alike, so they vary more than a coin."""
    lengths = rng.integers(*SIZES, examples)
    middle = np.clip(0.15 + np.zeros(experts) + shift, 0.01, 0.99)
    rates = rng.beta(pull * middle, pull * (1 - middle), (examples, experts))
    return rng.binomial(lengths[:, None], rates), lengths


def rates(rng, examples, experts, shift=0.0):
    counts, lengths = texts(rng, examples, experts, shift)
    return counts / lengths[:, None]


# Against other libraries


@pytest.mark.parametrize("paired", [True, False])
def test_the_bootstrap_is_scipys(paired):
    rng = np.random.default_rng(1)
    a, b = rng.gamma(2, 0.1, 45), rng.gamma(2, 0.12, 45)
    s = stratum(a[:, None], b[:, None], pairs=45 * paired)
    ours = inference.bootstrap_differences([s], 20_000, np.random.default_rng(2))[:, 0]
    theirs = stats.bootstrap(
        (a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), paired=paired, vectorized=True,
        n_resamples=20_000, method="percentile", rng=np.random.default_rng(3),
    ).bootstrap_distribution  # fmt: skip
    assert ours.std() == pytest.approx(theirs.std(), rel=0.03)
    spread = theirs.std()
    for level in (0.01, 0.025, 0.5, 0.975, 0.99):
        assert abs(np.quantile(ours, level) - np.quantile(theirs, level)) < 0.08 * spread


def test_the_interval_is_students_for_a_normal_mean():
    """What the percentiles are expanded for: the t interval, to a factor of few examples."""
    rng = np.random.default_rng(4)
    for examples in (6, 12, 50):
        a = rng.normal(0.5, 0.1, (examples, 300))
        low, high = intervals([stratum(a, np.zeros_like(a), pairs=examples)], 4000)
        width = 2 * stats.t.ppf(0.975, examples - 1) * stats.sem(a, axis=0)
        close = 0.12 if examples < 10 else 0.04
        assert np.mean((high - low) / width) == pytest.approx(1, abs=close)


def test_sign_flips_of_few_pairs_are_scipys_exactly():
    rng = np.random.default_rng(5)
    a, b = rng.random((9, 20)).round(1), rng.random((9, 20)).round(1)  # with ties
    expected = stats.permutation_test(
        (a - b,), lambda x, axis: x.mean(axis), permutation_type="samples", n_resamples=np.inf,
        vectorized=True,
    ).pvalue  # fmt: skip
    assert p_values([stratum(a, b, pairs=9)]) == pytest.approx(expected, abs=1e-12)


def test_permutations_of_requests_are_scipys():
    rng = np.random.default_rng(6)
    a, b = rng.random((6, 30)), rng.random((5, 30)) + 0.3
    expected = stats.permutation_test(
        (a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), permutation_type="independent",
        n_resamples=np.inf, vectorized=True,
    ).pvalue  # fmt: skip
    found = p_values([stratum(a, b)], resamples=40_000)
    # Their two-sided p doubles the smaller tail, ours counts by magnitude.
    exact = []
    pool = np.concatenate([a, b])
    for chosen in itertools.combinations(range(11), 6):
        rest = [i for i in range(11) if i not in chosen]
        exact.append(pool[list(chosen)].mean(0) - pool[rest].mean(0))
    exact = (np.abs(exact) >= np.abs(a.mean(0) - b.mean(0)) - 1e-12).mean(0)
    assert np.abs(found - exact).max() < 0.012
    assert np.abs(exact - expected).max() < 0.15


def test_q_values_are_statsmodels():
    p = np.random.default_rng(7).random(200) ** 3
    assert inference.q_values(p) == pytest.approx(multipletests(p, method="fdr_bh")[1])


def test_effects_are_those_of_the_t_tests():
    rng = np.random.default_rng(8)
    a, b = rng.random((14, 10)), rng.random((14, 10)) + 0.1
    d_z = stats.ttest_rel(a, b).statistic / np.sqrt(14)
    assert inference.effect_sizes([stratum(a, b, pairs=14)]) == pytest.approx(d_z)
    b = b[:9]
    g = stats.ttest_ind(a, b).statistic * np.sqrt(1 / 14 + 1 / 9)
    small = 1 - 3 / (4 * 21 - 1)  # Hedges' approximation to the exact correction
    assert inference.effect_sizes([stratum(a, b)]) == pytest.approx(g * small, rel=1e-3)


def test_effects_without_variation():
    same = np.full((5, 3), 0.1)
    other = same + np.array([0, 0.2, 0.2])
    other[0, 2] = 0.7
    effect = inference.effect_sizes([stratum(other, same, pairs=5)])
    assert effect[0] == 0
    assert np.isnan(effect[1])
    assert effect[2] > 1


@pytest.mark.parametrize("paired", [True, False])
def test_the_power_is_statsmodels_where_that_can_solve(paired):
    note = power_note((40, 40), paired=paired, level=0.05)
    test, size = (TTestPower(), "nobs") if paired else (TTestIndPower(), "nobs1")
    for effect, needed in note.needed.items():
        solved = test.solve_power(float(effect), alpha=0.05, power=0.8, **{size: None})
        assert needed == np.ceil(solved)
    solved = test.solve_power(None, **{size: 40}, alpha=0.05, power=0.8)
    assert note.detectable == pytest.approx(float(np.squeeze(solved)), rel=1e-4)


def test_the_power_at_a_small_level_by_simulation():
    """statsmodels' own solver is wrong here: it says half as many."""
    level = 0.05 / 1664
    needed = power_note((9, 9), paired=True, level=level).needed["0.5"]
    rng = np.random.default_rng(9)
    found = stats.ttest_1samp(rng.normal(0.5, 1, (20_000, needed)), 0, axis=1).pvalue <= level
    assert found.mean() == pytest.approx(0.8, abs=0.012)


# By simulation


def coverage(make, truth, rounds, seed):
    rng, inside = np.random.default_rng(seed), []
    for index in range(rounds):
        low, high = intervals(make(rng), 1000, index)
        inside.append((low <= truth) & (truth <= high))
    return np.mean(inside)


def pairs_of_texts(rng, examples=25, experts=150):
    topic = rng.normal(0, 0.05, (examples, experts))  # both texts of a pair are about one thing
    a, b = rates(rng, examples, experts, topic + 0.1), rates(rng, examples, experts, topic)
    return [stratum(a, b, pairs=examples)]


def single_texts(rng):
    return [stratum(rates(rng, 40, 150, 0.1), rates(rng, 25, 150))]


def pooled_tokens(rng):
    (a, m), (b, n) = texts(rng, 30, 150, 0.1), texts(rng, 30, 150)
    return [Stratum(a * 1.0, m * 1.0, b * 1.0, n * 1.0, 0)]


def some_pairs(rng):
    a, b = rates(rng, 35, 150, 0.1), rates(rng, 40, 150)
    return [stratum(a, b, pairs=20)]


def two_topics(rng):
    return [
        stratum(rates(rng, 20, 150, 0.1), rates(rng, 30, 150), weight=0.4),
        stratum(rates(rng, 30, 150, 0.4), rates(rng, 20, 150, 0.3), weight=0.6),
    ]


@pytest.mark.parametrize(
    "make", [pairs_of_texts, single_texts, pooled_tokens, some_pairs, two_topics]
)
def test_intervals_cover_the_truth_as_often_as_they_say(make):
    rng = np.random.default_rng(10)
    truth = 0.1
    if make is pairs_of_texts:  # clipping moves it a little
        draws = [pairs_of_texts(rng, 4000, 5)[0].differences.mean() for _ in range(20)]
        truth = np.mean(draws)
    assert 0.93 <= coverage(make, truth, rounds=25, seed=11) <= 0.97


def test_a_token_level_interval_does_not_cover():
    """The cautionary tale: the same data, with every token taken for an example."""
    rng, inside = np.random.default_rng(12), []
    for _ in range(10):
        (a, m), (b, n) = texts(rng, 30, 150), texts(rng, 30, 150)
        p, q = a.sum(0) / m.sum(), b.sum(0) / n.sum()
        half = 1.96 * np.sqrt(p * (1 - p) / m.sum() + q * (1 - q) / n.sum())
        inside.append(np.abs(p - q) <= half)
    assert np.mean(inside) < 0.75


@pytest.mark.parametrize("paired", [True, False])
def test_the_false_discovery_rate_is_what_it_says(paired):
    rng, experts, planted = np.random.default_rng(13), 200, 40
    shift = np.where(np.arange(experts) < planted, 0.15, 0.0)
    wrong, found = [], []
    for seed in range(40):
        topic = rng.normal(0, 0.03, (40, experts))
        a, b = rates(rng, 40, experts, topic + shift), rates(rng, 40, experts, topic)
        # Experts are alike in twos, so their tests are correlated too.
        b[:, 1::2], a[:, 1::2] = 0.5 * (b[:, 1::2] + b[:, ::2]), 0.5 * (a[:, 1::2] + a[:, ::2])
        p = p_values([stratum(a, b, pairs=40 * paired)], resamples=1000, seed=seed)
        called = inference.q_values(p) <= 0.05
        wrong.append(called[planted:].sum() / max(called.sum(), 1))
        found.append(called[:planted].mean())
    # The rate is to be at most 5 % x 160/200 = 4 %; sampling leaves 1.5 points.
    assert np.mean(wrong) <= 0.055
    assert np.mean(wrong) >= 0.01  # and it isn't kept by finding nothing
    assert np.mean(found) > 0.5


@pytest.mark.parametrize("make", [pairs_of_texts, single_texts, some_pairs, pooled_tokens])
def test_p_values_are_uniform_where_nothing_differs(make):
    rng, found = np.random.default_rng(14), []
    for seed in range(12):
        [s] = make(rng)
        # One distribution for all: the conditions are dealt anew.
        pool = np.concatenate([s.positive[s.pairs :], s.negative[s.pairs :]])
        sizes = np.concatenate([s.positive_size[s.pairs :], s.negative_size[s.pairs :]])
        order, cut = rng.permutation(len(pool)), len(s.positive) - s.pairs
        heads = rng.integers(0, 2, s.pairs).astype(bool)
        first = np.where(heads[:, None], s.positive[: s.pairs], s.negative[: s.pairs])
        second = np.where(heads[:, None], s.negative[: s.pairs], s.positive[: s.pairs])
        null = Stratum(
            np.concatenate([first, pool[order[:cut]]]),
            np.concatenate([s.positive_size[: s.pairs], sizes[order[:cut]]]),
            np.concatenate([second, pool[order[cut:]]]),
            np.concatenate([s.negative_size[: s.pairs], sizes[order[cut:]]]),
            s.pairs,
        )
        found.append(p_values([null], resamples=500, seed=seed))
    found = np.concatenate(found)
    for level in (0.05, 0.2, 0.5):
        assert np.mean(found <= level) == pytest.approx(level, abs=0.35 * level**0.5 * 0.25)


def test_a_lone_expert_is_found_among_many():
    """With 1,000 resamples p is 0.001 at least, and q 0.6: so the few at the floor are refined."""
    rng = np.random.default_rng(15)
    a, b = rates(rng, 60, 600), rates(rng, 60, 600)
    a[:, 7] += 0.4
    p = p_values([stratum(a, b, pairs=60)], resamples=1000)
    assert p[7] < 1e-4
    assert inference.q_values(p)[7] < 0.01
    assert np.delete(p, 7).min() > 1e-5


def test_p_is_never_zero():
    """Where every expert differs clearly, p is what one of so many rearrangements is."""
    rng = np.random.default_rng(16)
    s = stratum(rates(rng, 30, 40, 0.7), rates(rng, 30, 40), pairs=30)
    assert p_values([s], resamples=999) == pytest.approx(1 / 1000)


def test_one_example_says_nothing():
    one = stratum(np.array([[0.1, 0.2]]), np.array([[0.3, 0.2]]), pairs=1)
    assert np.isnan(intervals([one])).all()
    assert (p_values([one]) == 1).all()
