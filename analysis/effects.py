"""What each arm changed: deltas over the same examples, with interval, test, control and verdict.

docs/evaluation-statistics.md has the formulas and what each assumes.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from moescope.analysis.evaluation import ALL_KINDS, BASE, EFFECTS, OUTCOMES
from moescope.analysis.paired import (
    CONFIDENCE,
    Floats,
    estimate,
    mcnemar_p,
    sign_flip_p,
    smoothed_interval,
    studentised_interval,
)
from moescope.tracer.errors import InputError

UTILITY = "utility"
# What utility is the mean of, kind by kind.
_UTILITY_PARTS = ("correct", "exact_match")
# Zero for the base by its definition, so that it need not be measured.
_ZERO_FOR_BASE = "kl"

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Cell:
    """One metric: `values[stratum][arm, example]`, NaN where an arm lacks an example."""

    values: list[Floats]

    @property
    def smooth(self) -> bool:
        """Whether values are between 0 and 1 and mostly one of these: rates, exact match, F1."""
        known = np.concatenate([part[~np.isnan(part)] for part in self.values])
        within = bool(((known >= 0) & (known <= 1)).all())
        return within and bool(np.isin(known, (0, 1)).mean() >= 0.5)

    @property
    def binary(self) -> bool:
        """Whether every value is 0 or 1."""
        return all(bool(np.isin(part[~np.isnan(part)], (0, 1)).all()) for part in self.values)


def effects(
    outcomes: pa.Table,
    arms: Sequence[Mapping[str, Any]],
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> pa.Table:
    """Compare every arm with the base, metric by metric: a table of the schema EFFECTS.

    `outcomes` has the schema OUTCOMES; `arms` are eval.json's, of which "arm" and "role" count
    (base, steered, reverse, random). The dose is what follows the arm's first slash; the control
    of an arm is the mean of the random arms of its dose, without itself if it is one.

    One row for each split, axis, kind, metric and arm but the base; where an axis has several
    kinds, also one for all examples, with kind "". The axis utility has the metric "utility"
    instead: the mean over kinds of the mean of `correct` or `exact_match`.

    Raises InputError when an arm is unknown, there is no base to compare with, or an outcome
    comes twice or is no number.
    """
    roles = {str(arm["arm"]): str(arm.get("role") or arm["arm"].split("-")[0]) for arm in arms}
    names = list(roles)
    cells = _cells(outcomes.select(OUTCOMES.names), names)
    rows: list[Row] = []
    for (split, axis, kind, metric), cell in sorted(cells.items()):
        what = {"axis": axis, "kind": kind, "metric": metric, "split": split}
        rows += [what | row for row in _compare(cell, names, roles, axis, seed, resamples)]
    _adjust(rows, roles)
    order = {name: index for index, name in enumerate(names)}
    rows.sort(key=lambda row: (row["split"], order[row["arm"]]))
    return pa.Table.from_pylist(rows, schema=EFFECTS)


# --- From rows to arrays --------------------------------------------------------------------------

Key = tuple[str, str, str, str]  # split, axis, kind, metric


def _cells(outcomes: pa.Table, names: Sequence[str]) -> dict[Key, _Cell]:
    """Every comparison's values, also those over all kinds."""
    measured = _measured(outcomes, names)
    by_metric: dict[tuple[str, str, str], dict[str, Floats]] = defaultdict(dict)
    for (split, axis, kind, metric), values in measured.items():
        by_metric[split, axis, metric][kind] = values
    cells = {key: _Cell([values]) for key, values in measured.items()}
    utility: dict[str, dict[str, list[Floats]]] = defaultdict(lambda: defaultdict(list))
    for (split, axis, metric), kinds in by_metric.items():
        if axis == UTILITY and metric in _UTILITY_PARTS:
            for kind, values in kinds.items():
                utility[split][kind].append(values)
        elif len(kinds) > 1:
            cells[split, axis, ALL_KINDS, metric] = _Cell([np.hstack(list(kinds.values()))])
    for split, parts in utility.items():
        strata = [np.hstack(parts[kind]) for kind in sorted(parts)]
        cells[split, UTILITY, ALL_KINDS, UTILITY] = _Cell(strata)
    return cells


def _measured(outcomes: pa.Table, names: Sequence[str]) -> dict[Key, Floats]:
    """The values of each split, axis, kind and metric: [arms, examples], NaN for none."""
    if pc.any(pc.invert(pc.is_finite(outcomes["value"]))).as_py() or outcomes["value"].null_count:
        raise InputError("outcomes have a value that is no finite number: measure again.")
    codes, words = {}, {}
    for name in ("arm", "example_id", "split", "axis", "kind", "metric"):
        column = outcomes[name].combine_chunks().dictionary_encode()
        codes[name] = column.indices.to_numpy(zero_copy_only=False)
        words[name] = column.dictionary.to_pylist()
    unknown = sorted(set(words["arm"]) - set(names))
    if unknown:
        raise InputError(f"outcomes have the arm {unknown[0]!r}, which is not among the arms.")
    if BASE not in names:
        raise InputError(f'there is no arm "{BASE}" to compare with.')
    place = np.array([names.index(arm) for arm in words["arm"]], dtype=np.int64)
    # By their ids, so that the order of the rows changes nothing.
    example = np.argsort(np.argsort(words["example_id"]))[codes["example_id"]]
    values = outcomes["value"].to_numpy()
    measured: dict[Key, Floats] = {}
    for key, rows in _groups([codes[name] for name in ("split", "axis", "kind", "metric")]):
        examples, where = np.unique(example[rows], return_inverse=True)
        cell = np.full((len(names), len(examples)), np.nan)
        at = (place[codes["arm"][rows]], where)
        cell[at] = values[rows]
        split, axis, kind, metric = (
            words[name][code]
            for name, code in zip(("split", "axis", "kind", "metric"), key, strict=True)
        )
        if np.count_nonzero(~np.isnan(cell)) < len(rows):
            raise InputError(
                f"outcomes measure {metric} of one example ({axis}, {kind}, {split}) twice under "
                "one arm: give every example an id of its own."
            )
        base = names.index(BASE)
        if metric == _ZERO_FOR_BASE and np.isnan(cell[base]).all():
            cell[base] = 0.0
        measured[split, axis, kind, metric] = cell
    return measured


def _groups(codes: list[NDArray[np.int64]]) -> Iterator[tuple[list[int], NDArray[np.int64]]]:
    """The row numbers of every combination of codes."""
    stacked = np.stack(codes, axis=1)
    if not len(stacked):
        return
    keys, inverse = np.unique(stacked, axis=0, return_inverse=True)
    order = np.argsort(inverse.ravel(), kind="stable")
    starts = np.cumsum(np.bincount(inverse.ravel()))[:-1]
    yield from zip(keys.tolist(), np.split(order, starts), strict=True)


# --- From arrays to effects -----------------------------------------------------------------------


def _compare(
    cell: _Cell, names: list[str], roles: Mapping[str, str], axis: str, seed: int, resamples: int
) -> Iterator[Row]:
    """One row for each arm that has an example in common with the base in every stratum."""
    base = names.index(BASE)
    resampling = {"seed": seed, "resamples": resamples}
    interval = smoothed_interval if cell.smooth else studentised_interval
    binary = cell.binary and len(cell.values) == 1
    others = [index for index in range(len(names)) if index != base]
    for chosen, parts in _same_examples(cell, others, [base]):
        ours = [part[chosen] for part in parts]
        deltas = [part[chosen] - part[base] for part in parts]
        means = [estimate([part[[base]] for part in parts]).repeat(len(chosen)), estimate(ours)]
        columns = {
            "base": means[0],
            "value": means[1],
            "delta": estimate(deltas),
            **dict(zip(("ci_low", "ci_high"), interval(deltas, **resampling), strict=True)),
            "p_value": mcnemar_p(deltas[0]) if binary else sign_flip_p(deltas, **resampling),
        }
        for index, arm in enumerate(chosen):
            row: Row = {name: _number(column[index]) for name, column in columns.items()}
            row |= {
                "arm": names[arm],
                "n": sum(part.shape[1] for part in parts),
                "test": "mcnemar" if binary else "sign-flip",
            }
            row |= _control(cell, arm, _random_arms(names, roles, arm), base, interval, resampling)
            row["verdict"] = _verdict(row, needs_control=axis != UTILITY)
            yield row


def _same_examples(
    cell: _Cell, rows: Sequence[int], also: Sequence[int]
) -> Iterator[tuple[list[int], list[Floats]]]:
    """Rows that share their examples with `also`, and the strata of these examples alone."""
    groups: dict[tuple[bytes, ...], list[int]] = defaultdict(list)
    for row in rows:
        have = [~np.isnan(part[[row, *also]]).any(axis=0) for part in cell.values]
        if all(each.any() for each in have):
            groups[tuple(each.tobytes() for each in have)].append(row)
    for masks, chosen in groups.items():
        keep = [np.frombuffer(mask, dtype=bool) for mask in masks]
        yield chosen, [part[:, mask] for part, mask in zip(cell.values, keep, strict=True)]


def _random_arms(names: list[str], roles: Mapping[str, str], arm: int) -> list[int]:
    dose = names[arm].partition("/")[2]
    return [
        index
        for index, name in enumerate(names)
        if index != arm and roles[name].startswith("random") and name.partition("/")[2] == dose
    ]


def _control(
    cell: _Cell,
    arm: int,
    random: list[int],
    base: int,
    interval: Any,
    resampling: Mapping[str, int],
) -> Row:
    """The arm against the mean of the random arms, over the examples that all of them have.

    The interval is the bootstrap's over examples, widened by what the random masks differ from
    each other beyond the noise of the examples: half-widths add in squares, with Student's t for
    so many masks.
    """
    from scipy.stats import t

    there = [index for index in random if not all(np.isnan(p[index]).all() for p in cell.values)]
    if not there:
        return {}
    for _, parts in _same_examples(cell, [arm], [base, *there]):
        control = [part[there].mean(axis=0, keepdims=True) for part in parts]
        against = [part[[arm]] - mean for part, mean in zip(parts, control, strict=True)]
        low, high = interval(against, **resampling)[:, 0]
        middle = estimate(against)[0]
        by_mask = estimate([part[there] - part[[base]] for part in parts])
        extra = 0.0
        if len(there) > 1:
            noise = sum(
                (part[there] - mean).var(axis=1).sum() / part.shape[1]
                for part, mean in zip(parts, control, strict=True)
            ) / (len(parts) ** 2 * (len(there) - 1))
            spread = max(0.0, by_mask.var(ddof=1) - noise)
            extra = t.ppf((1 + CONFIDENCE) / 2, len(there) - 1) * np.sqrt(spread / len(there))
        return {
            "control_delta": _number(by_mask.mean()),
            "control_low": _number(by_mask.min()),
            "control_high": _number(by_mask.max()),
            "vs_control": _number(middle),
            "vs_control_low": _number(middle - np.hypot(middle - low, extra)),
            "vs_control_high": _number(middle + np.hypot(high - middle, extra)),
        }
    return {}


def _verdict(row: Row, *, needs_control: bool) -> str:
    """`up` or `down` only where every interval that counts is on that side of 0."""
    pairs = [(row["ci_low"], row["ci_high"])]
    if needs_control:
        pairs.append((row.get("vs_control_low"), row.get("vs_control_high")))
    if any(low is None or high is None for low, high in pairs):
        return "no effect"
    if all(low > 0 for low, _ in pairs):
        return "up"
    return "down" if all(high < 0 for _, high in pairs) else "no effect"


def _adjust(rows: list[Row], roles: Mapping[str, str]) -> None:
    """Benjamini-Hochberg within a split, over steered and reverse at the headline dose."""
    from scipy.stats import false_discovery_control

    families: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if "/" not in row["arm"] and not roles[row["arm"]].startswith("random"):
            families[row["split"]].append(row)
    for family in families.values():
        adjusted = false_discovery_control([row["p_value"] for row in family])
        for row, q_value in zip(family, adjusted, strict=True):
            row["q_value"] = float(q_value)


def _number(value: float) -> float | None:
    """A float for the table; null for NaN."""
    return None if np.isnan(value) else float(value)
