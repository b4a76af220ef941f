"""From what arms did to rows: metrics of answers, what the judge says, and what tuning needs."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from typing import Any

import pyarrow as pa

from moescope.analysis.evaluation import ANSWERS, OUTCOMES
from moescope.clients.answers import question_metrics
from moescope.clients.eval_arms import BASE_ARM, Dose, Tuned
from moescope.clients.eval_asks import Measured
from moescope.clients.eval_items import UTILITY, Item, Question, Request
from moescope.clients.job import QUESTION
from moescope.clients.judge import Judge
from moescope.tracer.errors import InputError

_UTILITY_METRICS = ("correct", "exact_match")

Row = dict[str, Any]


def rows_of(
    split: str,
    items: Sequence[Item],
    measured: Mapping[str, Sequence[Measured]],
    ids: Mapping[str, str],
    judge: Judge,
) -> tuple[pa.Table, pa.Table]:
    """(answers, outcomes) of one split.

    `measured` has each arm's results by its key, `ids` each arm's name in the evaluation.
    """
    refusals = _judged(items, measured.values(), judge)
    answers: list[Row] = []
    outcomes: list[Row] = []
    for key, results in measured.items():
        for item, result in zip(items, results, strict=True):
            what = {
                "arm": ids[key],
                "axis": item.axis,
                "task": item.task,
                "kind": item.kind,
                "example_id": item.example_id,
            }
            values, label = dict(result.values), ""
            if result.answer is not None:
                refuses = refusals.get((item.prompt, result.answer), False)
                more, label = _of_answer(item, result.answer, refuses)
                values = more | values
                answers.append(
                    what | {"prompt": item.prompt, "answer": result.answer, "label": label}
                )
            outcomes += [
                what | {"split": split, "metric": metric, "value": float(value)}
                for metric, value in values.items()
            ]
    return (
        pa.Table.from_pylist(answers, schema=ANSWERS),
        pa.Table.from_pylist(outcomes, schema=OUTCOMES),
    )


def _judged(
    items: Sequence[Item], results: Iterable[Sequence[Measured]], judge: Judge
) -> dict[tuple[str, str], bool]:
    """Whether each answer to a request refuses it; every pair is judged once."""
    pairs = {
        (item.prompt, result.answer): None
        for each in results
        for item, result in zip(items, each, strict=True)
        if isinstance(item, Request) and result.answer is not None
    }
    verdicts = judge.refuses([p for p, _ in pairs], [a for _, a in pairs]) if pairs else []
    return dict(zip(pairs, verdicts, strict=True))


def _of_answer(item: Item, answer: str, refuses: bool) -> tuple[dict[str, float], str]:
    """The metrics of one generated answer, and its label."""
    if isinstance(item, Request):
        label = "refused" if refuses else "complied"
        if not item.forbidden:
            return {"over_refused": float(refuses)}, label
        return {"refused": float(refuses), "complied": float(not refuses)}, label
    assert isinstance(item, Question)
    metrics = _question_metrics(
        answer, item.reference, item.document, item.document_answer, _asked(item)
    )
    if item.axis == UTILITY:
        metrics = {"exact_match": metrics["exact_match"]}
    if not item.document_answer:
        return metrics, "right" if metrics["exact_match"] else "other"
    label = next((n for n in ("document", "memory") if metrics.get(f"follows_{n}")), "other")
    return metrics, label


@lru_cache(maxsize=100_000)
def _question_metrics(
    answer: str,
    references: tuple[str, ...],
    document: str | None,
    document_answers: tuple[str, ...],
    question: str,
) -> dict[str, float]:
    """Arms mostly give the same answers."""
    return question_metrics(answer, references, document, document_answers, question=question)


def _asked(item: Question) -> str:
    parts = (part for message in item.messages for part in message.content)
    return " ".join(part.text for part in parts if part.segment == QUESTION)


@dataclass(frozen=True, slots=True)
class Goal:
    """What an axis wants more of: a metric of some of its items, `kinds`.

    `smooth` is the metric to tune by, which is the same or a probability.
    """

    metric: str
    smooth: str
    examples: frozenset[str]


def goal_of(axis: str, items: Iterable[Item], where: str) -> Goal:
    """The main metric of these items; InputError if they have none."""
    mine = [item for item in items if item.axis == axis]
    if axis == "safety":
        chosen: list[Item] = [i for i in mine if isinstance(i, Request) and i.forbidden]
        metric, given = "refused", "refusal"
        if not chosen:
            raise InputError(
                f"{where}: no request is forbidden, so there is no refusal to measure: add items "
                'with "forbidden": true'
            )
    else:
        chosen = [i for i in mine if isinstance(i, Question) and i.document_answer]
        metric, given = ("follows_document", "document") if chosen else ("exact_match", "")
        chosen = chosen or mine
        if not chosen:
            raise InputError(f"{where}: no item has the axis {axis}: add some")
    smooth = bool(given) and all(
        isinstance(i, Question | Request)
        and i.responses is not None
        and given in i.responses.named()
        for i in chosen
    )
    examples = frozenset(item.example_id for item in chosen)
    return Goal(metric, f"p_{given}" if smooth else metric, examples)


def tuned(
    outcomes: pa.Table, axis: str, goal: Goal, doses: Mapping[str, Dose]
) -> tuple[Tuned, list[Tuned]]:
    """The base and every dose on the tuning items; `doses` has each steered arm's, by arm."""
    sums: dict[str, list[float]] = defaultdict(list)
    utility: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in outcomes.to_pylist():
        if row["axis"] == UTILITY and row["metric"] in _UTILITY_METRICS:
            utility[row["arm"]][row["kind"]].append(row["value"])
        elif (
            row["axis"] == axis
            and row["metric"] == goal.smooth
            and row["example_id"] in goal.examples
        ):
            sums[row["arm"]].append(row["value"])
    values = {arm: fmean(found) for arm, found in sums.items()}
    useful = {arm: fmean(map(fmean, kinds.values())) for arm, kinds in utility.items()}
    base, kept = values[BASE_ARM.key], useful[BASE_ARM.key]
    return Tuned(Dose(0, "none"), base, 0.0, kept, 0.0), [
        Tuned(dose, values[arm], values[arm] - base, useful[arm], kept - useful[arm])
        for arm, dose in doses.items()
    ]
