"""The columns of a risk-difference table: estimates, and what inference.py says of them."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.analysis.aggregate import Aggregate
from moescope.analysis.counts import CountBlock, Counts
from moescope.analysis.rd_examples import Design, Sums, add_up, make_strata
from moescope.analysis.rd_requests import token_batches
from moescope.analysis.token_files import (
    BATCH_TOKENS,
    choose_tokens,
    from_query,
    read_tokens,
)
from moescope.tracer.format import MoeShape
from moescope.tracer.object_path import StorePath

if TYPE_CHECKING:
    from moescope.analysis.inference import Stratum
    from moescope.analysis.ray_counts import RayCounts

_MATRIX_BYTES = 1 << 28  # examples' rates in memory at a time
_STABILITY_DRAWS = 200


class Source:
    """The counts of all units, to be read in order as often as needed."""

    def __init__(
        self,
        con: duckdb.DuckDBPyConnection,
        units: pa.Table,
        settings: dict[str, Any],
        shape: MoeShape,
        aggregate: Aggregate | None,
        files: Sequence[StorePath] | None,
        elsewhere: "RayCounts | None" = None,
    ) -> None:
        """Counts tokens, unless the aggregate has just the rows that are wanted.

        The tokens are those of `files`, if they hold whole tokens; otherwise those of `con`. Or
        `elsewhere` counts them.
        """
        segment, gate_mass = settings["segment"], settings["gate_mass"]
        self._aggregate: Aggregate | None = None
        self._rows = units, segment, gate_mass
        if aggregate and not aggregate.add_up_segments(segment):
            self._aggregate = aggregate
            return
        self._counts = Counts(units.num_rows, shape, gate_mass=gate_mass)
        if aggregate:
            for block in aggregate.blocks(units, segment, gate_mass=gate_mass):
                self._counts.add_rows(block)
        elif elsewhere:
            for block in elsewhere.blocks(units, settings, shape):
                self._counts.add_rows(block)
        elif files is not None:
            choose = choose_tokens(units, settings)
            self._counts.add_tokens(read_tokens(files, choose, shape, weights=gate_mass))
        else:
            batches = token_batches(con, units, settings, BATCH_TOKENS)
            self._counts.add_tokens(from_query(batches, shape, weights=gate_mass))

    def blocks(self) -> Iterable[CountBlock]:
        """All units in order."""
        if self._aggregate is None:
            return self._counts.blocks()
        units, segment, gate_mass = self._rows
        return self._aggregate.blocks(units, segment, gate_mass=gate_mass)


class Experts:
    """Estimates and inference for every expert, in the order of the model.

    The matrices of examples' rates are made for as many experts at a time as memory allows.
    """

    def __init__(
        self, design: Design, source: Source, shape: MoeShape, settings: dict[str, Any]
    ) -> None:
        self._design, self._source, self._shape = design, source, shape
        self._settings = settings
        self._num_experts = len(shape.layers) * shape.num_experts
        sides = [design.side == side for side in (0, 1)]
        self.tokens = [int(design.tokens[side].sum()) for side in sides]
        self.requests = [int(side.sum()) for side in sides]
        fit = max(1, _MATRIX_BYTES // (8 * sum(design.examples)))
        self._parts = [
            np.arange(start, min(start + fit, self._num_experts))
            for start in range(0, self._num_experts, fit)
        ]
        self._kept: Sums | None = None

    def estimate(self) -> dict[str, NDArray[Any]]:
        """The columns layer to rd."""
        shape, weights = self._shape, self._design.weights
        # Where all experts fit, their rows are kept for `infer`: one pass over the counts will do.
        keep = bool(self._settings["resamples"]) and len(self._parts) == 1
        sums = self._add_up(slice(None), keep=keep)
        self._kept = sums if keep else None
        first, second = (
            sums.rates[0, side] if len(weights) == 1 else weights @ sums.rates[:, side]
            for side in (0, 1)
        )
        return {
            "layer": np.repeat(np.array(shape.layers, np.int32), shape.num_experts),
            "expert": np.tile(np.arange(shape.num_experts, dtype=np.int32), len(shape.layers)),
            "a1": sums.counts[0],
            "d1": self.tokens[0] - sums.counts[0],
            "a2": sums.counts[1],
            "d2": self.tokens[1] - sums.counts[1],
            "rate_positive": first,
            "rate_negative": second,
            "rd": first - second,
        }

    def infer(self, top: int) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """The columns ci_low to effect, and facts for the metadata; `top` 0: no stability."""
        # Here, since statsmodels and scipy.stats take a second to import.
        from moescope.analysis import inference, stability
        from moescope.analysis.power import power_note

        resamples, seed = self._settings["resamples"], self._settings["seed"]
        found: dict[str, list[NDArray[Any]]] = {}
        for part in self._parts:
            strata = self._load(part)
            draws = inference.bootstrap_differences(
                strata, resamples, np.random.default_rng([seed, 0])
            )
            low, high = inference.bootstrap_interval(strata, draws)
            some = partial(self._load_some, part)
            p = inference.permutation_p(strata, some, resamples, seed)
            here = {"ci_low": low, "ci_high": high, "p_value": p}
            here["effect"] = inference.effect_sizes(strata)
            if top:
                here["draws"] = draws[:_STABILITY_DRAWS]
                here["observed"] = inference.difference(strata)
                if stability.can_halve(strata):
                    here["half"], here["other"] = stability.half_differences(
                        strata, _STABILITY_DRAWS, np.random.default_rng([seed, 3])
                    )
            for name, values in here.items():
                found.setdefault(name, []).append(values)
        whole = {name: np.concatenate(parts, axis=-1) for name, parts in found.items()}
        whole["q_value"] = inference.q_values(whole["p_value"])
        paired = self._design.name == "paired"
        facts: dict[str, Any] = {
            "confidence": inference.CONFIDENCE,
            "power": [
                asdict(power_note(self._design.examples, paired=paired, level=level))
                for level in (0.05, 0.05 / self._num_experts)
            ],
        }
        if top:
            halves = (whole["half"], whole["other"]) if "half" in whole else None
            facts["stability"] = stability.rank_stability(
                halves, whole["draws"], whole["observed"], min(top, self._num_experts)
            )
        names = ("ci_low", "ci_high", "p_value", "q_value", "effect")
        return {name: whole[name] for name in names}, facts

    def _add_up(self, columns: Any, *, keep: bool) -> Sums:
        gate_mass = self._settings["gate_mass"]
        return add_up(
            self._design, self._source.blocks(), gate_mass=gate_mass, columns=columns, keep=keep
        )

    def _load_some(self, part: NDArray[np.int64], places: NDArray[np.int64]) -> "list[Stratum]":
        return self._load(part[places])

    def _load(self, columns: NDArray[np.int64]) -> "list[Stratum]":
        """The examples' rows of these experts."""
        if self._kept is None:
            rows = self._add_up(columns, keep=True).rows
        elif len(columns) == self._num_experts:
            rows = self._kept.rows
        else:
            assert self._kept.rows is not None
            rows = self._kept.rows[0][:, columns], self._kept.rows[1][:, columns]
        assert rows is not None
        return make_strata(self._design, rows)
