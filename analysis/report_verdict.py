"""The verdict in a few sentences, made from the numbers alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moescope.analysis.evaluation import ALL_KINDS, Evaluation
from moescope.analysis.report_axes import comparable, correlation_text, overlap_text
from moescope.analysis.report_numbers import (
    ABSENT,
    UTILITY,
    Row,
    Side,
    change_text,
    correlation_number,
    is_absent,
    level_text,
    metric_words,
    range_text,
)

NO_EFFECT = "no effect"


def name_sides(evaluations: Sequence[Evaluation], names: Sequence[str] | None = None) -> list[Side]:
    """The evaluations by axis, faithfulness first; `names` tell several of one axis apart."""
    names = names or [str(at + 1) for at in range(len(evaluations))]
    axes = [str(evaluation.settings.get("axis", "")) for evaluation in evaluations]
    sides = [
        Side(evaluation, axis if axes.count(axis) == 1 else f"{axis} ({name})")
        for evaluation, axis, name in zip(evaluations, axes, names, strict=True)
    ]
    order = ["faithfulness", "safety"]
    return sorted(sides, key=lambda side: order.index(side.axis) if side.axis in order else 2)


@dataclass(frozen=True, slots=True)
class Line:
    """A sentence of the verdict: what it is about, what was found, and the numbers behind it."""

    subject: str
    claim: str
    facts: str = ""

    def __str__(self) -> str:
        return f"{self.subject}: {self.claim}{self.facts}"


def verdict_lines(
    evaluations: Sequence[Evaluation], names: Sequence[str] | None = None
) -> list[str]:
    """What was found, in plain text: for each axis the two directions, then the experts.

    Five lines for an evaluation of each axis. An effect is called one only where the effects
    table does: its interval is clear of 0 and the difference from the random control's, too.
    """
    return [str(line) for line in verdict(name_sides(evaluations, names))]


def verdict(sides: Sequence[Side]) -> list[Line]:
    """The lines of `verdict_lines` in their parts."""
    return [*(line for side in sides for line in side_lines(side)), experts_line(sides)]


def side_lines(side: Side) -> list[Line]:
    """Two lines: steered towards the ranking's positive condition, and away from it."""
    main = side.main_metric
    if main is None:
        return [Line(side.title, "nothing was measured that could tell an effect.")]
    settings = side.rd_settings()
    directions = {
        "steered": f"towards {settings.get('positive', 'the positive condition')}",
        "reverse": f"towards {settings.get('negative', 'the negative condition')}",
    }
    return [
        _direction_line(side, arm, words, *main)
        for arm, words in directions.items()
        if arm in side.arms()
    ]


def _direction_line(side: Side, arm: str, direction: str, kind: str, metric: str) -> Line:
    effect = side.effect(arm, side.axis, kind, metric)
    subject = f"{side.title}, steered {direction}"
    if effect is None:
        return Line(subject, "not measured.")
    return Line(
        subject, claim_text(effect), f", {numbers_text(effect)}. {_utility_text(side, arm)}"
    )


def _utility_text(side: Side, arm: str) -> str:
    utility = side.effect(arm, UTILITY, ALL_KINDS, UTILITY)
    if utility is None:
        return "Utility was not measured."
    change = f"{change_text(UTILITY, utility['delta'])} points"
    interval = range_text(UTILITY, utility["ci_low"], utility["ci_high"])
    return f"Utility {change}" + (f" ({interval})." if interval != ABSENT else ".")


def numbers_text(effect: Row) -> str:
    """The numbers of an effect: base and arm, the change and its interval, the control."""
    metric = effect["metric"]
    levels = f"{level_text(metric, effect['base'])} to {level_text(metric, effect['value'])}"
    facts = [f"{change_text(metric, effect['delta'])} points"]
    interval = range_text(metric, effect["ci_low"], effect["ci_high"])
    if interval != ABSENT:
        facts.append(f"95 % interval {interval}")
    facts.append(control_text(effect))
    if _only_against_base(effect):
        against = range_text(metric, effect["vs_control_low"], effect["vs_control_high"])
        facts.append(f"difference from them {change_text(metric, effect['vs_control'])}, {against}")
    facts.append(f"n = {effect['n']:,}")
    return f"{levels} ({'; '.join(facts)})"


def control_text(effect: Row) -> str:
    """What random experts did in the same numbers."""
    metric, control = effect["metric"], effect["control_delta"]
    if is_absent(control):
        return "no random control"
    draws = range_text(metric, effect["control_low"], effect["control_high"])
    text = f"random experts {change_text(metric, control)}"
    return text if draws == ABSENT else f"{text}, draws {draws}"


def claim_text(effect: Row) -> str:
    """What may be said of an effect, such as "refusals (forbidden) up" or "no effect on ..."."""
    what = metric_words(effect["metric"], effect["kind"])
    if effect["verdict"] in ("up", "down"):
        return f"{what} {effect['verdict']}"
    if not _clear_of_base(effect):
        return f"{NO_EFFECT} on {what}"
    if is_absent(effect["control_delta"]):
        return f"{NO_EFFECT} shown on {what}, for want of a random control"
    return f"{NO_EFFECT} on {what} beyond that of random experts"


def _clear_of_base(effect: Row) -> bool:
    low, high = effect["ci_low"], effect["ci_high"]
    return not is_absent(low) and not is_absent(high) and (low > 0 or high < 0)


def _only_against_base(effect: Row) -> bool:
    """Whether the interval is clear of 0 and the one against the control is not."""
    no_effect = effect["verdict"] not in ("up", "down")
    return no_effect and _clear_of_base(effect) and not is_absent(effect["vs_control"])


def experts_line(sides: Sequence[Side]) -> Line:
    """Whether the axes' experts differ, and whether the rankings are stable."""
    pair = comparable(sides)
    facts = ""
    if len({side.axis for side in sides}) < 2:
        claim = f"only the {sides[0].axis} axis was evaluated, so no axes are compared."
    elif pair is None:
        claim = "the rankings are of different models, so the axes' experts are not compared."
    else:
        claim, facts = overlap_text(pair), f"; {correlation_text(pair)}."
    stable = [
        f"{side.name} {text}" for side in sides if (text := stability_text(side.rd_settings()))
    ]
    facts += (
        f" Between two halves of the data: {'; '.join(stable)}."
        if stable
        else " The rankings' stability was not measured."
    )
    return Line("Experts", claim, facts)


def stability_text(rd_settings: Mapping[str, Any]) -> str | None:
    """How far the ranking agrees between halves of its data, if `moescope rd` measured it."""
    stability: Any = rd_settings.get("stability") or {}
    half = stability.get("split_half")
    if not half:
        return None
    rho, overlap = (half[name] for name in ("spearman", "overlap"))
    draws = " to ".join(correlation_number(rho[end]) for end in ("low", "high"))
    return (
        f"rank correlation {correlation_number(rho['mean'])} ({draws} over random halves), "
        f"{100 * overlap['mean']:.0f} % of the top {stability['top']} shared"
    )
