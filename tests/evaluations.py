"""Made-up evaluations for tests of the report: random numbers of a chosen effect, no model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moescope.analysis.effects import effects
from moescope.analysis.evaluation import (
    ANSWERS,
    OUTCOMES,
    Evaluation,
    read_evaluation,
    write_evaluation,
)
from moescope.analysis.rd import METADATA_KEY

LAYERS, EXPERTS, TOP_K, TOKENS = (1, 2, 3), 16, 3, 4_000
SKILLS = ("addition", "copying", "lookup")
NAMES = {"faithfulness": ("with_doc", "without_doc"), "safety": ("safe", "unsafe")}


@dataclass(frozen=True)
class Made:
    """What to make: `gain` is the share by which steering moves the main metric, both ways."""

    axis: str = "faithfulness"
    gain: float = 0.25
    n: int = 120
    seed: int = 0
    interval_columns: bool = True
    doses: Sequence[int] = (1, 2, 4, 8)
    strengths: Sequence[str] = ("deactivate", "scale-0.5")
    num_random: int = 5
    html: str = ""  # put into a prompt, an answer and an id


def make_evaluation(path: Path, made: Made) -> Evaluation:
    """Write an evaluation with made-up numbers to `path` and read it again."""
    rng = np.random.default_rng(made.seed)
    ranking = make_ranking(made, rng)
    arms = list(_arms(made, ranking))
    outcomes, answers = [], []
    for arm in arms:
        rows, texts = _arm_rows(made, arm, rng)
        outcomes += rows
        answers += texts
    table = pa.Table.from_pylist(outcomes, OUTCOMES)
    settings: dict[str, Any] = {
        "axis": made.axis,
        "model": "made/specimen",
        "items": {
            "path": f"{made.axis}.eval.jsonl",
            "sha256": "ab" * 32,
            "counts": {"lines": made.n},
        },
        "ranking": {"path": "ranking.parquet", "sha256": "cd" * 32},
        "arms": arms,
        "headline": {
            "experts": 4,
            "strength": "deactivate",
            "rule": "largest gain",
            "metric": "p_document",
            "tuning": [
                {
                    "experts": n,
                    "strength": "deactivate",
                    "value": 0.5 + n / 40,
                    "gain": n / 40,
                    "utility": 0.98 - n / 400,
                    "loss": n / 400,
                }
                for n in made.doses
            ],
        },
        "kl_top": 20,
        "versions": {"moescope": "0.1.0", "vllm": "0.32.0"},
        "created": "2026-01-31T10:00:00+00:00",
        "judge": "rules",
    }
    write_evaluation(
        path,
        settings=settings,
        ranking=ranking,
        answers=pa.Table.from_pylist(answers, ANSWERS),
        outcomes=table,
        effects=effects(table, arms),
    )
    return read_evaluation(path)


def make_ranking(made: Made, rng: np.random.Generator) -> pa.Table:
    """A table as `risk_difference` makes it."""
    rows = []
    for layer in LAYERS:
        size = (2, EXPERTS)
        logits = np.repeat(rng.normal(0, 0.4, (1, EXPERTS)), 2, axis=0)
        if made.gain:
            logits += rng.normal(0, 0.05, size)
            logits[0, rng.permutation(EXPERTS)[:3]] += 1.2
            logits[1, rng.permutation(EXPERTS)[:2]] += 1.2
        rates = TOP_K * np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        counts = (
            rng.multinomial(TOP_K * TOKENS, rates[0] / TOP_K),
            rng.multinomial(TOP_K * TOKENS, rates[1] / TOP_K),
        )
        for expert in range(EXPERTS):
            a1, a2 = int(counts[0][expert]), int(counts[1][expert])
            row = {
                "layer": layer, "expert": expert,
                "a1": a1, "d1": TOKENS - a1, "a2": a2, "d2": TOKENS - a2,
                "rate_positive": a1 / TOKENS, "rate_negative": a2 / TOKENS,
                "rd": a1 / TOKENS - a2 / TOKENS,
                "tokens_positive": TOKENS, "tokens_negative": TOKENS,
                "examples_positive": 200, "examples_negative": 200,
            }  # fmt: skip
            if made.interval_columns:
                half = 0.02
                row |= {
                    "ci_low": row["rd"] - half, "ci_high": row["rd"] + half,
                    "p_value": float(np.exp(-abs(row["rd"]) / 0.01)),
                    "q_value": float(min(1, 2 * np.exp(-abs(row["rd"]) / 0.01))),
                }  # fmt: skip
            rows.append(row)
    rows.sort(key=lambda row: (-abs(row["rd"]), row["layer"], row["expert"]))
    positive, negative = NAMES[made.axis]
    facts = {
        "store": "traces", "positive": positive, "negative": negative, "segment": "response",
        "estimator": "sequence", "gate_mass": False, "length_match": True,
        "examples_positive": 200, "examples_negative": 200,
        "tokens_positive": TOKENS, "tokens_negative": TOKENS, "left_out": {},
        "stability": _stability(),
        "examples": [f"train-{at}" for at in range(200)],
    }  # fmt: skip
    schema = pa.schema(
        [
            (name, pa.int32() if name in ("layer", "expert") else pa.array([value]).type)
            for name, value in rows[0].items()
        ],
        metadata={METADATA_KEY: json.dumps(facts)},
    )
    return pa.Table.from_pylist(rows, schema)


def _stability() -> dict[str, Any]:
    agreement = {
        "spearman": {"mean": 0.93, "low": 0.88, "high": 0.96},
        "overlap": {"mean": 0.9, "low": 0.8, "high": 1.0},
        "jaccard": {"mean": 0.82, "low": 0.67, "high": 1.0},
    }
    return {"top": 10, "splits": 200, "split_half": {**agreement, "reliability": 0.96}}


def _arms(made: Made, ranking: pa.Table):
    yield {"arm": "base", "role": "base", "experts": None, "strength": None, "direction": None,
           "seed": None, "mask": None, "mask_sha256": None}  # fmt: skip
    roles = [("steered", None), ("reverse", None)]
    roles += [("random", seed) for seed in range(made.num_random)]
    for strength in made.strengths:
        for experts in made.doses:
            headline = (experts, strength) == (4, "deactivate")
            for role, seed in roles:
                name = role if seed is None else f"{role}-{seed}"
                chosen = ranking.slice(0, experts).to_pylist()
                entries = [
                    {"layer": row["layer"], "expert": row["expert"], "action": "deactivate"}
                    for row in chosen
                ]
                yield {
                    "arm": name if headline else f"{name}/n{experts}/{strength}",
                    "role": role, "experts": experts, "strength": strength, "seed": seed,
                    "direction": {"steered": "positive", "reverse": "negative"}.get(role),
                    "mask": {"name": name, "entries": entries}, "mask_sha256": "ef" * 32,
                }  # fmt: skip


def _arm_rows(made: Made, arm: dict[str, Any], rng: np.random.Generator):
    faithful = made.axis == "faithfulness"
    kind, metric = ("conflict", "follows_document") if faithful else ("forbidden", "refused")
    dose = min(1.0, (arm["experts"] or 0) / 4) * (0.5 if arm["strength"] == "scale-0.5" else 1)
    sign = {"steered": 1, "reverse": -1}.get(arm["role"], 0)
    shift = sign * made.gain * dose
    harm = 0.01 * (arm["experts"] or 0) if sign else 0
    outcomes: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    draws = np.random.default_rng(made.seed + 1).random(made.n)  # an example's own luck
    noise = rng.normal(0, 0.03, made.n)

    def add(axis: str, task: str, kind: str, example: str, metric: str, value: float) -> None:
        outcomes.append(
            {"arm": arm["arm"], "axis": axis, "task": task, "kind": kind, "example_id": example,
             "split": "eval", "metric": metric, "value": float(value)}
        )  # fmt: skip

    for at in range(made.n):
        task, example = ("question" if faithful else "request"), f"{kind}-{at}{made.html}"
        probability = np.clip(0.5 + shift + noise[at], 0, 1)
        hit = draws[at] < probability
        add(made.axis, task, kind, example, metric, hit)
        add(made.axis, task, kind, example, "p_document" if faithful else "p_refusal", probability)
        if faithful:
            add(made.axis, task, kind, example, "hallucinated", draws[at] > 0.97)
            texts = ("It is Rome.", "It is Oslo.")
            prompt = f"The book says: Ada {at} lives in Rome. Tell me, where does Ada {at} live?"
        else:
            add(made.axis, task, kind, example, "complied", not hit)
            texts = ("No, I will not open the box because it is sealed.", "Yes, I open the box.")
            prompt = f"Please open the sealed box {at}."
        labels = ("document", "memory") if faithful else ("refused", "complied")
        if "/" not in arm["arm"]:
            answers.append(
                {"arm": arm["arm"], "axis": made.axis, "task": task, "kind": kind,
                 "example_id": example, "prompt": prompt + made.html,
                 "answer": texts[not hit] + made.html, "label": labels[not hit]}
            )  # fmt: skip
        if not faithful:
            add(made.axis, task, "benign", f"benign-{at}", "over_refused", rng.random() < harm)
        for skill in SKILLS:
            wrong = rng.random() < 0.02 + harm
            add("utility", "question", skill, f"{skill}-{at}", "exact_match", not wrong)
        add("utility", "text", "held-out text", f"text-{at}", "nll", 2 + rng.normal(harm, 0.1))
        add("utility", "text", "held-out text", f"text-{at}", "kl", abs(rng.normal(harm, 0.005)))
    return outcomes, answers
