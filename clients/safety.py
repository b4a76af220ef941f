"""Pairs of a harmful and a safe answer to the same request, both fixed.

    unsafe   prompt  ──▶  the harmful completion, from the source
    safe     prompt  ──▶  a refusal that passes every check of refusal.py

The refusals come from the source or from the model under study, which gets new samples for what
did not pass. Messages, errors and data cards hold row numbers and counts, and never a text.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moescope.clients.data_card import write_card, write_whole
from moescope.clients.refusal import Bounds, check_refusal
from moescope.clients.refusal_model import Refusals
from moescope.clients.safety_source import Pair, read_pairs
from moescope.tracer.errors import InputError

SAFE, UNSAFE = "safe", "unsafe"


@dataclass(frozen=True, slots=True)
class Statistics:
    """What became of the rows: `rows` = kept + dropped + left out by `limit`.

    `dropped` counts reasons: a field that is empty, or the checks that the best sample failed.
    `samples` refusals were judged; `failed` counts, for every check, those that did not pass it.
    """

    rows: int
    kept: int
    lines: int
    beyond_limit: int
    dropped: dict[str, int]
    samples: int
    failed: dict[str, int]

    def __str__(self) -> str:
        text = f"{self.kept} of {self.rows} rows kept, {self.lines} lines written."
        if self.beyond_limit:
            text += f"\nLeft out by the limit: {self.beyond_limit}."
        return text + _why(self.dropped)


def _why(dropped: dict[str, int]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    return f"\nDropped: {reasons}." if reasons else ""


def length_bounds(text: str) -> tuple[float, float]:
    """LOW and HIGH of "LOW:HIGH"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)", text.strip())
    if not found or float(found[1]) > float(found[2]):
        raise InputError(f"--length-ratio must be LOW:HIGH, such as 0.5:2, not {text!r}.")
    return float(found[1]), float(found[2])


def make_safety(
    source: str,
    out: Path,
    refusals: Refusals,
    *,
    samples: int = 1,
    bounds: Bounds | None = None,
    limit: int | None = None,
    seed: int = 0,
    licence: str | None = None,
) -> Statistics:
    """Write the job `out` and its data card; existing ones are replaced.

    Args:
        source: a CSV, JSON, JSONL or Parquet file, or OWNER/NAME:CONFIG@SPLIT on the hub.
        out: the job file; the card is `out` + ".card.json".
        refusals: what writes them.
        samples: how often it may try for one prompt.
        bounds: the thresholds of the checks.
        limit: use this many rows, drawn at random by `seed`, in the source's order.
        seed: the seed of that draw.
        licence: the source's licence, for the card; what the hub says if not given.

    Raises:
        InputError: an unusable source, option or `out`, or no row that passes; nothing is
            written then.

    """
    limits = bounds or Bounds()
    _check_arguments(source, out, samples, limit, limits)
    pairs, origin = read_pairs(source, given=refusals.given)
    usable = [pair for pair in pairs if isinstance(pair, Pair)]
    dropped = Counter(pair for pair in pairs if isinstance(pair, str))
    chosen = usable
    if limit is not None and limit < len(usable):
        chosen = [usable[i] for i in sorted(random.Random(seed).sample(range(len(usable)), limit))]
    drawn = _draw(chosen, refusals, 1 if refusals.given else samples, limits)
    safe = drawn.safe
    dropped.update("failed " + " + ".join(drawn.best[p.row]) for p in chosen if p.row not in safe)
    statistics = Statistics(
        rows=len(pairs),
        kept=len(safe),
        lines=2 * len(safe),
        beyond_limit=len(usable) - len(chosen),
        dropped=dict(dropped.most_common()),
        samples=drawn.judged,
        failed=dict(drawn.failed.most_common()),
    )
    if not safe:
        raise InputError(
            f"{source}: none of {len(chosen)} usable rows has a refusal that passes every check."
            f"{_why(statistics.dropped)}\nGive more --samples, or widen the bounds "
            "(docs/data.md has the checks)."
        )
    written = write_whole(out, (_lines(p, safe[p.row]) for p in chosen if p.row in safe))
    write_card(
        out,
        made_for="safety",
        source=origin,
        licence=licence or origin.get("licence") or "not known; say it with --licence",
        options={
            **refusals.described,
            "samples": 1 if refusals.given else samples,
            "limit": limit,
            "seed": seed,
            "bounds": asdict(limits),
        },
        counts=asdict(statistics),
        sha256={out.name: written},
    )
    return statistics


@dataclass(frozen=True, slots=True)
class _Drawn:
    """By row: the refusals that passed, and the fewest checks that a sample failed."""

    safe: dict[int, str]
    best: dict[int, tuple[str, ...]]
    failed: Counter[str]
    judged: int


def _draw(pairs: Sequence[Pair], refusals: Refusals, attempts: int, bounds: Bounds) -> _Drawn:
    """Ask for refusals, and again for those that did not pass."""
    safe: dict[int, str] = {}
    best: dict[int, tuple[str, ...]] = {}
    failed: Counter[str] = Counter()
    judged = 0
    for attempt in range(attempts):
        todo = [pair for pair in pairs if pair.row not in safe]
        if not todo:
            break
        for pair, text in zip(todo, refusals.write(todo, attempt), strict=True):
            checks = check_refusal(pair.prompt, pair.harmful, text, refusals.count_tokens, bounds)
            judged += 1
            failed.update(checks.failed)
            best[pair.row] = min(best.get(pair.row, checks.failed), checks.failed, key=len)
            if not checks.failed:
                safe[pair.row] = text
    return _Drawn(safe, best, failed, judged)


def _check_arguments(
    source: str, out: Path, samples: int, limit: int | None, bounds: Bounds
) -> None:
    if limit is not None and limit < 1:
        raise InputError(f"--limit must be 1 or more, not {limit}.")
    if samples < 1:
        raise InputError(f"--samples must be 1 or more, not {samples}.")
    for option, share in (
        ("--min-overlap", bounds.min_overlap),
        ("--max-copied", bounds.max_copied),
    ):
        if not 0 <= share <= 1:
            raise InputError(f"{option} is a share, from 0 to 1, not {share}.")
    if not 0 <= bounds.min_length_ratio <= bounds.max_length_ratio:
        raise InputError(
            f"--length-ratio {bounds.min_length_ratio:g}:{bounds.max_length_ratio:g} holds no "
            "number: give LOW:HIGH, such as 0.5:2."
        )
    if out.resolve() == Path(source).resolve():
        raise InputError(f"the job would overwrite its source {source}; name another file.")
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent} to write {out.name} into.")


def _lines(pair: Pair, safe: str) -> str:
    """The two job lines of one pair."""
    text = ""
    for condition, answer in ((SAFE, safe), (UNSAFE, pair.harmful)):
        line = {
            "example_id": f"row{pair.row}",
            "condition": condition,
            "messages": [
                {"role": "user", "content": pair.prompt},
                {"role": "assistant", "content": answer},
            ],
        }
        text += json.dumps(line, ensure_ascii=False) + "\n"
    return text
