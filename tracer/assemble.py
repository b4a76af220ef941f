"""Put the rows of each request together, in order of position, and make the store's tables.

Rows arrive step by step, those of all running requests interleaved. They wait in one growing
pool until their request is finished; only whole requests go to the store. So a file is sorted by
request and position, a request is never spread over two files, and of a position that came twice
(preemption computes again, a rejected draft is replaced) the last row stays.
"""

import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.tracer.format import (
    PROMPT,
    RESPONSE,
    TEMPLATE,
    MoeShape,
    requests_schema,
    tokens_schema,
)
from moescope.tracer.mask import mask_in_force
from moescope.tracer.ring import Rows

Span = tuple[str, int, int]


@dataclass(slots=True)
class Traced:
    """A traced request, as its `begin` message says and its `finish` message completes."""

    request: int
    request_id: str
    run: str
    prompt_tokens: int
    example_id: str | None = None
    condition: str | None = None
    mask: str | None = None
    composes: bool = False  # its mask is in force together with the global one
    spans: list[Span] | None = None
    stop_ids: list[int] = field(default_factory=list)
    lost_rows: int = 0


class Assembler:
    """Rows and messages in, tables of finished requests out."""

    def __init__(self, shape: MoeShape, *, memory_bytes: int = 1 << 32, spill: Path | None = None):
        self.shape = shape
        self._memory_bytes, self._spill = memory_bytes, spill
        self._pool = self._allocate(4096)
        # The global mask when each row of the pool arrived, by its index in `_globals`.
        self._global_of = np.zeros(4096, np.int32)
        self._globals: list[str | None] = [None]
        self._used = 0
        self._open: dict[int, Traced] = {}
        self._finished: dict[int, Traced] = {}
        self._rows_of: Counter[int] = Counter()  # request -> rows in the pool
        self.finished_rows = 0  # rows in the pool that `take` would deliver

    @property
    def num_open(self) -> int:
        """Requests that have begun and are not finished."""
        return len(self._open)

    @property
    def num_finished(self) -> int:
        """Finished requests that wait for `take`."""
        return len(self._finished)

    @property
    def num_rows(self) -> int:
        """Rows in the pool, of finished and unfinished requests."""
        return self._used

    def add(self, rows: Rows) -> None:
        """Copy rows into the pool."""
        if not len(rows):
            return
        stop = self._used + len(rows)
        if stop > len(self._pool):
            self._grow(stop)
        self._append(rows, len(self._globals) - 1)
        lowest = int(rows.request.min())
        counts = np.bincount(rows.request - np.uint32(lowest))
        for number in np.flatnonzero(counts):
            self._rows_of[lowest + int(number)] += int(counts[number])

    def mask_changes(self, key: str | None) -> None:
        """Rows from now on, of requests without a mask of their own, are under this one."""
        if not self._used:
            self._globals = []  # no row refers to an older one
        self._globals.append(key)

    def begin(self, traced: Traced) -> None:
        """A request starts; its rows may already be there."""
        self._open[traced.request] = traced

    def finish(self, request: int, lost_rows: int) -> None:
        """A request has all of its rows, but for `lost_rows` that were dropped."""
        traced = self._open.pop(request)
        traced.lost_rows = lost_rows
        self._finished[request] = traced
        self.finished_rows += self._rows_of.pop(request, 0)

    def is_open(self, request: int) -> bool:
        """Whether it has begun and not finished."""
        return request in self._open

    def give_up(self, request: int) -> int:
        """Forget the rows of a request of which nothing is known; returns how many there were."""
        before = self._used
        self._keep(np.flatnonzero(self._pool.request[:before] != request))
        del self._rows_of[request]
        return before - self._used

    def take(self) -> tuple[pa.Table, pa.Table] | None:
        """The (tokens, requests) tables of the finished requests, which leave the pool."""
        if not self._finished:
            return None
        used = self._pool.request[: self._used]
        numbers = np.fromiter(self._finished, np.uint32, len(self._finished))
        done = np.isin(used, numbers)
        places = _last_of_each_position(self._pool, np.flatnonzero(done))
        places, counts = self._strip_overrun(places)
        tables = self._tokens_table(places, counts), self._requests_table(places, counts)
        self._keep(np.flatnonzero(~done))
        self._finished, self.finished_rows = {}, 0
        return tables

    def _strip_overrun(self, places: NDArray[Any]) -> tuple[NDArray[Any], dict[int, int]]:
        """Leave out a last row whose token is a stop token that the model itself sampled.

        Under async scheduling the engine has launched the step after an end-of-sequence token by
        the time it sees the token; without it, it hasn't. The row is kept in neither case.
        """
        request = self._pool.request[places]
        starts = np.flatnonzero(np.diff(request.astype(np.int64), prepend=-1))
        stops = np.append(starts[1:], len(request))[: len(starts)]
        keep = np.ones(len(places), bool)
        counts = dict.fromkeys(self._finished, 0)
        for start, stop in zip(starts, stops, strict=True):
            traced = self._finished[int(request[start])]
            last = places[stop - 1]
            if (
                self._pool.position[last] >= traced.prompt_tokens
                and self._pool.token[last] in traced.stop_ids
            ):
                keep[stop - 1] = False
                stop -= 1
            counts[traced.request] = int(stop - start)
        return places[keep], counts

    def _tokens_table(self, places: NDArray[Any], counts: dict[int, int]) -> pa.Table:
        """Columns of `tokens_schema`; `places` are pool rows in order of request and position."""
        schema, rows = tokens_schema(self.shape), self._pool[places]
        ordered = [self._finished[number] for number in sorted(counts)]
        lengths = [counts[traced.request] for traced in ordered]
        offsets = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * self.shape.num_routes)
        segments = _Dictionary()
        segment_codes = [
            segments.spans(traced, rows.position[stop - length : stop])
            for traced, length, stop in zip(ordered, lengths, np.cumsum(lengths), strict=True)
        ]
        columns = [
            pa.DictionaryArray.from_arrays(
                np.repeat(np.arange(len(ordered), dtype=np.int32), lengths),
                pa.array([traced.request_id for traced in ordered], pa.string()),
            ),
            pa.array(rows.position),
            pa.array(rows.token),
            segments.array(np.concatenate(segment_codes)),
            self._masks_in_force(ordered, lengths, self._global_of[places]),
            pa.ListArray.from_arrays(
                offsets, pa.array(rows.experts.ravel()), type=schema.field("expert_ids").type
            ),
            pa.ListArray.from_arrays(
                offsets, pa.array(rows.weights.ravel()), type=schema.field("gate_weights").type
            ),
        ]
        return pa.Table.from_arrays(columns, schema=schema)

    def _masks_in_force(
        self, ordered: list[Traced], lengths: list[int], global_of: NDArray[np.int32]
    ) -> pa.DictionaryArray:
        """Each row's mask: its request's own, or else the global one, or both."""
        masks, num_globals = _Dictionary(), len(self._globals)
        kinds: dict[tuple[str | None, bool], int] = {}
        kind_of = [kinds.setdefault((t.mask, t.composes), len(kinds)) for t in ordered]
        pairs = np.repeat(kind_of, lengths) * num_globals + global_of
        codes, by_number = np.full(len(kinds) * num_globals, -1, np.int32), list(kinds)
        for pair in np.flatnonzero(np.bincount(pairs)).tolist():
            kind, at = divmod(pair, num_globals)
            own, composes = by_number[kind]
            codes[pair] = masks.code(mask_in_force(self._globals[at], own, composes=composes))
        return masks.array(codes[pairs])

    def _requests_table(self, places: NDArray[Any], counts: dict[int, int]) -> pa.Table:
        positions = self._pool.position[places]
        rows, at = [], 0
        for number in sorted(counts):
            traced, count = self._finished[number], counts[number]
            # Positions are distinct and ascending: gapless from 0 if the last is count - 1.
            gapless = count > 0 and positions[at + count - 1] == count - 1
            at += count
            rows.append(
                {
                    "request_id": traced.request_id,
                    "run": traced.run,
                    "example_id": traced.example_id,
                    "condition": traced.condition,
                    "mask": traced.mask,
                    "prompt_tokens": traced.prompt_tokens,
                    "tokens": count,
                    "complete": bool(
                        gapless and not traced.lost_rows and count >= traced.prompt_tokens
                    ),
                    "spans": [
                        {"segment": name, "start": start, "stop": stop}
                        for name, start, stop in traced.spans
                    ]
                    if traced.spans is not None
                    else None,
                }
            )
        return pa.Table.from_pylist(rows, schema=requests_schema())

    def _allocate(self, rows: int) -> Rows:
        if self._spill is None or rows * self.shape.row_bytes <= self._memory_bytes:
            return Rows.empty(rows, self.shape)
        # Beyond the limit: columns on an unnamed file, which the kernel pages and frees.
        template = Rows.empty(0, self.shape)
        columns = []
        for column in template.columns():
            with tempfile.TemporaryFile(dir=self._spill) as file:
                columns.append(np.memmap(file, column.dtype, "w+", shape=(rows, *column.shape[1:])))
        return Rows(*columns)

    def _grow(self, rows: int) -> None:
        old = self._pool[: self._used]
        self._pool = self._allocate(max(rows, 2 * len(self._pool)))
        before = self._global_of[: self._used]
        self._global_of = np.empty(len(self._pool), np.int32)
        self._used = 0
        self._append(old, before)

    def _append(self, rows: Rows, global_of: NDArray[np.int32] | int) -> None:
        stop = self._used + len(rows)
        for mine, theirs in zip(self._pool.columns(), rows.columns(), strict=True):
            mine[self._used : stop] = theirs
        self._global_of[self._used : stop] = global_of
        self._used = stop

    def _keep(self, places: NDArray[Any]) -> None:
        if len(self._pool) * self.shape.row_bytes > self._memory_bytes:
            kept, self._pool = self._pool[places], self._allocate(max(2 * len(places), 4096))
            before = self._global_of[places]
            self._global_of = np.empty(len(self._pool), np.int32)
            self._used = 0
            self._append(kept, before)
            return
        # Fancy indexing copies before it assigns, so the overlap is safe.
        for column in (*self._pool.columns(), self._global_of):
            column[: len(places)] = column[places]
        self._used = len(places)


def _last_of_each_position(pool: Rows, places: NDArray[Any]) -> NDArray[Any]:
    """`places`, sorted by (request, position), keeping the last arrival of each."""
    key = pool.request[places].astype(np.uint64) << np.uint64(32) | pool.position[places].astype(
        np.uint64
    )
    order = np.argsort(key, kind="stable")
    key = key[order]
    last = np.ones(len(key), bool)
    last[:-1] = key[1:] != key[:-1]
    return places[order[last]]


class _Dictionary:
    """Codes for the values of a dictionary column, in order of appearance."""

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}

    def code(self, value: str | None) -> int:
        """The value's code; -1 stands for null."""
        return -1 if value is None else self._codes.setdefault(value, len(self._codes))

    def spans(self, traced: Traced, positions: NDArray[np.int32]) -> NDArray[np.int32]:
        """The segment code of each position: its span's, or what lies outside the spans."""
        outside = PROMPT if traced.spans is None else TEMPLATE
        codes = np.where(
            positions < traced.prompt_tokens, self.code(outside), self.code(RESPONSE)
        ).astype(np.int32)
        for name, start, stop in traced.spans or ():
            codes[(positions >= start) & (positions < stop)] = self.code(name)
        return codes

    def array(self, codes: NDArray[Any]) -> pa.DictionaryArray:
        """A dictionary array of these codes."""
        indices = pa.array(codes.astype(np.int32), mask=codes < 0)
        return pa.DictionaryArray.from_arrays(indices, pa.array(list(self._codes), pa.string()))
