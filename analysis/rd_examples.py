"""From requests' counts to examples: each side's sums in exact order, and matrices by example."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from moescope.analysis.counts import CountBlock

if TYPE_CHECKING:
    from moescope.analysis.inference import Stratum


_UNITS_AT_ONCE = 64  # whose rows fit the processor's cache


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
    positive = units["positive"].to_numpy()
    names = sorted(units["stratum"].unique().to_pylist())
    stratum = pc.index_in(units["stratum"], value_set=pa.array(names, pa.string())).to_numpy()
    known = units["example_id"].unique().drop_null()
    # A request without an example is one of its own.
    own = pa.array(len(known) + np.arange(units.num_rows))
    found = pc.index_in(units["example_id"], value_set=known, skip_nulls=True)
    key = pc.coalesce(found.cast(pa.int64()), own).to_numpy()
    _, firsts, example = np.unique(
        np.stack([stratum, key]), axis=1, return_index=True, return_inverse=True
    )
    there = np.zeros((2, len(firsts)), bool)
    for side, of_side in enumerate((positive, ~positive)):
        there[side, example[of_side]] = True
    paired, of_stratum = there.all(axis=0), stratum[firsts]
    # Pairs first; within them, and after them, in the order of the first request's id.
    order = np.lexsort((firsts, ~paired, of_stratum))
    rows_of = np.zeros((2, len(firsts)), np.int64)
    rows_of[:, order] = there[:, order].cumsum(axis=1) - 1
    first, second = (
        [0, *np.bincount(of_stratum[of_side], minlength=len(names)).cumsum().tolist()]
        for of_side in there
    )
    pairs = np.bincount(of_stratum[paired], minlength=len(names)).tolist()
    rows = [
        StratumRows(name, slice(*first[at : at + 2]), slice(*second[at : at + 2]), pairs[at])
        for at, name in enumerate(names)
    ]
    side_of = np.where(positive, 0, 1)
    tokens = units["tokens"].to_numpy()
    return Design(
        side=side_of,
        row=rows_of[side_of, example],
        stratum=stratum.astype(np.int64),
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
    group = design.stratum * 2 + design.side
    counts = rates = rows = None
    for block in blocks:
        averaged = block.of(gate_mass)
        for start in range(0, len(block.units), _UNITS_AT_ONCE):
            groups = group[block.units[start : start + _UNITS_AT_ONCE]]
            for number in np.unique(groups):
                at = start + np.flatnonzero(groups == number)
                units, chosen = block.units[at], block.counts[at][:, columns]
                if counts is None or rates is None:
                    counts, rates = np.zeros((2, 2 * len(design.strata), chosen.shape[1]))
                    if keep:
                        rows = tuple(np.zeros((n, chosen.shape[1])) for n in design.examples)
                values = chosen.astype(np.float64)
                counts[number] += values.sum(axis=0)  # of integers, so exact in any order
                if gate_mass:
                    values = averaged[at][:, columns]
                if not design.pooled:
                    values /= design.tokens[units, None]
                if gate_mass or not design.pooled:
                    # Down a column NumPy adds one row after the other: here, to the sum so far.
                    rates[number] = np.vstack([rates[number], values]).sum(axis=0)
                if rows is not None:
                    _add_rows(rows[number % 2], design.row[units], values)
    assert counts is not None
    assert rates is not None
    if design.pooled and not gate_mass:
        rates = counts
    sizes = np.zeros((len(design.strata), 2))
    np.add.at(sizes, (design.stratum, design.side), design.size)
    shape = (len(design.strata), 2, -1)
    totals = counts.reshape(shape).sum(axis=0).astype(np.int64)
    return Sums(totals, rates.reshape(shape) / sizes[:, :, None], rows)  # type: ignore[arg-type]


def _add_rows(
    rows: NDArray[np.float64], places: NDArray[np.int64], values: NDArray[np.float64]
) -> None:
    """Add `values` to the rows at `places`, in order where a place comes several times."""
    if len(np.unique(places)) == len(places):
        rows[places] += values
    else:
        np.add.at(rows, places, values)


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
