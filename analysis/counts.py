"""How often each request's tokens chose each expert, and with what weights: a table on disk.

One row a *unit* (a request, or a request's segment), one column an expert of a layer, layer-major.
The rows lie in unnamed files, so that memory stays flat however many tokens and requests there are.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.analysis.token_files import TokenBlock
from moescope.tracer.errors import StoreError
from moescope.tracer.format import MoeShape

_TOKENS_AT_ONCE = 512
_BLOCK_BYTES = 1 << 24
_FIRST_NOT_FINITE = 0x7C00  # of float16, as bits
_WIDENED = np.float32(2.0**112)


@dataclass(frozen=True, slots=True)
class CountBlock:
    """Some units' rows: `units` ascending [n], `counts` [n, columns], and with weights `mass`."""

    units: NDArray[np.int64]
    counts: NDArray[np.uint32]
    mass: NDArray[np.float64] | None

    def of(self, gate_mass: bool) -> NDArray[Any]:
        """What is averaged: gate mass or counts."""
        if not gate_mass:
            return self.counts
        assert self.mass is not None
        return self.mass


class Counts:
    """Adds up tokens in any order: counts are integers and weights multiples of 2^-24, so exact."""

    def __init__(self, num_units: int, shape: MoeShape, *, gate_mass: bool) -> None:
        self.num_units, self._shape = num_units, shape
        self.num_columns = len(shape.layers) * shape.num_experts
        self._counts = _Rows(num_units, self.num_columns, np.dtype(np.uint32))
        self._mass = _Rows(num_units, self.num_columns, np.dtype(np.float64)) if gate_mass else None

    def add_tokens(self, blocks: Iterable[TokenBlock]) -> None:
        """Add tokens; StoreError if one chose an expert that the model has not."""
        shape = self._shape
        # The column of the first expert of each route's layer.
        firsts = np.repeat(np.arange(len(shape.layers)) * shape.num_experts, shape.top_k)
        for block in blocks:
            if len(block.ids) and block.ids.max() >= shape.num_experts:
                raise StoreError(
                    f"a token chose expert {block.ids.max()}, and the model has "
                    f"{shape.num_experts}: `moescope store verify` names the damaged files."
                )
            for part in _runs(block.units):
                unit = block.units[part.start]
                keys = (block.ids[part] + firsts).ravel()
                self._counts.add(unit, np.bincount(keys, minlength=self.num_columns))
                if self._mass and block.weights is not None:
                    weights = _widen(block.weights[part].ravel())
                    self._mass.add(unit, np.bincount(keys, weights, self.num_columns))

    def add_rows(self, block: CountBlock) -> None:
        """Add whole rows; a unit may come several times, but once in a block."""
        for at, unit in enumerate(block.units):
            self._counts.add(unit, block.counts[at])
            if self._mass and block.mass is not None:
                self._mass.add(unit, block.mass[at])

    def blocks(self, step: int | None = None) -> Iterator[CountBlock]:
        """All units in order, `step` at a time."""
        step = step or max(1, _BLOCK_BYTES // (12 * self.num_columns))
        for start in range(0, self.num_units, step):
            stop = min(start + step, self.num_units)
            mass = self._mass.read(start, stop) if self._mass else None
            yield CountBlock(np.arange(start, stop), self._counts.read(start, stop), mass)


def _runs(units: NDArray[np.int64]) -> Iterator[slice]:
    """Stretches of one unit; long ones in parts whose keys fit the processor's cache."""
    edges = np.flatnonzero(units[1:] != units[:-1]) + 1
    for start, stop in pairwise([0, *edges.tolist(), len(units)]):
        for at in range(start, stop, _TOKENS_AT_ONCE):
            yield slice(at, min(at + _TOKENS_AT_ONCE, stop))


def _widen(weights: NDArray[Any]) -> NDArray[Any]:
    """Weights in a dtype that adds up fast; float16 by its bits: NumPy takes four times as long.

    Exponent and mantissa moved to where float32 has them give the number times 2^-112. That is so
    for every half that has no sign and is no infinity or NaN, and gate weights are such.
    """
    if weights.dtype != np.float16:
        return weights
    bits = weights.view(np.uint16)
    if len(bits) == 0 or bits.max() >= _FIRST_NOT_FINITE:
        return weights.astype(np.float32)
    return (bits.astype(np.uint32) << 13).view(np.float32) * _WIDENED


class _Rows:
    """Rows of one dtype in an unnamed file; what was never written is zero."""

    def __init__(self, num_rows: int, num_columns: int, dtype: np.dtype[Any]) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # lives as long as we
        self._dtype, self._columns = dtype, num_columns
        self._row_bytes = num_columns * dtype.itemsize
        self._file.truncate(num_rows * self._row_bytes)
        self._written = np.zeros(num_rows, bool)

    def add(self, row: int, values: NDArray[Any]) -> None:
        """Add `values` [columns] to a row."""
        new = values.astype(self._dtype)
        if self._written[row]:
            new += self.read(row, row + 1)[0]
        os.pwrite(self._file.fileno(), new.data, int(row) * self._row_bytes)
        self._written[row] = True

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop)."""
        size = (stop - start) * self._row_bytes
        data = os.pread(self._file.fileno(), size, start * self._row_bytes)
        return np.frombuffer(data, self._dtype).reshape(stop - start, self._columns)
