"""The report's tables and example answers, as plain values and texts for the template."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from moescope.analysis.evaluation import ALL_KINDS, BASE
from moescope.analysis.report_numbers import (
    ABSENT,
    NATS,
    OTHERS,
    UTILITY,
    Expert,
    Row,
    Side,
    change_text,
    is_absent,
    level_text,
    metric_words,
    probability_text,
    range_text,
)

TOP_EXPERTS = 15
EXAMPLES_CHANGED, EXAMPLES_SAME = 4, 3
EXAMPLES_SEED = 0
ARMS = ("steered", "reverse")
# The same question asked in another way: among all comparisons only.
_MINOR = ("correct_norm",)


def top_experts(
    ranking: pa.Table, masks: dict[str, set[Expert]], top: int = TOP_EXPERTS
) -> dict[str, Any]:
    """The strongest experts; intervals and q-values where the ranking has them.

    `masks` says which experts each mask names.
    """
    there = set(ranking.column_names)
    columns = {
        "interval": {"ci_low", "ci_high"} <= there,
        "p": "p_value" in there,
        "q": "q_value" in there,
    }
    rows = sorted(
        ranking.to_pylist(), key=lambda row: (-abs(row["rd"]), row["layer"], row["expert"])
    )
    return {
        **columns,
        "masks": bool(masks),
        "rows": [
            {
                "layer": row["layer"],
                "expert": row["expert"],
                "rd": rd_text(row["rd"]),
                "interval": _rd_range(row) if columns["interval"] else "",
                "rate_positive": _rate_text(row.get("rate_positive")),
                "rate_negative": _rate_text(row.get("rate_negative")),
                "p": probability_text(row.get("p_value")),
                "q": probability_text(row.get("q_value")),
                "masks": ", ".join(
                    name
                    for name, experts in masks.items()
                    if (row["layer"], row["expert"]) in experts
                ),
            }
            for row in rows[:top]
        ],
    }


def rd_text(value: float | None) -> str:
    """A risk difference with its sign."""
    if is_absent(value):
        return ABSENT
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def _rd_range(row: Row) -> str:
    return f"{rd_text(row['ci_low'])} to {rd_text(row['ci_high'])}"


def _rate_text(value: float | None) -> str:
    return ABSENT if is_absent(value) else f"{value:.3f}"


def effect_table(side: Side, part: str) -> list[dict[str, Any]]:
    """One row a metric of MAIN, OTHERS or SIDE: base, both directions, and the control."""
    table: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in side.effects():
        if row["arm"] not in ARMS or row["metric"] in _MINOR or side.part_of(row) != part:
            continue
        key = (row["axis"], row["kind"], row["metric"])
        _add_effect(table, key, row, metric_words(row["metric"], row["kind"]), _texts(row))
        if row["metric"] == "nll":
            words = f"perplexity, base = 1 ({row['kind']})"
            _add_effect(table, (*key[:2], "perplexity"), row, words, _perplexity_texts(row))
    return list(table.values())


def _add_effect(
    table: dict[tuple[str, str, str], dict[str, Any]],
    key: tuple[str, str, str],
    row: Row,
    words: str,
    texts: dict[str, str],
) -> None:
    """Put one arm's effect into its line; the control is the same for both arms."""
    line = table.setdefault(
        key,
        {
            "metric": words,
            "n": f"{row['n']:,}",
            "base": texts["base"],
            "control": ABSENT,
            "control_range": "",
            "total": key == (UTILITY, ALL_KINDS, UTILITY),
            **dict.fromkeys(ARMS),
        },
    )
    # Base has no distance to itself, so every other one has: no verdict.
    verdict = "" if row["metric"] == "kl" else row["verdict"] or ""
    line[row["arm"]] = {**texts, "verdict": verdict}
    if row["arm"] == "steered":
        line["control"], line["control_range"] = texts["control"], texts["control_range"]


def _texts(row: Row) -> dict[str, str]:
    metric = row["metric"]
    draws = range_text(metric, row["control_low"], row["control_high"])
    return {
        "base": level_text(metric, row["base"]),
        "value": level_text(metric, row["value"]),
        "delta": change_text(metric, row["delta"]),
        "interval": range_text(metric, row["ci_low"], row["ci_high"]),
        "control": change_text(metric, row["control_delta"]),
        "control_range": "" if draws == ABSENT else draws,
    }


def _perplexity_texts(row: Row) -> dict[str, str]:
    """The same as ratios: a loss higher by d nats is a perplexity of exp(d) times base's."""
    names = ("delta", "ci_low", "ci_high", "control_delta", "control_low", "control_high")
    ratios = {
        name: ABSENT if is_absent(row[name]) else f"{math.exp(row[name]):.3f}" for name in names
    }
    return {
        "base": "1",
        "value": ratios["delta"],
        "delta": "",
        "interval": f"{ratios['ci_low']} to {ratios['ci_high']}",
        "control": ratios["control_delta"],
        "control_range": f"{ratios['control_low']} to {ratios['control_high']}",
    }


def forest_rows(side: Side) -> list[Row]:
    """The effects to plot: shares, of the axis' main kind and beside it."""
    return [
        row
        for row in side.effects()
        if row["arm"] in ARMS and row["metric"] not in (*NATS, *_MINOR)
        if side.part_of(row) != OTHERS and row["delta"] is not None
    ]


def all_effects(side: Side) -> list[dict[str, str]]:
    """Every comparison of the headline arms on the evaluation items, with its tests."""
    return [
        {
            "arm": row["arm"],
            "metric": metric_words(row["metric"], row["kind"]),
            "n": f"{row['n']:,}",
            "delta": change_text(row["metric"], row["delta"]),
            "interval": range_text(row["metric"], row["ci_low"], row["ci_high"]),
            "test": row["test"] or ABSENT,
            "p": probability_text(row["p_value"]),
            "q": probability_text(row["q_value"]),
            "vs_control": change_text(row["metric"], row["vs_control"]),
            "vs_interval": range_text(row["metric"], row["vs_control_low"], row["vs_control_high"]),
            "verdict": row["verdict"] or ABSENT,
        }
        for row in side.effects()
        if row["arm"] in ARMS
    ]


def dose_table(curves: dict[str, list[Row]], metric: str) -> list[dict[str, str]]:
    """The dose curve's points."""
    lines = []
    for strength, rows in curves.items():
        for row in sorted(rows, key=lambda row: (row["role"] != "steered", row["experts"])):
            line = {"strength": strength, "role": row["role"], "experts": str(row["experts"])}
            for what, name in (("effect", metric), ("utility", UTILITY)):
                found = row[what] or dict.fromkeys(("delta", "ci_low", "ci_high", "control_delta"))
                line[what] = change_text(name, found["delta"])
                line[f"{what}_interval"] = range_text(name, found["ci_low"], found["ci_high"])
                line[f"{what}_control"] = change_text(name, found["control_delta"])
            lines.append(line)
    return lines


def label_counts(side: Side) -> dict[str, Any]:
    """What the judge said, counted by kind and headline arm: shown where texts are not."""
    arms = _shown_arms(side)
    counts = Counter(
        (row["kind"], row["label"] or "no label", row["arm"])
        for row in side.evaluation.answers.select(["axis", "kind", "label", "arm"]).to_pylist()
        if row["axis"] == side.axis and row["arm"] in arms
    )
    lines = sorted({(kind, label) for kind, label, _ in counts})
    return {
        "arms": arms,
        "rows": [
            {"kind": kind, "label": label, "counts": [counts[kind, label, arm] for arm in arms]}
            for kind, label in lines
        ],
    }


def example_answers(side: Side, kind: str) -> dict[str, Any]:
    """Answers of the headline arms side by side, drawn by a fixed seed from two heaps.

    The heaps are the examples of `kind` whose answer differs between base and steered, and the
    others. Both are drawn from blindly.
    """
    arms = _shown_arms(side)
    by_example: dict[str, dict[str, Row]] = {}
    for row in side.evaluation.answers.to_pylist():
        if row["axis"] == side.axis and kind in (ALL_KINDS, row["kind"]) and row["arm"] in arms:
            by_example.setdefault(row["example_id"], {})[row["arm"]] = row
    whole = {
        example: answers
        for example, answers in sorted(by_example.items())
        if BASE in answers and "steered" in answers
    }
    changed = [
        example
        for example, answers in whole.items()
        if answers[BASE]["answer"].strip() != answers["steered"]["answer"].strip()
    ]
    same = [example for example in whole if example not in set(changed)]
    heaps = []
    for name, heap, number in (
        ("changed", changed, EXAMPLES_CHANGED),
        ("unchanged", same, EXAMPLES_SAME),
    ):
        drawn = random.Random(EXAMPLES_SEED).sample(heap, min(number, len(heap)))
        heaps.append(
            {
                "name": name,
                "total": len(heap),
                "examples": [_example(whole[example], arms) for example in sorted(drawn)],
            }
        )
    return {"arms": arms, "heaps": heaps, "total": len(whole), "seed": EXAMPLES_SEED}


def _example(answers: dict[str, Row], arms: Sequence[str]) -> dict[str, Any]:
    base = answers[BASE]
    return {
        "example_id": base["example_id"],
        "kind": base["kind"],
        "prompt": base["prompt"],
        "answers": [
            {
                "arm": arm,
                "answer": answers[arm]["answer"],
                "label": answers[arm]["label"],
                "differs": answers[arm]["answer"].strip() != base["answer"].strip(),
            }
            for arm in arms
            if arm in answers
        ],
    }


def _shown_arms(side: Side) -> list[str]:
    there = side.arms()
    randoms = sorted(
        arm for arm, facts in there.items() if facts.get("role") == "random" and "/" not in arm
    )
    return [arm for arm in (BASE, *ARMS, *randoms[:1]) if arm in there]


def load_table(load: Sequence[Row]) -> list[dict[str, str]]:
    """The load of each layer."""
    return [
        {
            "layer": str(row["layer"]),
            "effective": f"{row['effective']:.1f} of {row['experts']}",
            "busiest": f"{row['busiest']} ({row['busiest_load']:.2f})",
            "unused": str(row["unused"]),
        }
        for row in load
    ]
