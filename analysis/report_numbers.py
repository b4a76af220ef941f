"""The numbers that a report shows: effects by arm, the axes compared, load, in words and points."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import stats

from moescope.analysis.evaluation import ALL_KINDS, Evaluation
from moescope.analysis.rd import METADATA_KEY, read_settings

Expert = tuple[int, int]  # layer, expert
Row = dict[str, Any]

EVAL, TUNE = "eval", "tune"
UTILITY = "utility"
# Stands where there is no number.
ABSENT = "\N{EN DASH}"
# Measured on a scale of their own; all other metrics are shares, shown as percentages.
NATS = ("nll", "kl")

# In the order to show them.
_WORDS = {
    "follows_document": "document-following",
    "p_document": "probability of the document's answer",
    "follows_memory": "memory-following",
    "p_memory": "probability of memory's answer",
    "exact_match": "exact match",
    "f1": "F1",
    "grounded": "grounded answers",
    "hallucinated": "hallucinated answers",
    "refused": "refusals",
    "p_refusal": "probability of the refusal",
    "p_refusal_first": "probability of the refusal's first word",
    "complied": "compliance",
    "p_compliance": "probability of the compliance",
    "over_refused": "over-refusal",
    UTILITY: "utility",
    "correct": "right choices",
    "correct_norm": "right choices, by byte",
    "nll": "loss on text",
    "kl": "KL to base",
}
# Of the steered axis, but a harm rather than the aim.
_HARMS = ("over_refused",)
# What part of the page an effect belongs to.
MAIN, OTHERS, SIDE = "main", "others", "side"
# axis -> the metrics that can be its main one, in order of preference, each with its kind.
_MAIN = {
    "faithfulness": [("conflict", "follows_document"), (ALL_KINDS, "exact_match")],
    "safety": [("forbidden", "refused")],
    UTILITY: [(ALL_KINDS, UTILITY)],
}


def number(value: float | None) -> float:
    """A table's number, NaN where there is none."""
    return math.nan if value is None else value


def is_absent(value: float | None) -> bool:
    """Whether a table has no number there."""
    return math.isnan(number(value))


def metric_words(metric: str, kind: str = ALL_KINDS) -> str:
    """A metric for people, with the kind of example it is of."""
    words = _WORDS.get(metric, metric.replace("_", " "))
    return f"{words} ({kind.replace('_', ' ')})" if kind else words


def scale_of(metric: str) -> tuple[float, str]:
    """What to multiply a value with to show it, and its unit then."""
    return (1.0, "nats a token") if metric in NATS else (100.0, "%")


def level_text(metric: str, value: float | None) -> str:
    """A metric's value, such as "53.3 %"."""
    if is_absent(value):
        return ABSENT
    return f"{number(value):.3f}" if metric in NATS else f"{100 * number(value):.1f} %"


def change_text(metric: str, value: float | None) -> str:
    """A difference with its sign: in points (without the word), or in nats."""
    if is_absent(value):
        return ABSENT
    text = f"{number(value):+.3f}" if metric in NATS else f"{100 * number(value):+.1f}"
    if float(text) == 0:
        text = text.replace("-", "+")
    return text.replace("-", "\N{MINUS SIGN}")


def range_text(metric: str, low: float | None, high: float | None) -> str:
    """An interval of differences, such as "+9.0 to +21.0"."""
    if is_absent(low) or is_absent(high):
        return ABSENT
    return f"{change_text(metric, low)} to {change_text(metric, high)}"


def probability_text(value: float | None) -> str:
    """A p- or q-value."""
    if is_absent(value):
        return ABSENT
    return "< 0.001" if number(value) < 0.001 else f"{number(value):.3f}"


@dataclass(frozen=True)
class Side:
    """One evaluation as the report reads it."""

    evaluation: Evaluation
    name: str  # the axis, with the folder's name where several evaluations are of one axis

    @property
    def settings(self) -> dict[str, Any]:
        """The evaluation's eval.json."""
        return self.evaluation.settings

    @property
    def axis(self) -> str:
        """The axis that was steered along."""
        return str(self.settings.get("axis", ""))

    @property
    def title(self) -> str:
        """The name with a capital."""
        return self.name[:1].upper() + self.name[1:]

    def arms(self) -> dict[str, Row]:
        """What each arm is, by its id."""
        return {arm["arm"]: arm for arm in self.settings["arms"]}

    def rd_settings(self) -> dict[str, Any]:
        """The ranking's settings: from the table itself, else as the evaluation noted them."""
        if METADATA_KEY in (self.evaluation.ranking.schema.metadata or {}):
            return read_settings(self.evaluation.ranking)
        return dict((self.settings.get("ranking") or {}).get("settings") or {})

    def effects(self, split: str = EVAL) -> list[Row]:
        """The effects of a split, each with its arm's role, experts and strength.

        In the order to show them: the axis before utility, the main kind and totals first.
        """
        return [row for row in self._effects if row["split"] == split]

    @cached_property
    def _effects(self) -> list[Row]:
        arms, names = self.arms(), ("role", "experts", "strength")
        rows = [
            {**row, **{name: arms[row["arm"]].get(name) for name in names}}
            for row in self.evaluation.effects.to_pylist()
        ]
        return sorted(rows, key=lambda row: _place(row, self.axis))

    def effect(self, arm: str, axis: str, kind: str, metric: str) -> Row | None:
        """The effect of one arm on one metric, on the evaluation items."""
        wanted = {"arm": arm, "axis": axis, "kind": kind, "metric": metric}
        for row in self.effects():
            if all(row[name] == value for name, value in wanted.items()):
                return row
        return None

    @cached_property
    def main_metric(self) -> tuple[str, str] | None:
        """Kind and metric that the axis is judged by, the first there is of `_MAIN`."""
        rows = [row for row in self.effects() if row["axis"] == self.axis]
        there = {(row["kind"], row["metric"]) for row in rows}
        for kind, metric in _MAIN.get(self.axis, []):
            if (kind, metric) in there:
                return kind, metric
            kinds = sorted({found for found, name in there if name == metric})
            if kinds:
                return kinds[0], metric
        return None

    def part_of(self, row: Row) -> str:
        """Where an effect is shown: with the axis (its main kind, other kinds), or beside it."""
        if row["axis"] != self.axis or row["metric"] in _HARMS:
            return SIDE
        main = self.main_metric
        return MAIN if row["kind"] in (ALL_KINDS, main and main[0]) else OTHERS

    def mask_experts(self, arm: str = "steered") -> set[Expert]:
        """The experts that an arm's mask names."""
        mask = (self.arms().get(arm) or {}).get("mask") or {}
        return {(entry["layer"], entry["expert"]) for entry in mask.get("entries", [])}


def _place(row: Row, axis: str) -> tuple[Any, ...]:
    """Where an effect stands among the others of an evaluation of `axis`."""
    kind, metric, words = row["kind"], row["metric"], list(_WORDS)
    first = [ALL_KINDS]
    if row["axis"] != UTILITY:
        first = [*(kind for kind, _ in _MAIN.get(axis, [])), ALL_KINDS]
    return (
        row["axis"] == UTILITY,
        metric in NATS,
        first.index(kind) if kind in first else len(first),
        kind,
        words.index(metric) if metric in words else len(words),
        metric,
    )


def arm_levels(side: Side, kind: str, metric: str) -> list[Row]:
    """The metric's mean in each headline arm with a 95 % interval, from the outcomes.

    Wilson's for values of 0 and 1, Student's t otherwise.
    """
    rows = [
        row
        for row in side.evaluation.outcomes.to_pylist()
        if row["split"] == EVAL and row["metric"] == metric and row["axis"] == side.axis
        if kind in (ALL_KINDS, row["kind"])
    ]
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["arm"], []).append(row["value"])
    order = ("base", "steered", "reverse", "random")
    roles = {name: str(arm.get("role")) for name, arm in side.arms().items() if "/" not in name}
    there = [arm for arm in values if roles.get(arm) in order]
    levels = []
    for arm in sorted(there, key=lambda arm: (order.index(roles[arm]), arm)):
        mean, low, high = mean_interval(np.array(values[arm]))
        role = roles[arm]
        levels.append(
            {"arm": arm, "role": role, "n": len(values[arm]),
             "value": mean, "low": low, "high": high}
        )  # fmt: skip
    return levels


def mean_interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Mean and 95 % interval: Wilson's for shares, Student's t otherwise."""
    n, mean = len(values), float(values.mean())
    if np.isin(values, (0, 1)).all():
        interval = stats.binomtest(int(values.sum()), n).proportion_ci(method="wilson")
        return mean, float(interval.low), float(interval.high)
    half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0
    return mean, mean - half, mean + half


def doses(side: Side, kind: str, metric: str) -> tuple[str, dict[str, list[Row]]]:
    """The dose curve: its split, and for each strength rows of role, experts, effect, utility.

    On the evaluation items if the doses ran there, else on the tuning items.
    """
    for split in (EVAL, TUNE):
        found: dict[str, dict[tuple[str, int], Row]] = {}
        for row in side.effects(split):
            if row["role"] not in ("steered", "reverse") or not row["experts"]:
                continue
            key = (row["role"], row["experts"])
            if "/" not in row["arm"] and split == TUNE:
                continue
            what = _dose_part(row, side.axis, kind, metric)
            if what:
                point = found.setdefault(str(row["strength"]), {}).setdefault(
                    key, {"role": key[0], "experts": key[1], "effect": None, "utility": None}
                )
                point[what] = row
                point["headline"] = "/" not in row["arm"]
        points = sum(len(rows) for rows in found.values())
        if points > 2:  # more than the headline's two
            return split, {name: list(rows.values()) for name, rows in found.items()}
    return EVAL, {}


def _dose_part(row: Row, axis: str, kind: str, metric: str) -> str | None:
    if (row["axis"], row["kind"], row["metric"]) == (axis, kind, metric):
        return "effect"
    if (row["axis"], row["kind"], row["metric"]) == (UTILITY, ALL_KINDS, UTILITY):
        return "utility"
    return None


def load_by_layer(ranking: pa.Table) -> list[Row]:
    """How evenly each layer's experts are chosen, over the tokens of both conditions.

    An expert's load is its share of the layer's choices times the number of experts: 1 is even.
    `effective` is the number of experts that an even use would need for the same entropy.
    """
    layers: dict[int, dict[int, int]] = {}
    for row in ranking.select(["layer", "expert", "a1", "a2"]).to_pylist():
        layers.setdefault(row["layer"], {})[row["expert"]] = row["a1"] + row["a2"]
    load = []
    for layer, counts in sorted(layers.items()):
        chosen = np.array([counts[expert] for expert in sorted(counts)], dtype=float)
        shares = chosen / max(chosen.sum(), 1)
        used = shares[shares > 0]
        busiest = max(counts, key=lambda expert: (counts[expert], -expert))
        load.append(
            {
                "layer": layer,
                "loads": (shares * len(shares)).tolist(),
                "busiest": busiest,
                "busiest_load": float(shares.max() * len(shares)),
                "unused": int((chosen == 0).sum()),
                "effective": float(np.exp(-(used * np.log(used)).sum())) if len(used) else 0.0,
                "experts": len(shares),
            }
        )
    return load


def correlation_number(value: float) -> str:
    """A correlation or share with a real minus."""
    if math.isnan(value):
        return "undefined"
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")
