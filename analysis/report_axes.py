"""Two axes' risk differences expert by expert: are the axes about the same experts?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import stats

from moescope.analysis.report_numbers import Expert, Side, correlation_number


@dataclass(frozen=True)
class AxesCompared:
    """Two axes' RD of the same experts: are they about the same ones?"""

    titles: tuple[str, str]
    experts: list[Expert]
    first: NDArray[np.float64]  # RD of each expert
    second: NDArray[np.float64]
    top: int
    rho: float  # Spearman's, of the signed RD
    rho_magnitude: float  # and of |RD|
    shared: list[Expert]  # in the top of both by |RD|
    by_chance: float  # expected number of shared ones, were the axes independent
    p_chance: float  # probability of as many or more by chance (hypergeometric)

    def group(self, expert: Expert) -> str:
        """Whose top an expert is in: first, second, both or neither."""
        mine = expert in _top(self.experts, self.first, self.top)
        theirs = expert in _top(self.experts, self.second, self.top)
        return {(1, 0): "first", (0, 1): "second", (1, 1): "both"}.get((mine, theirs), "neither")


def compare_axes(first: Side, second: Side, top: int = 10) -> AxesCompared | None:
    """Compare two evaluations' rankings; None if they aren't of the same experts.

    `top` is lowered to a quarter of the experts, so that an overlap by chance stays small.
    """
    rankings = first.evaluation.ranking, second.evaluation.ranking
    top = min(top, rankings[0].num_rows // 4)
    return compare_rankings((first.name, second.name), rankings, top) if top else None


def compare_rankings(
    titles: tuple[str, str], rankings: tuple[pa.Table, pa.Table], top: int
) -> AxesCompared | None:
    """Compare two rankings expert by expert; None if they aren't of the same experts."""
    values = [
        {(row["layer"], row["expert"]): row["rd"] for row in ranking.to_pylist()}
        for ranking in (ranking.select(["layer", "expert", "rd"]) for ranking in rankings)
    ]
    if values[0].keys() != values[1].keys():
        return None
    experts = sorted(values[0])
    one, two = (np.array([side[expert] for expert in experts]) for side in values)
    shared = _top(experts, one, top) & _top(experts, two, top)
    with np.errstate(invalid="ignore"):
        rho, magnitude = _rank_correlation(one, two), _rank_correlation(abs(one), abs(two))
    return AxesCompared(
        titles=titles,
        experts=experts,
        first=one,
        second=two,
        top=top,
        rho=rho,
        rho_magnitude=magnitude,
        shared=sorted(shared),
        by_chance=top * top / len(experts),
        p_chance=float(stats.hypergeom.sf(len(shared) - 1, len(experts), top, top)),
    )


def _top(experts: Sequence[Expert], values: NDArray[np.float64], top: int) -> set[Expert]:
    order = sorted(range(len(experts)), key=lambda at: (-abs(values[at]), experts[at]))
    return {experts[at] for at in order[:top]}


def _rank_correlation(one: NDArray[np.float64], two: NDArray[np.float64]) -> float:
    if np.ptp(one) == 0 or np.ptp(two) == 0:
        return math.nan  # nothing to rank
    return float(stats.spearmanr(one, two).statistic)


def comparable(sides: Sequence[Side]) -> AxesCompared | None:
    """The first two evaluations of different axes and the same model, compared."""
    for at, first in enumerate(sides):
        for second in sides[at + 1 :]:
            if first.axis != second.axis and first.settings.get("model") == second.settings.get(
                "model"
            ):
                return compare_axes(first, second)
    return None


def overlap_text(pair: AxesCompared) -> str:
    """How many of the strongest experts two axes share."""
    return (
        f"{len(pair.shared)} of the {pair.top} strongest of {pair.titles[0]} and of "
        f"{pair.titles[1]} are the same ({pair.by_chance:.1f} by chance)"
    )


def correlation_text(pair: AxesCompared) -> str:
    """The rank correlation of two axes."""
    return (
        f"rank correlation of RD {correlation_number(pair.rho)} over {len(pair.experts):,} experts"
    )
