"""Effects: what is paired with what, worked by hand; coverage and false positives by simulation."""

import time

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import binom

from moescope.analysis.effects import effects
from moescope.analysis.evaluation import EFFECTS, OUTCOMES
from moescope.analysis.paired import (
    mcnemar_p,
    sign_flip_p,
    smoothed_interval,
    studentised_interval,
)
from moescope.tracer.errors import InputError


def describe(*names):
    return [{"arm": name, "role": name.split("/")[0].split("-")[0]} for name in names]


def outcomes(values, axis="faithfulness", kind="conflict", metric="m", split="eval"):
    """`values` {arm: [a value or None for each example]}."""
    rows = [
        {
            "arm": arm, "axis": axis, "task": "question", "kind": kind, "metric": metric,
            "example_id": f"{kind}-{index}", "split": split, "value": float(value),
        }
        for arm, each in values.items()
        for index, value in enumerate(each)
        if value is not None
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=OUTCOMES)


def by_arm(table, **wanted):
    rows = [r for r in table.to_pylist() if all(r[k] == v for k, v in wanted.items())]
    assert len({r["arm"] for r in rows}) == len(rows)
    return {r["arm"]: r for r in rows}


BASE = [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
STEERED = [1, 1, 1, 1, 1, 0, 1, 1, 1, 0]


def test_a_rate_by_hand():
    table = effects(outcomes({"base": BASE, "steered": STEERED}), describe("base", "steered"))
    assert table.schema == EFFECTS
    (row,) = table.to_pylist()
    assert (row["n"], row["base"], row["value"]) == (10, 0.4, 0.8)
    assert row["delta"] == pytest.approx(0.4)
    # Five up and one down: two-sided, 2 * P(at most 1 of 6 by a fair coin).
    assert row["p_value"] == pytest.approx(2 * binom.cdf(1, 6, 0.5)) == pytest.approx(7 / 32)
    assert row["q_value"] == pytest.approx(7 / 32)
    assert row["test"] == "mcnemar"
    assert row["ci_low"] < 0.4 < row["ci_high"]
    # Nothing to compare with: no verdict without a control.
    assert row["vs_control"] is None
    assert row["verdict"] == "no effect"


def test_pairs_are_of_the_same_example_whatever_the_order():
    table = outcomes({"base": BASE, "steered": STEERED})
    arms = describe("base", "steered")
    shuffled = table.take(np.random.default_rng(0).permutation(len(table)))
    assert effects(shuffled, arms) == effects(table, arms)


def test_only_examples_that_both_have():
    values = {
        "base": [0, 1, 0, None, 1, 1],
        "steered": [1, 1, None, 0, 1, 1],
        "reverse": [0, 0, 0, 0, 0, 0],
    }
    rows = by_arm(effects(outcomes(values), describe(*values)))
    assert (rows["steered"]["n"], rows["steered"]["base"], rows["steered"]["value"]) == (4, 0.75, 1)
    assert (rows["reverse"]["n"], rows["reverse"]["base"], rows["reverse"]["value"]) == (5, 0.6, 0)


def test_the_control_is_of_the_same_dose_and_without_the_arm_itself():
    values = {
        "base": [0, 0, 0, 0],
        "steered": [1, 1, 1, 0],
        "random-0": [1, 0, 0, 0],
        "random-1": [0, 0, 0, 0],
        "steered/n8/deactivate": [1, 1, 1, 1],
        "random-0/n8/deactivate": [1, 1, 0, 0],
        "random-1/n8/deactivate": [0, 0, 1, 1],
        "steered/n9/deactivate": [1, 1, 1, 1],
    }
    rows = by_arm(effects(outcomes(values), describe(*values)))

    def control(arm):
        return tuple(rows[arm][f"{name}"] for name in (
            "control_delta", "control_low", "control_high", "vs_control"))  # fmt: skip

    assert control("steered") == (0.125, 0, 0.25, 0.625)
    assert control("steered/n8/deactivate") == (0.5, 0.5, 0.5, 0.5)
    assert control("random-0") == (0, 0, 0, 0.25)
    assert control("random-1") == (0.25, 0.25, 0.25, -0.25)
    assert control("steered/n9/deactivate") == (None, None, None, None)


def test_the_interval_against_the_control_is_paired():
    """Masks that do the same to the same examples differ by nothing, however much they do."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 5, 60)
    noise -= noise.mean()
    values = {"base": np.zeros(60), "steered": noise + 1}
    values |= {f"random-{i}": noise for i in range(3)}
    row = by_arm(effects(outcomes(values), describe(*values)))["steered"]
    assert row["ci_low"] < 0 < row["ci_high"]
    assert row["vs_control_low"] == pytest.approx(1)
    assert row["vs_control_high"] == pytest.approx(1)
    assert row["verdict"] == "no effect"


def test_random_masks_that_differ_widen_the_interval():
    """By Student's t of what they differ, worked by hand: four masks, no noise of examples."""
    values = {"base": np.zeros(50), "steered": np.full(50, 4.0)}
    values |= {f"random-{i}": np.full(50, float(i)) for i in range(4)}
    row = by_arm(effects(outcomes(values), describe(*values)))["steered"]
    assert row["vs_control"] == 2.5
    half = 3.182446 * np.std([0, 1, 2, 3], ddof=1) / 2
    assert row["vs_control_low"] == pytest.approx(2.5 - half, abs=1e-5)
    assert row["vs_control_high"] == pytest.approx(2.5 + half, abs=1e-5)
    assert (row["control_low"], row["control_high"]) == (0, 3)
    assert row["verdict"] == "up"


def test_all_kinds_of_an_axis_and_none_for_a_single_one():
    both = pa.concat_tables(
        [
            outcomes({"base": [0, 0], "steered": [1, 0]}, kind="a"),
            outcomes({"base": [1, 1, 1, 1], "steered": [0, 0, 1, 1]}, kind="b"),
            outcomes({"base": [1], "steered": [1]}, kind="b", metric="other"),
        ]
    )
    table = effects(both, describe("base", "steered"))
    got = {(r["kind"], r["metric"]): (r["n"], r["base"], r["value"]) for r in table.to_pylist()}
    assert got == {
        ("a", "m"): (2, 0, 0.5),
        ("b", "m"): (4, 1, 0.5),
        ("", "m"): (6, 4 / 6, 0.5),
        ("b", "other"): (1, 1, 1),
    }


def test_utility_is_the_mean_over_kinds():
    both = pa.concat_tables(
        [
            outcomes({"base": [1] * 40, "steered": [0] * 40}, "utility", "sums", "exact_match"),
            outcomes({"base": [1] * 120, "steered": [1] * 120}, "utility", "choice", "correct"),
            outcomes({"base": [9] * 6, "steered": [8] * 6}, "utility", "choice", "correct_norm"),
        ]
    )
    rows = effects(both, describe("base", "steered")).to_pylist()
    assert [r["metric"] for r in rows if r["kind"] == ""] == ["utility"]
    (row,) = [r for r in rows if r["metric"] == "utility"]
    assert (row["n"], row["base"], row["value"], row["delta"]) == (160, 1, 0.5, -0.5)
    assert row["test"] == "sign-flip"
    # Resampled within kinds: the choices always weigh a half.
    assert -0.55 < row["ci_low"] <= -0.5 < row["ci_high"] < -0.4


def test_utility_needs_no_control():
    values = {"base": [1] * 40, "steered": [0] * 30 + [1] * 10}
    (row, _) = effects(
        outcomes(values, "utility", "sums", "correct"), describe("base", "steered")
    ).to_pylist()
    assert row["verdict"] == "down"


def test_splits_are_apart():
    table = pa.concat_tables(
        [
            outcomes({"base": [0], "steered": [1]}, split="tune"),
            outcomes({"base": [1], "steered": [1]}, split="eval"),
        ]
    )
    rows = effects(table, describe("base", "steered")).to_pylist()
    assert [(r["split"], r["delta"]) for r in rows] == [("eval", 0), ("tune", 1)]


def test_the_base_has_no_divergence_from_itself():
    values = {"steered": [0.5, 0.25, 0.75] * 3}
    (row,) = effects(outcomes(values, metric="kl"), describe("base", "steered")).to_pylist()
    assert (row["base"], row["value"], row["n"]) == (0, 0.5, 9)


def test_q_values_are_of_the_headline_alone():
    values = {"base": [0] * 12, "steered": [1] * 12, "reverse": [0, 1] * 6}
    values |= {"random-0": [0] * 12, "steered/n1/deactivate": [1] * 12}
    rows = by_arm(effects(outcomes(values), describe(*values)))
    p = {arm: row["p_value"] for arm, row in rows.items()}
    assert rows["steered"]["q_value"] == pytest.approx(2 * p["steered"])
    assert rows["reverse"]["q_value"] == pytest.approx(p["reverse"])
    assert rows["random-0"]["q_value"] is rows["steered/n1/deactivate"]["q_value"] is None


def test_the_same_seed_gives_the_same_table():
    rng = np.random.default_rng(0)
    values = {"base": rng.normal(size=30), "steered": rng.normal(size=30)}
    arms, table = describe(*values), outcomes(values)
    assert effects(table, arms) == effects(table, arms)
    assert effects(table, arms, seed=1) != effects(table, arms)
    # Another metric beside it changes nothing.
    more = pa.concat_tables([table, outcomes(values | {"base": [0.0] * 30}, metric="a")])
    assert by_arm(effects(more, arms), metric="m") == by_arm(effects(table, arms))


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (outcomes({"base": [0], "other": [1]}), "the arm 'other'"),
        (outcomes({"base": [float("nan")], "steered": [1]}), "no finite number"),
        (
            pa.concat_tables([outcomes({"base": [0], "steered": [1]})] * 2),
            r"m of one example \(faithfulness, conflict, eval\) twice",
        ),
    ],
)
def test_what_can_t_be_compared(table, why):
    with pytest.raises(InputError, match=why):
        effects(table, describe("base", "steered"))


def test_without_a_base_or_without_anything():
    with pytest.raises(InputError, match="no arm"):
        effects(outcomes({"steered": [1]}), describe("steered"))
    assert effects(OUTCOMES.empty_table(), describe("base", "steered")).num_rows == 0


def test_too_few_examples_for_an_interval():
    values = {"base": [0.5, 2.0], "steered": [3.0, 7.0]}
    (row,) = effects(outcomes(values), describe(*values)).to_pylist()
    assert (row["ci_low"], row["ci_high"], row["verdict"]) == (None, None, "no effect")


# --- Tests and intervals --------------------------------------------------------------------------


def test_mcnemar_without_a_change():
    assert mcnemar_p(np.zeros((1, 9))).tolist() == [1]


def test_sign_flips_come_near_the_exact_share():
    """Of all 2^6 flips of 1..6, six sums are at least as far from 0 as 17."""
    differences = np.array([[1.0, 2.0, -2.0, 4.0, 5.0, 7.0]])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1)
    exact = np.mean(np.abs(differences[0] @ signs) >= 17)
    assert sign_flip_p([differences], resamples=20_000)[0] == pytest.approx(exact, abs=0.01)
    assert sign_flip_p([np.ones((1, 40))], resamples=99)[0] == 1 / 100
    assert sign_flip_p([np.zeros((1, 4))])[0] == 1


def test_no_change_in_a_hundred_is_no_certainty():
    low, high = smoothed_interval([np.zeros((1, 100))])[:, 0]
    # The rule of three says 3 %.
    assert -0.04 < low < -0.015
    assert 0.015 < high < 0.04


def test_studentised_is_students_interval_for_normal_differences():
    rng = np.random.default_rng(0)
    sample = rng.normal(2, 3, (1, 60))
    low, high = studentised_interval([sample], resamples=20_000)[:, 0]
    half = 2.0010 * sample.std(ddof=1) / np.sqrt(60)
    assert low == pytest.approx(sample.mean() - half, abs=0.12)
    assert high == pytest.approx(sample.mean() + half, abs=0.12)


def pairs(up, down):
    def draw(rng, shape):
        chance = rng.random(shape)
        return (chance < up) * 1.0 - (chance > 1 - down)

    return draw, up - down


def lognormal(rng, shape):
    return rng.lognormal(0, 0.7, shape)


def f1_like(rng, shape):
    return (rng.random(shape) < 0.3) * np.sign(rng.random(shape) - 0.4) * rng.beta(2, 1.5, shape)


RATES = {"2 up": (0.02, 0.0), "1 up, 1 down": (0.01, 0.01), "10 up, 2 down": (0.1, 0.02),
         "20 up, 5 down": (0.2, 0.05), "40 up, 2 down": (0.4, 0.02), "48 up": (0.48, 0.0),
         "15 up, 15 down": (0.15, 0.15)}  # fmt: skip
CASES = {name: (*pairs(*rates), smoothed_interval) for name, rates in RATES.items()} | {
    "F1, 30 % changed": (f1_like, 0.3 * 0.2 * 2 / 3.5, smoothed_interval),
    "normal": (lambda rng, shape: rng.normal(0.3, 1, shape), 0.3, studentised_interval),
    "lognormal": (lognormal, float(np.exp(0.245)), studentised_interval),
}


def test_coverage(capsys):
    """How often an interval of 95 % has the truth in it: never far below, above for rare changes.

    The plain percentile bootstrap, in the last column, is why there is smoothing.
    """
    rng = np.random.default_rng(7)
    lines, covered = [], {}
    for n in (50, 120, 400):
        for name, (draw, truth, interval) in CASES.items():
            sample = np.asarray(draw(rng, (1000, n)))
            low, high = interval([sample], resamples=1000)
            covered[name, n] = np.mean((low <= truth + 1e-12) & (truth - 1e-12 <= high))
            counts = rng.multinomial(n, np.full(n, 1 / n), 1000)
            low, high = np.quantile(sample @ counts.T / n, (0.025, 0.975), axis=1)
            plain = np.mean((low <= truth + 1e-12) & (truth - 1e-12 <= high))
            width = "smoothed" if interval is smoothed_interval else "studentised"
            lines.append(f"  {n:4} {name:20} {width:12} {covered[name, n]:.3f}   {plain:.3f}")
    with capsys.disabled():
        print("\ncoverage of 95 % intervals:  n, difference, interval, covered, plain percentile")
        print("\n".join(lines))
    assert min(covered.values()) > 0.90
    common = [
        c for (name, n), c in covered.items() if n > 50 and not name.startswith(("1 up", "2 up"))
    ]
    assert min(common) >= 0.93
    assert max(common) <= 0.975


# --- Verdicts -------------------------------------------------------------------------------------

N, REPEATS = 150, 250


def simulate(rng, shift, random_mean=0.0, random_sd=0.0, flips=0.1, masks=5):
    """`REPEATS` metrics, each a whole evaluation: how often steered has which verdict.

    Each example is 1 with its own chance under the base; under a mask some flip, and the chance
    shifts.
    """
    names = ["base", "steered", *(f"random-{i}" for i in range(masks))]
    shifts = np.zeros((REPEATS, len(names), 1))
    shifts[:, 1] = shift
    shifts[:, 2:] = rng.normal(random_mean, random_sd, (REPEATS, masks, 1))
    base = rng.random((REPEATS, 1, N)) < 0.5
    kept = np.where(
        rng.random((REPEATS, len(names), N)) < flips,
        rng.random((REPEATS, len(names), N)) < 0.5,
        base,
    )
    moved = rng.random(kept.shape) < 2 * np.abs(shifts)  # half of them are there already
    values = np.where(moved, shifts > 0, kept)
    values[:, 0] = base[:, 0]
    repeat, arm, example = (axis.ravel() for axis in np.indices(values.shape))
    text = [
        np.char.add(prefix, each.astype(str)) for prefix, each in (("m", repeat), ("e", example))
    ]
    table = pa.table(
        {
            "arm": np.array(names)[arm], "axis": ["safety"] * arm.size,
            "task": ["request"] * arm.size, "kind": ["forbidden"] * arm.size,
            "example_id": text[1], "split": ["eval"] * arm.size, "metric": text[0],
            "value": values.ravel().astype(float),
        }
    )  # fmt: skip
    found = effects(table.cast(OUTCOMES), describe(*names), resamples=500)
    verdicts = [row["verdict"] for row in found.to_pylist() if row["arm"] == "steered"]
    assert len(verdicts) == REPEATS
    return {name: verdicts.count(name) / REPEATS for name in ("up", "down", "no effect")}


def test_verdicts_by_simulation(capsys):
    """No effect where there is none, also where every mask does harm; an effect where one is."""
    rng = np.random.default_rng(11)
    found = {
        "nothing": simulate(rng, 0),
        "nothing, random masks differ": simulate(rng, 0, 0, 0.08),
        "every mask takes 15 points": simulate(rng, -0.15, -0.15),
        "so, and masks differ by 8": simulate(rng, -0.15, -0.15, 0.08),
        "steered gives 15 points": simulate(rng, 0.15),
        "so, and masks differ by 4": simulate(rng, 0.15, 0, 0.04),
    }
    with capsys.disabled():
        print(f"\nverdicts on {REPEATS} evaluations of {N} examples, 5 random masks:")
        for name, shares in found.items():
            print(
                f"  {name:32}", *(f"{verdict} {share:.3f}  " for verdict, share in shares.items())
            )
    for name in list(found)[:4]:
        assert found[name]["no effect"] >= 0.93, name
    assert found["nothing"]["no effect"] >= 0.96
    assert found["steered gives 15 points"]["up"] >= 0.95
    assert found["so, and masks differ by 4"]["up"] >= 0.7


def test_forty_arms_take_seconds():
    rng = np.random.default_rng(0)
    names = ["base", *(f"{arm}{dose}" for dose in ("", "/n1/x", "/n2/x", "/n4/x", "/n8/x")
             for arm in ("steered", "reverse", *(f"random-{i}" for i in range(6))))]  # fmt: skip
    arms, metrics, n = len(names), 10, 500
    repeat = [
        np.tile(np.repeat(names, n), metrics),
        np.tile([f"e{i}" for i in range(n)], arms * metrics),
    ]
    table = pa.table(
        {"arm": repeat[0], "example_id": repeat[1], "axis": ["safety"] * len(repeat[0]),
         "task": ["request"] * len(repeat[0]), "kind": ["forbidden"] * len(repeat[0]),
         "split": ["eval"] * len(repeat[0]),
         "metric": np.repeat([f"m{i}" for i in range(metrics)], arms * n),
         "value": rng.normal(size=arms * metrics * n)}
    )  # fmt: skip
    start = time.process_time()
    found = effects(table.cast(OUTCOMES) if table.schema == OUTCOMES else table, describe(*names))
    assert time.process_time() - start < 15
    assert found.num_rows == (arms - 1) * metrics
