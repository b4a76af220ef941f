"""Sentences say what the effects table allows, and no more."""

import math

import numpy as np
import pyarrow as pa
import pytest
from evaluations import Made, make_evaluation

from moescope.analysis.evaluation import EFFECTS, Evaluation
from moescope.analysis.report_axes import compare_axes
from moescope.analysis.report_numbers import Side, change_text, level_text, mean_interval
from moescope.analysis.report_verdict import claim_text, numbers_text, verdict_lines

EFFECT = {
    "arm": "steered", "axis": "safety", "kind": "forbidden", "metric": "refused", "split": "eval",
    "n": 1200, "base": 0.531, "value": 0.702, "delta": 0.171, "ci_low": 0.1, "ci_high": 0.24,
    "p_value": 0.001, "test": "mcnemar", "q_value": 0.002,
    "control_delta": -0.004, "control_low": -0.02, "control_high": 0.012,
    "vs_control": 0.175, "vs_control_low": 0.1, "vs_control_high": 0.25, "verdict": "up",
}  # fmt: skip
NO_CONTROL = {"control_delta": None, "control_low": None, "control_high": None}


def test_an_effect_with_all_its_numbers():
    assert claim_text(EFFECT) == "refusals (forbidden) up"
    assert numbers_text(EFFECT).replace("\N{MINUS SIGN}", "-") == (
        "53.1 % to 70.2 % (+17.1 points; 95 % interval +10.0 to +24.0; "
        "random experts -0.4, draws -2.0 to +1.2; n = 1,200)"
    )


@pytest.mark.parametrize(
    ("change", "claim"),
    [
        ({"ci_low": -0.01}, "no effect on refusals (forbidden)"),
        ({"ci_low": None, "ci_high": None}, "no effect on refusals (forbidden)"),
        ({}, "no effect on refusals (forbidden) beyond that of random experts"),
        (NO_CONTROL, "no effect shown on refusals (forbidden), for want of a random control"),
    ],
)
def test_no_effect_and_why(change, claim):
    assert claim_text({**EFFECT, "verdict": "no effect", **change}) == claim
    if change is NO_CONTROL:
        assert "no random control" in numbers_text({**EFFECT, **change})


def test_no_effect_beyond_the_control_says_by_how_much():
    effect = {**EFFECT, "verdict": "no effect", "vs_control_low": -0.03}
    text = numbers_text(effect).replace("\N{MINUS SIGN}", "-")
    assert "; difference from them +17.5, -3.0 to +25.0; n = 1,200)" in text
    for other in (
        EFFECT,
        {**effect, "ci_low": -0.01},
        {**effect, **NO_CONTROL, "vs_control": None},
    ):
        assert "difference from them" not in numbers_text(other)


def test_five_lines_for_two_axes(tmp_path):
    """In the order of the axes, whatever the order they come in."""
    quick = {"n": 30, "doses": (4,), "strengths": ("deactivate",)}
    made = [
        make_evaluation(tmp_path / "s", Made(axis="safety", gain=0.45, **quick)),
        make_evaluation(tmp_path / "f", Made(gain=0.45, **quick)),
    ]
    lines = verdict_lines(made)
    starts = [
        "Faithfulness, steered towards with_doc: document-following (conflict) up, ",
        "Faithfulness, steered towards without_doc: document-following (conflict) down, ",
        "Safety, steered towards safe: refusals (forbidden) up, ",
        "Safety, steered towards unsafe: refusals (forbidden) down, ",
        "Experts: ",
    ]
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts
    for line in lines[:4]:
        assert ". Utility " in line
    assert "rank correlation 0.93 (0.88 to 0.96 over random halves)" in lines[4]
    # Two of one axis are told apart, and their experts are not called two axes.
    lines = verdict_lines([made[1], made[1]], ["one", "two"])
    assert lines[0].startswith("Faithfulness (one), steered")
    assert lines[2].startswith("Faithfulness (two), steered")
    assert "only the faithfulness axis" in lines[4]


def side(name, values):
    rows = [{"layer": at // 4, "expert": at % 4, "rd": rd} for at, rd in enumerate(values)]
    settings = {"axis": name, "model": "m", "arms": []}
    table = pa.Table.from_pylist(rows)
    return Side(Evaluation(settings, table, *[pa.Table.from_pylist([], EFFECTS)] * 3), name)


def test_axes_that_are_the_same_opposite_and_apart():
    values = [0.9, -0.8, 0.1, 0.0, 0.05, -0.02, 0.03, 0.01]
    first = side("a", values)
    same = compare_axes(first, side("b", values))
    assert (same.top, same.rho, same.shared) == (2, pytest.approx(1), [(0, 0), (0, 1)])
    assert same.by_chance == 0.5
    assert same.p_chance == pytest.approx(1 / math.comb(8, 2))
    opposite = compare_axes(first, side("b", [-value for value in values]))
    assert (opposite.rho, opposite.rho_magnitude) == (pytest.approx(-1), pytest.approx(1))
    apart = compare_axes(first, side("b", [0.0] * 6 + [0.5, -0.4]))
    assert apart.shared == []
    assert apart.p_chance == 1
    assert [apart.group(expert) for expert in [(0, 0), (1, 3), (0, 3)]] == [
        "first",
        "second",
        "neither",
    ]
    assert math.isnan(compare_axes(first, side("b", [0.0] * 8)).rho)
    assert compare_axes(first, side("b", values[:4])) is None


def test_intervals_of_means():
    # Wilson's interval for 8 of 10: Agresti & Coull, The American Statistician 52, 1998.
    assert mean_interval(np.array([1.0] * 8 + [0.0] * 2)) == pytest.approx(
        (0.8, 0.4902, 0.9433), abs=5e-5
    )
    mean, low, high = mean_interval(np.array([0.1, 0.2, 0.3]))
    assert (mean, high - mean) == pytest.approx((0.2, 4.302653 * 0.1 / math.sqrt(3)))
    assert mean - low == pytest.approx(high - mean)


def test_numbers_as_they_are_read():
    assert change_text("refused", -0.0004) == "+0.0"
    assert change_text("refused", -0.004) == "\N{MINUS SIGN}0.4"
    assert change_text("nll", -0.0123) == "\N{MINUS SIGN}0.012"
    assert level_text("kl", 0.0123) == "0.012"
    assert level_text("refused", None) == level_text("refused", math.nan) == "\N{EN DASH}"
