"""How often each request's tokens chose each expert, and with what weights: a table on disk.

One row a *unit* (a request, or a request's segment), one column an expert of a layer, layer-major.
The rows lie in unnamed files, so that memory stays flat however many tokens and requests there are.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.tracer.errors import StoreError
from moescope.tracer.format import MoeShape

_TOKENS_AT_ONCE = 1024  # their keys fit the processor's cache
_BLOCK_BYTES = 1 << 24

BATCH_TOKENS = 16_384


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

    def add_tokens(self, batches: Iterable[pa.RecordBatch]) -> None:
        """Add the tokens of batches with the columns unit, expert_ids, gate_weights."""
        shape = self._shape
        # The column of the first expert of each route's layer.
        firsts = np.repeat(np.arange(len(shape.layers)) * shape.num_experts, shape.top_k)
        for batch in batches:
            units = batch.column(0).to_numpy()
            ids = self._routes(batch.column(1), len(units))
            if len(ids) and ids.max() >= shape.num_experts:
                raise StoreError(
                    f"a token chose expert {ids.max()}, and the model has {shape.num_experts}: "
                    "`moescope store verify` names the damaged files."
                )
            weights = self._routes(batch.column(2), len(units)) if self._mass else None
            for start in range(0, len(units), _TOKENS_AT_ONCE):
                part = slice(start, start + _TOKENS_AT_ONCE)
                there, local = np.unique(units[part], return_inverse=True)
                keys = (ids[part] + (firsts + local[:, None] * self.num_columns)).ravel()
                size = len(there) * self.num_columns
                self._counts.add(there, np.bincount(keys, minlength=size))
                if self._mass and weights is not None:
                    self._mass.add(there, np.bincount(keys, weights[part].ravel(), minlength=size))

    def add_rows(self, block: CountBlock) -> None:
        """Add whole rows; a unit may come several times, but once in a block."""
        self._counts.add(block.units, block.counts)
        if self._mass and block.mass is not None:
            self._mass.add(block.units, block.mass)

    def blocks(self, step: int | None = None) -> Iterator[CountBlock]:
        """All units in order, `step` at a time."""
        step = step or max(1, _BLOCK_BYTES // (12 * self.num_columns))
        for start in range(0, self.num_units, step):
            stop = min(start + step, self.num_units)
            mass = self._mass.read(start, stop) if self._mass else None
            yield CountBlock(np.arange(start, stop), self._counts.read(start, stop), mass)

    def _routes(self, lists: pa.ListArray, num_tokens: int) -> NDArray[Any]:
        """Lists of a batch as [tokens, routes]."""
        values = lists.flatten()
        if len(values) != num_tokens * self._shape.num_routes:
            raise StoreError(
                f"some token's list has not {self._shape.num_routes} entries: `moescope store "
                "verify` names the damaged files."
            )
        return values.to_numpy(zero_copy_only=False).reshape(num_tokens, -1)


class _Rows:
    """Rows of one dtype in an unnamed file; what was never written is zero."""

    def __init__(self, num_rows: int, num_columns: int, dtype: np.dtype[Any]) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # lives as long as we
        self._dtype, self._columns = dtype, num_columns
        self._row_bytes = num_columns * dtype.itemsize
        self._file.truncate(num_rows * self._row_bytes)

    def add(self, rows: NDArray[Any], values: NDArray[Any]) -> None:
        """Add `values` to these rows, each of which is named once."""
        for row, more in zip(rows.tolist(), values.reshape(len(rows), -1), strict=True):
            new = (self.read(row, row + 1)[0] + more).astype(self._dtype)
            os.pwrite(self._file.fileno(), new.tobytes(), row * self._row_bytes)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop)."""
        size = (stop - start) * self._row_bytes
        data = os.pread(self._file.fileno(), size, start * self._row_bytes)
        return np.frombuffer(data, self._dtype).reshape(stop - start, self._columns)
