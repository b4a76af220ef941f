"""Multiple choice questions as items of utility: what a mask costs beside the two axes.

arc         question, choices {text, label}, answerKey      allenai/ai2_arc:ARC-Easy
mmlu        question, choices [texts], answer (number)      cais/mmlu:all
hellaswag   ctx, endings [texts], label (number)            Rowan/hellaswag
jsonl       question, choices [texts], correct (number)     your own
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moescope.clients.data_card import write_card, write_whole
from moescope.clients.sources import open_source
from moescope.tracer.errors import InputError

Fields = Mapping[str, Any]
Read = tuple[str, list[str], int]  # question, choices, which is right


def _arc(row: Fields) -> Read:
    labels = list(row["choices"]["label"])
    return row["question"], list(row["choices"]["text"]), labels.index(row["answerKey"])


def _mmlu(row: Fields) -> Read:
    return row["question"], list(row["choices"]), int(row["answer"])


def _hellaswag(row: Fields) -> Read:
    return row["ctx"], list(row["endings"]), int(row["label"])


def _own(row: Fields) -> Read:
    return row["question"], list(row["choices"]), int(row["correct"])


# By layout: the columns that tell it, and how a row is read. The first that fits counts.
LAYOUTS: dict[str, tuple[frozenset[str], Callable[[Fields], Read]]] = {
    "arc": (frozenset(("question", "choices", "answerKey")), _arc),
    "mmlu": (frozenset(("question", "choices", "answer")), _mmlu),
    "hellaswag": (frozenset(("ctx", "endings", "label")), _hellaswag),
    "jsonl": (frozenset(("question", "choices", "correct")), _own),
}
_EXPECTED = "Expected one of: " + "; ".join(
    f"{name} with {', '.join(sorted(columns))}" for name, (columns, _) in LAYOUTS.items()
)


def make_utility(
    source: str,
    out: Path,
    *,
    tune: Path | None = None,
    limit: int | None = None,
    tune_share: float = 0.3,
    seed: int = 0,
    licence: str | None = None,
) -> dict[str, int]:
    """Write the items `out`, and with `tune` a part of them there; returns counts.

    `limit` keeps that many questions, drawn by `seed`. Unusable rows are counted by reason. Raises
    InputError for a source of another layout, one without a usable row, and an unusable option.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit must be 1 or more, not {limit}.")
    if not 0 < tune_share < 1:
        raise InputError(f"--tune-share is a share between 0 and 1, not {tune_share:g}.")
    for path in filter(None, (out, tune)):
        if not path.parent.is_dir():
            raise InputError(f"there is no folder {path.parent} to write {path.name} into.")
    if tune is not None and tune.resolve() == out.resolve():
        raise InputError(f"--out and --tune are both {out}: name two files.")
    skipped: Counter[str] = Counter()
    with open_source(source, _EXPECTED) as opened:
        layout = next((n for n, (c, _) in LAYOUTS.items() if c <= opened.columns), None)
        if layout is None:
            there = ", ".join(sorted(opened.columns))
            raise InputError(f"{source} has the columns {there}. {_EXPECTED}")
        read = LAYOUTS[layout][1]
        items = [
            item
            for number, row in enumerate(opened.rows, start=1)
            if (item := _item(row, number, layout, read, skipped)) is not None
        ]
        origin = {"format": layout, **opened.origin}
    if not items:
        raise InputError(f"{source} holds no question to use ({dict(skipped)}). {_EXPECTED}")
    draw = random.Random(seed)
    draw.shuffle(items)
    chosen = items[:limit]
    at = round(tune_share * len(chosen)) if tune is not None else 0
    counts = {"kept": len(chosen), "beyond_limit": len(items) - len(chosen), **skipped}
    parts = [(out, chosen[at:])] if tune is None else [(tune, chosen[:at]), (out, chosen[at:])]
    for path, part in parts:
        if not part:
            raise InputError(f"{len(chosen)} questions leave none for {path}: raise --limit.")
        texts = (json.dumps(item, ensure_ascii=False) + "\n" for item in part)
        written = write_whole(path, texts, "items")
        write_card(
            path,
            made_for="utility",
            source=origin,
            licence=licence or origin.get("licence") or "not known; say it with --licence",
            options={"limit": limit, "seed": seed, "tune_share": tune_share if tune else None},
            counts={"lines": len(part), **counts},
            sha256={path.name: written},
        )
    return counts


def _item(
    row: Fields, number: int, layout: str, read: Callable[[Fields], Read], skipped: Counter[str]
) -> dict[str, Any] | None:
    try:
        question, choices, correct = read(row)
    except (KeyError, ValueError, TypeError):
        skipped["with another form"] += 1
        return None
    texts = [str(choice).strip() for choice in choices]
    if not str(question).strip() or not all(texts) or not 0 <= correct < len(texts):
        skipped["with an empty text or no right choice"] += 1
        return None
    if len(set(texts)) < max(len(texts), 2):
        skipped["with equal choices"] += 1
        return None
    return {
        "example_id": f"{layout}{number}",
        "axis": "utility",
        "kind": layout if layout != "jsonl" else "choice",
        "task": "choice",
        "messages": [{"role": "user", "content": str(question).strip()}],
        "choices": texts,
        "correct": correct,
    }
