"""What a report says of an evaluation besides numbers: what was compared, settings, masks."""

import base64
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from moescope.analysis.report_numbers import (
    EVAL,
    TUNE,
    UTILITY,
    Side,
    change_text,
    level_text,
    metric_words,
)

# Not among the settings that are listed: shown elsewhere.
_ELSEWHERE = ("arms", "headline.tuning", "ranking.settings", "specimen.sha256", "stability")
_LONG = 300  # characters of a list that is shown whole


def rd_facts(settings: Mapping[str, Any]) -> str:
    """How the ranking was made, in a line; what it doesn't say is left out."""
    facts = []
    for side in ("positive", "negative"):
        requests, tokens = (settings.get(f"{name}_{side}") for name in ("examples", "tokens"))
        if requests is not None and tokens is not None:
            facts.append(f"{settings.get(side)}: {requests:,} requests, {tokens:,} tokens")
    for name in ("segment", "estimator"):
        if settings.get(name):
            facts.append(f"{name} {settings[name]}")
    facts += ["gate weights"] * bool(settings.get("gate_mass"))
    facts += ["length-matched"] * bool(settings.get("length_match"))
    return "; ".join(facts)


def compared(side: Side) -> dict[str, str]:
    """What was compared, as rows of a table; what isn't known is left out."""
    settings, arms, facts = side.settings, side.arms(), side.rd_settings()
    steered, headline = arms.get("steered") or {}, settings.get("headline") or {}
    draws = sum(arm.get("role") == "random" and "/" not in arm["arm"] for arm in arms.values())
    tuning = sum(count for _, _, count in counts_by_kind(side, TUNE))
    rule = str(headline.get("rule") or "")
    chosen = [rule] * bool(rule) + [f"{tuning:,} tuning examples"] * bool(tuning)
    held_out: dict[str, list[str]] = {}
    for axis, kind, count in counts_by_kind(side):
        held_out.setdefault(axis, []).append(f"{count:,} {(kind or axis).replace('_', ' ')}")
    rows = {
        "model": model_text(settings.get("model")),
        "ranking": f"{facts['positive']} minus {facts['negative']}" if "positive" in facts else "",
        "traced": rd_facts(facts),
        "mask": f"{steered['experts']} experts, {steered['strength']}"
        + (" (SteerMoE's rule)" if settings.get("mode") == "steermoe" else "")
        if steered.get("experts")
        else "",
        "dose chosen by": "; ".join(chosen),
        "control": f"{draws} draws of random experts, as many in each layer" if draws else "none",
        "held-out examples": "; ".join(
            ("" if axis == side.axis else f"{axis}: ") + ", ".join(kinds)
            for axis, kinds in held_out.items()
        ),
        "judge": settings["judge"] if isinstance(settings.get("judge"), str) else "",
        "evaluated": str(settings.get("created") or "")[:10],
    }
    return {name: text for name, text in rows.items() if text}


def model_text(model: Any) -> str:
    """The model's name."""
    if isinstance(model, dict):
        return str(model.get("name") or model.get("model") or model.get("path") or "a model")
    return str(model or "a model")


def is_benign(settings: Mapping[str, Any]) -> bool:
    """Whether the evaluation says that its forbidden requests stand in for harmful ones."""
    return bool((settings.get("items") or {}).get("benign_stand_ins"))


def specimen(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Whether the model is a specimen, and whether it was trained under the intervention.

    eval.json has the model folder's specimen.json, whole or its recipe, under "specimen".
    """
    about = settings.get("specimen")
    if not isinstance(about, dict):
        return None
    recipe = about.get("recipe", about)
    return {"planted": bool(recipe.get("planted")), "seed": recipe.get("seed")}


def settings_lines(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Settings as name and text: nested ones as paths, counts in one line, long lists counted."""
    lines: list[tuple[str, str]] = []

    def add(name: str, value: Any) -> None:
        if name in _ELSEWHERE:
            return
        if name.endswith("counts") and isinstance(value, dict):
            lines.append((name, ", ".join(f"{key} {count}" for key, count in value.items())))
        elif isinstance(value, dict):
            for key, inner in value.items():
                add(f"{name}.{key}" if name else str(key), inner)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for number, inner in enumerate(value, 1):
                add(f"{name}.{number}", inner)
        elif isinstance(value, list):
            whole = " ".join(map(str, value))
            lines.append((name, whole if len(whole) <= _LONG else f"{len(value):,} entries"))
        elif isinstance(value, str):
            lines.append((name, value))
        else:
            lines.append((name, json.dumps(value, ensure_ascii=False)))

    add("", dict(settings))
    return lines


def tuning_table(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the tuning items said of each dose, if the headline dose was chosen by them."""
    headline = settings.get("headline") or {}
    rows = headline.get("tuning") or []
    if not rows:
        return None
    metric = str(headline.get("metric") or "")
    chosen = headline.get("experts"), headline.get("strength")
    return {
        "metric": metric_words(metric),
        "rows": [
            {
                "experts": str(row["experts"]),
                "strength": row["strength"],
                "value": level_text(metric, row["value"]),
                "gain": change_text(metric, row["gain"]),
                "utility": level_text(UTILITY, row["utility"]),
                "loss": change_text(UTILITY, -row["loss"]),
                "chosen": (row["experts"], row["strength"]) == chosen,
            }
            for row in rows
        ],
    }


def counts_by_kind(side: Side, split: str = EVAL) -> list[tuple[str, str, int]]:
    """How many examples of each axis and kind were measured."""
    outcomes = side.evaluation.outcomes.select(["axis", "kind", "example_id", "split"])
    seen = {tuple(row.values()) for row in outcomes.to_pylist() if row["split"] == split}
    counts = Counter((axis, kind) for axis, kind, _, _ in seen)
    return [(axis, kind, count) for (axis, kind), count in sorted(counts.items())]


def arms_table(side: Side) -> list[dict[str, Any]]:
    """What each arm is, with its mask's hash."""
    return [
        {
            "arm": arm["arm"],
            "role": arm.get("role") or "",
            "experts": "" if arm.get("experts") is None else str(arm["experts"]),
            "strength": arm.get("strength") or "",
            "seed": "" if arm.get("seed") is None else str(arm["seed"]),
            "sha256": arm.get("mask_sha256") or "",
        }
        for arm in side.settings["arms"]
    ]


def masks(side: Side) -> list[dict[str, str]]:
    """The headline arms' masks as JSON, and as a data address to save them from."""
    found = []
    for arm in side.settings["arms"]:
        if arm.get("mask") and "/" not in arm["arm"]:
            text = json.dumps(arm["mask"], indent=2, ensure_ascii=False) + "\n"
            encoded = base64.b64encode(text.encode()).decode()
            found.append(
                {
                    "arm": arm["arm"],
                    "file": f"{side.axis}-{arm['arm']}.json",
                    "text": text,
                    "address": f"data:application/json;base64,{encoded}",
                    "sha256": arm.get("mask_sha256") or "",
                }
            )
    return found
