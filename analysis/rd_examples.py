"""From requests' counts to examples: each side's sums in exact order, and matrices by example."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.analysis.counts import CountBlock

if TYPE_CHECKING:
    from moescope.analysis.inference import Stratum


@dataclass(frozen=True, slots=True)
class StratumRows:
    """Where a stratum's examples lie among the rows of both sides, pairs first."""

    name: str
    positive: slice
    negative: slice
    pairs: int

    @property
    def sizes(self) -> tuple[int, int]:
        """Examples under the positive and under the negative condition."""
        first, second = self.positive, self.negative
        return first.stop - first.start, second.stop - second.start


@dataclass(frozen=True, slots=True)
class Design:
    """Which unit (request that counts) belongs to which example, side and stratum.

    An *example* is what shares an example_id; a request without one is its own. Arrays are by
    unit: `side` 0 is the positive condition, `row` the example's row among its side's, `size` what
    its rate is divided by when examples are added up: 1, or its tokens (estimator `token`).
    """

    side: NDArray[np.int64]
    row: NDArray[np.int64]
    stratum: NDArray[np.int64]
    tokens: NDArray[np.int64]
    size: NDArray[np.int64]
    strata: tuple[StratumRows, ...]
    pooled: bool

    @property
    def pairs(self) -> int:
        """Examples with both conditions."""
        return sum(stratum.pairs for stratum in self.strata)

    @property
    def examples(self) -> tuple[int, int]:
        """Examples under the positive and under the negative condition."""
        return self.strata[-1].positive.stop, self.strata[-1].negative.stop

    @property
    def name(self) -> str:
        """Whether examples are pairs: all are, none is, or some are."""
        if self.pairs == 0:
            return "unpaired"
        return "paired" if self.examples == (self.pairs, self.pairs) else "mixed"

    @property
    def weights(self) -> NDArray[np.float64]:
        """Each stratum's share in the combined difference: n1 n2 / (n1 + n2), summing to 1.

        The inverse of the difference's variance where an expert's examples vary alike in all
        strata. Variances estimated for each expert and stratum by itself would not do: an expert
        that two examples happen to use equally would have an infinite weight there.
        """
        parts = np.array([a * b / (a + b) for a, b in (s.sizes for s in self.strata)])
        return parts / parts.sum()


def make_design(units: pa.Table, estimator: str) -> Design:
    """The design of the requests that `number_units` numbered."""
    examples: dict[str, dict[str, tuple[list[int], list[int]]]] = {}
    columns = ("stratum", "example_id", "request_id", "positive")
    for unit, (stratum, example, request, positive) in enumerate(
        zip(*(units[name].to_pylist() for name in columns), strict=True)
    ):
        key = f"request {request}" if example is None else f"example {example}"
        sides = examples.setdefault(stratum, {}).setdefault(key, ([], []))
        sides[0 if positive else 1].append(unit)
    row, stratum_of = np.zeros((2, units.num_rows), np.int64)
    rows: list[StratumRows] = []
    done = [0, 0]
    for number, (name, members) in enumerate(sorted(examples.items())):
        start, pairs = list(done), 0
        # Pairs first; within them, and after them, in the order of the first request's id.
        for sides in sorted(members.values(), key=lambda sides: not (sides[0] and sides[1])):
            pairs += bool(sides[0] and sides[1])
            for side, of_side in enumerate(sides):
                if of_side:
                    row[of_side], stratum_of[of_side] = done[side], number
                    done[side] += 1
        rows.append(StratumRows(name, slice(start[0], done[0]), slice(start[1], done[1]), pairs))
    tokens = units["tokens"].to_numpy()
    return Design(
        side=np.where(units["positive"].to_numpy(), 0, 1),
        row=row,
        stratum=stratum_of,
        tokens=tokens,
        size=tokens if estimator == "token" else np.ones_like(tokens),
        strata=tuple(rows),
        pooled=estimator == "token",
    )


@dataclass(frozen=True, slots=True)
class Sums:
    """What a pass over the units adds up, for some columns.

    `counts` [2 sides, columns]: tokens that chose the expert; `rates` [strata, 2 sides, columns];
    `rows`: of each side [examples, columns], if they were asked for.
    """

    counts: NDArray[np.int64]
    rates: NDArray[np.float64]
    rows: tuple[NDArray[np.float64], NDArray[np.float64]] | None


def add_up(
    design: Design, blocks: Iterable[CountBlock], *, gate_mass: bool, columns: Any, keep: bool
) -> Sums:
    """Read all units once, in order, so that sums are the same to the last bit."""
    counts = rates = rows = None
    for block in blocks:
        units = block.units
        chosen = block.counts[:, columns]
        values = block.of(gate_mass)[:, columns].astype(np.float64)
        if not design.pooled:
            values /= design.tokens[units, None]
        if counts is None or rates is None:
            counts = np.zeros((2, chosen.shape[1]), np.int64)
            rates = np.zeros((len(design.strata), 2, chosen.shape[1]))
            if keep:
                rows = tuple(np.zeros((n, chosen.shape[1])) for n in design.examples)
        for side in (0, 1):
            counts[side] += chosen[design.side[units] == side].sum(axis=0, dtype=np.int64)
        for unit, value in zip(units.tolist(), values, strict=True):
            side = design.side[unit]
            rates[design.stratum[unit], side] += value
            if rows is not None:
                rows[side][design.row[unit]] += value
    assert counts is not None
    assert rates is not None
    sizes = np.zeros((len(design.strata), 2))
    np.add.at(sizes, (design.stratum, design.side), design.size)
    return Sums(counts, rates / sizes[:, :, None], rows)  # type: ignore[arg-type]


def make_strata(design: Design, rows: Sequence[NDArray[np.float64]]) -> "list[Stratum]":
    """The rows of both sides by stratum, for inference.py."""
    from moescope.analysis.inference import Stratum

    sizes = [np.zeros(n) for n in design.examples]
    for side in (0, 1):
        of_side = design.side == side
        np.add.at(sizes[side], design.row[of_side], design.size[of_side].astype(np.float64))
    return [
        Stratum(
            rows[0][s.positive],
            sizes[0][s.positive],
            rows[1][s.negative],
            sizes[1][s.negative],
            s.pairs,
            float(weight),
        )
        for s, weight in zip(design.strata, design.weights, strict=True)
    ]
