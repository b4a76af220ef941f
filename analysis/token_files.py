"""The tokens to count: straight from a store's Parquet files, or from the rows of a query.

A query takes twice the time, most of it for handing lists around. So it serves only where the files
are not known (a connection) or don't hold whole tokens (a pipeline's stages); test_token_files.py
compares the two. From the files, the short columns say which rows count, and the long lists of
experts and weights are read only for row groups where one does. Threads read ahead of the counting.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moescope.analysis.rd_requests import ALL_SEGMENTS
from moescope.tracer.errors import StoreError
from moescope.tracer.format import MoeShape
from moescope.tracer.object_path import StorePath, Where, for_pyarrow
from moescope.tracer.store import committed_files, stage_of

_KEYS = ["request_id", "position", "token_id", "segment"]
_NAMES = ["request_id", "segment"]  # few values, which are read as codes
_AHEAD = 4  # row groups

BATCH_TOKENS = 16_384


@dataclass(frozen=True, slots=True)
class TokenBlock:
    """Some tokens' routing.

    `units` int64 [n], `ids` uint8 or uint16 [n, routes], `weights` float [n, routes] or None.
    """

    units: NDArray[np.int64]
    ids: NDArray[Any]
    weights: NDArray[Any] | None


# Of the short columns of some tokens, the number of the unit that each belongs to, or -1.
Choose = Callable[[pa.Table], NDArray[np.int64]]


def whole_files(path: Where) -> list[StorePath] | None:
    """The token files of a store; None if a pipeline's stages wrote some, each only its layers."""
    files, _ = committed_files(path)
    return files if all(stage_of(file.name) == (1, 1) for file in files) else None


def choose_tokens(units: pa.Table, settings: dict[str, Any]) -> Choose:
    """The tokens that count, as rd_tokens.sql chooses them of the requests of `number_units`."""
    unit_of = {name: unit for unit, name in enumerate(units["request_id"].to_pylist())}
    # One more at the end, for the tokens of no unit.
    start, first, last = (
        np.append(units[name].cast(pa.int64()).fill_null(absent).to_numpy(), absent)
        for name, absent in (
            ("start", -1),
            ("first_position", 0),
            ("last_position", np.iinfo(np.int64).max),
        )
    )
    segment, lead = settings["segment"], settings["lead"]
    wanted, unwanted = settings["token_ids"], settings["exclude_token_ids"]

    def choose(keys: pa.Table) -> NDArray[np.int64]:
        found = _decode(keys["request_id"], unit_of)
        position = keys["position"].to_numpy()
        counts = (position >= first[found]) & (position <= last[found])
        if segment != ALL_SEGMENTS:
            inside = _decode(keys["segment"], {segment: 0}) == 0
            if lead:
                begin = start[found]
                inside |= (position >= begin - lead) & (position < begin)
            counts &= inside
        if wanted:
            counts &= np.isin(keys["token_id"].to_numpy(), wanted)
        if unwanted:
            counts &= ~np.isin(keys["token_id"].to_numpy(), unwanted)
        return np.where(counts, found, -1)

    return choose


def choose_segments(rows: pa.Table) -> Choose:
    """Every token, as one of `rows`, which name a segment and a request each."""
    names = zip(rows["segment"].to_pylist(), rows["request_id"].to_pylist(), strict=True)
    units: dict[str, dict[str, int]] = {}
    for unit, (segment, request) in enumerate(names):
        units.setdefault(segment, {})[request] = unit

    def choose(keys: pa.Table) -> NDArray[np.int64]:
        found = np.full(keys.num_rows, -1)
        for segment, unit_of in units.items():
            inside = _decode(keys["segment"], {segment: 0}) == 0
            if inside.any():
                found = np.where(inside, _decode(keys["request_id"], unit_of), found)
        return found

    return choose


def read_tokens(
    files: Iterable[StorePath], choose: Choose, shape: MoeShape, *, weights: bool
) -> Iterator[TokenBlock]:
    """The chosen tokens of these files. StoreError names a file that can't be read."""
    with ThreadPoolExecutor(_AHEAD) as pool:
        ahead: deque[Future[TokenBlock | None]] = deque()
        try:
            for file in files:
                metadata = _readable(file, lambda file: pq.read_metadata(for_pyarrow(file)))
                for group in range(metadata.num_row_groups):
                    ahead.append(pool.submit(_read, file, metadata, group, choose, shape, weights))
                    if len(ahead) > _AHEAD:
                        yield from filter(None, [ahead.popleft().result()])
            while ahead:
                yield from filter(None, [ahead.popleft().result()])
        finally:
            for future in ahead:
                future.cancel()


def _read(
    file: StorePath,
    metadata: pq.FileMetaData,
    group: int,
    choose: Choose,
    shape: MoeShape,
    weights: bool,
) -> TokenBlock | None:
    def read(file: StorePath) -> TokenBlock | None:
        with pq.ParquetFile(for_pyarrow(file), metadata=metadata, read_dictionary=_NAMES) as reader:
            units = choose(reader.read_row_group(group, columns=_KEYS, use_threads=False))
            rows = np.flatnonzero(units >= 0)
            if not len(rows):
                return None
            names = ["expert_ids", "gate_weights"] if weights else ["expert_ids"]
            table = reader.read_row_group(group, columns=names, use_threads=False)
        lists = [_as_routes(table[name].combine_chunks(), len(units), shape) for name in names]
        if len(rows) < len(units):
            units, lists = units[rows], [values[rows] for values in lists]
        return TokenBlock(units, lists[0], lists[1] if weights else None)

    return _readable(file, read)


def from_query(
    batches: Iterable[pa.RecordBatch], shape: MoeShape, *, weights: bool
) -> Iterator[TokenBlock]:
    """Batches with the columns unit, expert_ids and gate_weights."""
    for batch in batches:
        units = batch.column(0).to_numpy()
        lists = [_as_routes(batch.column(at), len(units), shape) for at in range(1, 2 + weights)]
        yield TokenBlock(units, lists[0], lists[1] if weights else None)


def _as_routes(lists: pa.ListArray, num_tokens: int, shape: MoeShape) -> NDArray[Any]:
    """Lists of some tokens as [tokens, routes]; StoreError if one is of another length."""
    values = lists.flatten()
    if len(values) != num_tokens * shape.num_routes:
        raise StoreError(
            f"some token's list has not {shape.num_routes} entries: `moescope store verify` "
            "names the damaged files."
        )
    return values.to_numpy(zero_copy_only=False).reshape(num_tokens, -1)


def _readable(file: StorePath, read: Callable[[StorePath], Any]) -> Any:
    try:
        return read(file)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(
            f"{file} can't be read: {error}\n`moescope store verify` names the damaged files."
        ) from error


def _decode(column: pa.ChunkedArray, numbers: dict[str, int]) -> NDArray[np.int64]:
    """Of each name in a column of codes its number, or -1."""
    parts = [
        np.array([numbers.get(name, -1) for name in chunk.dictionary.to_pylist()] or [-1])[
            chunk.indices.to_numpy()
        ]
        for chunk in column.chunks
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
