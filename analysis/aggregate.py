"""The aggregate of a store: how often each request's segments chose each expert, counted once.

    STORE/activation.parquet    one row a segment of a request, in order of (segment, request_id)
        segment     string
        request_id  string
        tokens      int32
        counts      list<uint32> [layers * experts], layer-major: tokens that chose the expert
        gate_mass   list<double> [layers * experts]: the sum of the weights that they gave it

It holds names and sizes of the files that it was counted from. Files of a store never change, so
while these are the store's files, it is what counting again would give; otherwise nobody uses it.
"""

import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moescope.analysis.counts import CountBlock, Counts
from moescope.analysis.export import written_aside
from moescope.analysis.token_files import (
    BATCH_TOKENS,
    choose_segments,
    from_query,
    read_tokens,
    whole_files,
)
from moescope.analysis.views import open_store, read_sql, unreadable
from moescope.tracer.errors import InputError, StoreError
from moescope.tracer.format import MoeShape
from moescope.tracer.object_path import StorePath, Where, for_pyarrow, store_path
from moescope.tracer.store import committed_files, read_manifest

FILE_NAME = "activation.parquet"

_KEY = b"moescope.aggregate"
_GROUP_VALUES = 1 << 20  # counts in a row group: 4 MiB, and 8 of gate mass
_THREADS = 4


def build_aggregate(path: Where) -> StorePath:
    """Count the store at `path` into its aggregate; returns the file.

    Raises StoreError when `path` is no trace store or can't be read, InputError when traces were
    added meanwhile.
    """
    path = store_path(path)
    facts, files = read_manifest(path), _file_sizes(path)
    shape = facts.shape
    if not facts.weights:
        raise InputError(
            f"{path} has no gate weights (expert ids alone were imported), and an aggregate holds "
            "their sums: ask this store as it is."
        )
    with closing(open_store(path)) as con:
        try:
            # As in rd.py: sums are exact in any order.
            con.execute("SET preserve_insertion_order = false").fetchall()
            rows = con.sql(
                "SELECT segment, request_id, count(*)::INTEGER AS tokens FROM tokens "
                "GROUP BY segment, request_id ORDER BY segment, request_id"
            ).to_arrow_table()
            counts = Counts(rows.num_rows, shape, gate_mass=True)
            if (whole := whole_files(path)) is not None:
                counts.add_tokens(read_tokens(whole, choose_segments(rows), shape, weights=True))
            else:
                numbers = pa.array(np.arange(rows.num_rows))
                con.register("aggregate_rows", rows.append_column("unit", numbers))
                batches = con.sql(read_sql("aggregate")).to_arrow_reader(BATCH_TOKENS)
                counts.add_tokens(from_query(batches, shape, weights=True))
        except duckdb.Error as error:
            raise unreadable(path, error) from error
    if _file_sizes(path) != files:
        raise InputError(f"traces were added to {path} meanwhile: aggregate it when that is done.")
    _write(path / FILE_NAME, rows, counts, {"files": files})
    return path / FILE_NAME


def _write(file: StorePath, rows: pa.Table, counts: Counts, facts: dict[str, object]) -> None:
    schema = pa.schema(
        [
            pa.field("segment", pa.string(), nullable=False),
            pa.field("request_id", pa.string(), nullable=False),
            pa.field("tokens", pa.int32(), nullable=False),
            _lists("counts", pa.uint32()),
            _lists("gate_mass", pa.float64()),
        ],
        metadata={_KEY: json.dumps(facts)},
    )
    step = _rows_in_group(counts.num_columns)
    with (
        written_aside(file) as aside,
        pq.ParquetWriter(
            aside,
            schema,
            compression="zstd",
            compression_level=1,
            use_dictionary=["segment", "counts.list.element"],
        ) as writer,
    ):
        for block in counts.blocks(step):
            assert block.mass is not None
            offsets = pa.array(np.arange(len(block.units) + 1, dtype=np.int32) * counts.num_columns)
            lists = [
                pa.ListArray.from_arrays(offsets, pa.array(values), type=schema.field(name).type)
                for name, values in (
                    ("counts", block.counts.ravel()),
                    ("gate_mass", block.mass.ravel()),
                )
            ]
            keys = rows.slice(int(block.units[0]), len(block.units)).combine_chunks()
            columns = [*(keys[name].cast(schema.field(name).type) for name in schema.names[:3])]
            writer.write_table(
                pa.Table.from_arrays([*columns, *lists], schema=schema), row_group_size=step
            )


class Aggregate:
    """A store's aggregate, opened: its rows' keys in memory, their counts on disk."""

    def __init__(self, file: StorePath, metadata: pq.FileMetaData, shape: MoeShape) -> None:
        self._file, self._metadata = file, metadata
        self._num_columns = len(shape.layers) * shape.num_experts
        self._rows = pq.read_table(for_pyarrow(file), columns=["segment", "request_id", "tokens"])

    def lengths(self, segment: str) -> pa.Table:
        """As rd_requests.token_lengths gives them, of whole segments."""
        rows = self._rows
        if segment != "all":
            rows = rows.filter(pc.equal(rows["segment"], segment))
        sums = rows.group_by("request_id").aggregate([("tokens", "sum")])
        nothing = pa.nulls(sums.num_rows)
        return pa.table(
            {
                "request_id": sums["request_id"],
                "start": nothing.cast(pa.int32()),
                "positions": nothing.cast(pa.list_(pa.int32())),
                "length": sums["tokens_sum"].cast(pa.int64()),
            }
        )

    def add_up_segments(self, segment: str) -> bool:
        """Whether a unit has several rows: then `blocks` doesn't give units in order, or once."""
        return segment == "all" and len(self._rows["segment"].unique()) > 1

    def blocks(self, units: pa.Table, segment: str, *, gate_mass: bool) -> Iterator[CountBlock]:
        """The rows of the requests of `number_units`, as units.

        Only row groups that hold one are read, some of them ahead by other threads.
        """
        found = pc.index_in(self._rows["request_id"], value_set=units["request_id"])
        unit_of = found.fill_null(-1).to_numpy().astype(np.int64)
        if segment != "all":
            unit_of[self._rows["segment"].to_numpy() != segment] = -1
        groups, start = [], 0
        for number in range(self._metadata.num_row_groups):
            stop = start + self._metadata.row_group(number).num_rows
            places = np.flatnonzero(unit_of[start:stop] >= 0)
            if len(places):
                groups.append((number, places, unit_of[start + places]))
            start = stop
        names = ["counts", "gate_mass"] if gate_mass else ["counts"]
        with ThreadPoolExecutor(_THREADS) as pool:
            ahead: deque[Future[CountBlock]] = deque()
            for group in groups:
                ahead.append(pool.submit(self._read, names, *group))
                if len(ahead) > _THREADS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _read(
        self, names: list[str], group: int, places: NDArray[np.int64], units: NDArray[np.int64]
    ) -> CountBlock:
        # A reader of its own: one is not for several threads at once.
        with pq.ParquetFile(for_pyarrow(self._file), metadata=self._metadata) as reader:
            table = reader.read_row_group(group, columns=names, use_threads=False)
        arrays = [
            table[name].combine_chunks().flatten().to_numpy().reshape(-1, self._num_columns)
            for name in names
        ]
        if len(places) < len(arrays[0]):
            arrays = [array[places] for array in arrays]
        return CountBlock(units, arrays[0], arrays[1] if len(arrays) > 1 else None)


def read_aggregate(path: Where) -> Aggregate | None:
    """The aggregate of the store at `path`; None if there is none of exactly its files."""
    path = store_path(path)
    file = path / FILE_NAME
    if not file.is_file():
        return None
    try:
        metadata = pq.read_metadata(for_pyarrow(file))
        facts = json.loads((metadata.metadata or {})[_KEY])
        if facts["files"] != _file_sizes(path):
            return None
        return Aggregate(file, metadata, read_manifest(path).shape)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise StoreError(
            f"the aggregate {file} can't be read ({error}): remove it, or count again with "
            f"`moescope store aggregate {path}`."
        ) from error


def _file_sizes(path: StorePath) -> dict[str, int]:
    """The committed files of a store, by their path within it."""
    files = (file for files in committed_files(path) for file in files)
    return {f"{file.parent.name}/{file.name}": file.stat().st_size for file in files}


def _lists(name: str, values: pa.DataType) -> pa.Field:
    return pa.field(name, pa.list_(pa.field("element", values, nullable=False)), nullable=False)


def _rows_in_group(num_columns: int) -> int:
    return max(1, _GROUP_VALUES // num_columns)
