"""One evaluation on disk: what was asked, answered, measured and found, arm by arm.

EVAL/
  eval.json         settings: axis, model, items, arms, headline, judge, versions
  ranking.parquet   the ranking that the masks were made from
  answers.parquet   one row a generated answer            (ANSWERS)
  outcomes.parquet  one row a measured value              (OUTCOMES)
  effects.parquet   one row a comparison with the base    (EFFECTS, made by analysis/effects.py)

Whoever reads or writes such a folder goes through here.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moescope.tracer.errors import InputError

FORMAT = "moescope-eval/1"
BASE = "base"
# The whole of an axis in the column `kind` of the effects.
ALL_KINDS = ""

_WHAT = [(name, pa.string()) for name in ("arm", "axis", "task", "kind", "example_id")]

# `label`: what the judge said of the answer ("" where none judged).
ANSWERS = pa.schema([*_WHAT, *((name, pa.string()) for name in ("prompt", "answer", "label"))])

# One value of one metric for one example under one arm; rates are 0 or 1.
OUTCOMES = pa.schema(
    [*_WHAT, ("split", pa.string()), ("metric", pa.string()), ("value", pa.float64())]
)

# An arm's metric beside the base's, over the examples that both have. Rates are shares, not
# points. `control_*`: the mean delta of the random arms of the same dose, the least and the
# largest of them. `vs_control`: delta - control_delta. Null where there is nothing to compare.
EFFECTS = pa.schema(
    [
        *((name, pa.string()) for name in ("arm", "axis", "kind", "metric", "split")),
        ("n", pa.int64()),
        *((name, pa.float64()) for name in ("base", "value", "delta", "ci_low", "ci_high")),
        ("p_value", pa.float64()),
        ("test", pa.string()),
        ("q_value", pa.float64()),
        *((f"control_{name}", pa.float64()) for name in ("delta", "low", "high")),
        *((name, pa.float64()) for name in ("vs_control", "vs_control_low", "vs_control_high")),
        ("verdict", pa.string()),
    ]
)

_TABLES = {"answers": ANSWERS, "outcomes": OUTCOMES, "effects": EFFECTS}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation in memory. `settings` is eval.json; its "arms" say what each arm is."""

    settings: dict[str, Any]
    ranking: pa.Table
    answers: pa.Table
    outcomes: pa.Table
    effects: pa.Table


def write_evaluation(
    path: str | Path,
    *,
    settings: Mapping[str, Any],
    ranking: pa.Table,
    answers: pa.Table,
    outcomes: pa.Table,
    effects: pa.Table,
) -> Evaluation:
    """Write the folder, whole or not at all. An older evaluation there is replaced.

    `settings` gets the format's name. The tables are cast to their schemas: ANSWERS, OUTCOMES,
    EFFECTS. InputError when something else than an evaluation is in the way, or the disk is.
    """
    path = Path(path)
    check_target(path)
    evaluation = Evaluation(
        {"format": FORMAT, **settings},
        ranking,
        *(_cast(t, _TABLES[n]) for n, t in zip(_TABLES, (answers, outcomes, effects), strict=True)),
    )
    _check(evaluation, path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        try:
            aside.mkdir(parents=True)
            text = json.dumps(evaluation.settings, indent=2, ensure_ascii=False) + "\n"
            (aside / "eval.json").write_text(text, encoding="utf-8")
            for name in ("ranking", *_TABLES):
                pq.write_table(getattr(evaluation, name), aside / f"{name}.parquet")
            if path.exists():
                path.replace(old)
            aside.replace(path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            if old.exists() and not path.exists():
                old.replace(path)
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise InputError(f"can't write the evaluation {path}: {error.strerror}.") from error
    return evaluation


def check_target(path: str | Path) -> None:
    """Raise InputError unless an evaluation can be written to `path`: ask before the work."""
    path = Path(path)
    if path.is_dir():
        if any(path.iterdir()) and not (path / "eval.json").is_file():
            raise InputError(
                f"{path} is a folder with other things in it: name a new one, or an evaluation's."
            )
    elif path.exists():
        raise InputError(f"{path} is a file; an evaluation is a folder: name another.")


def is_evaluation(path: str | Path) -> bool:
    """Whether `path` looks like an evaluation's folder (it may still be damaged)."""
    return (Path(path) / "eval.json").is_file()


def read_evaluation(path: str | Path) -> Evaluation:
    """Read what `write_evaluation` wrote; InputError for anything else."""
    path = Path(path)
    if not is_evaluation(path):
        raise InputError(
            f"{path} is no evaluation: it has no eval.json. Make one with `moescope eval`."
        )
    try:
        settings = json.loads((path / "eval.json").read_bytes())
        if not isinstance(settings, dict) or settings.get("format") != FORMAT:
            found = settings.get("format") if isinstance(settings, dict) else None
            raise InputError(
                f"{path / 'eval.json'} has the format {found!r}; this version of moescope reads "
                f"{FORMAT!r}. Evaluate again."
            )
        tables = {name: pq.read_table(path / f"{name}.parquet") for name in ("ranking", *_TABLES)}
        for name, schema in _TABLES.items():
            tables[name] = _cast(tables[name], schema)
    except (OSError, ValueError) as error:  # Arrow's errors are ValueErrors, or these
        if isinstance(error, InputError):
            raise
        raise InputError(f"the evaluation {path} is damaged: {error}. Evaluate again.") from error
    evaluation = Evaluation(settings, **tables)
    _check(evaluation, path)
    return evaluation


def _cast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise ValueError(f"the table has no column {', '.join(missing)}")
    return table.select(schema.names).cast(schema)


def _check(evaluation: Evaluation, path: Path) -> None:
    """Every arm of the tables is one that the settings describe."""
    arms = evaluation.settings.get("arms")
    if not isinstance(arms, list) or not all(isinstance(a, dict) and "arm" in a for a in arms):
        raise InputError(f'{path}: "arms" in eval.json is no list of arms. Evaluate again.')
    known = {arm["arm"] for arm in arms}
    for name in _TABLES:
        unknown = sorted(set(getattr(evaluation, name)["arm"].unique().to_pylist()) - known)
        if unknown:
            raise InputError(
                f"{path}: {name}.parquet has the arm {unknown[0]!r}, which eval.json does not "
                "describe. Evaluate again."
            )
