"""`make bench BENCH=layout`: how a trace's bytes depend on how they are laid out in Parquet.

Real routing, written in several ways that differ from the store's own in one thing each, beside the
entropy of the data: what an ideal coder would need that knows each layer's and rank's frequencies,
but nothing of the tokens before. A layout is of no use where DuckDB can't read it.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from moescope.tracer.format import MoeShape
from moescope.tracer.store import TOKENS_OPTIONS, committed_files, read_manifest

console = Console()

IDS, WEIGHTS = "expert_ids.list.element", "gate_weights.list.element"
OURS = {"compression": "zstd", "compression_level": 1} | TOKENS_OPTIONS


def bench_layout(esft: Path, rounds: int) -> None:
    """Print bytes, writing and reading speed of every layout, and the entropy."""
    shape = read_manifest(esft).shape
    tokens = pa.concat_tables(map(pq.read_table, committed_files(esft)[0])).unify_dictionaries()
    tokens = tokens.combine_chunks()
    ids, weights = (
        tokens[name].combine_chunks().values.to_numpy(zero_copy_only=False)
        for name in ("expert_ids", "gate_weights")
    )
    ids = ids.reshape(-1, len(shape.layers), shape.top_k)
    weights = weights.astype(np.float16).reshape(ids.shape)
    found = Table("layout", "bytes/token", "ids", "weights", "written, tokens/s", "read", "DuckDB")
    with tempfile.TemporaryDirectory() as folder:
        for name, (table, options) in _layouts(tokens, ids, weights).items():
            found.add_row(name, *_measure(Path(folder, "x.parquet"), table, options, rounds))
    console.print(found)
    _print_entropy(ids, weights, shape)


def _layouts(
    tokens: pa.Table, ids: NDArray[Any], weights: NDArray[np.float16]
) -> dict[str, tuple[pa.Table, dict[str, Any]]]:
    encodings = OURS["column_encoding"]
    dictionaries = OURS["use_dictionary"]
    out: dict[str, tuple[pa.Table, dict[str, Any]]] = {"as the store writes it": (tokens, OURS)}
    for size in (2_048, 65_536, 1 << 20):
        out[f"row groups of {size:,}"] = tokens, OURS | {"row_group_size": size}
    for codec, level in (("zstd", 3), ("zstd", 9), ("lz4", None), ("snappy", None), ("none", None)):
        name = codec if level is None else f"{codec}, level {level}"
        out[name] = tokens, OURS | {"compression": codec, "compression_level": level}
    out["ids without a dictionary"] = (
        tokens,
        OURS
        | {"use_dictionary": [name for name in dictionaries if name != IDS]}
        | {"column_encoding": encodings | {IDS: "PLAIN"}},
    )
    split = encodings | {WEIGHTS: "BYTE_STREAM_SPLIT"}
    out["weights by byte streams"] = tokens, OURS | {"column_encoding": split}
    rest = {name: way for name, way in encodings.items() if name != WEIGHTS}
    out["weights in a dictionary"] = (
        tokens,
        OURS | {"use_dictionary": [*dictionaries, WEIGHTS], "column_encoding": rest},
    )
    shuffled = np.random.default_rng(0).permutation(tokens.num_rows)
    out["rows in a random order"] = tokens.take(pa.array(shuffled)), OURS
    by_position = np.argsort(tokens["position"].to_numpy(), kind="stable")
    out["rows by position, not by request"] = tokens.take(pa.array(by_position)), OURS
    by_id = ids.argsort(axis=2)
    lists = [np.take_along_axis(values, by_id, axis=2) for values in (ids, weights)]
    out["experts by id, not by weight"] = _with_lists(tokens, *lists), OURS
    lists = [values.transpose(0, 2, 1) for values in (ids, weights)]
    out["rank-major, not layer-major"] = _with_lists(tokens, *lists), OURS
    return out


def _with_lists(tokens: pa.Table, *lists: NDArray[Any]) -> pa.Table:
    for name, values in zip(("expert_ids", "gate_weights"), lists, strict=True):
        at = tokens.column_names.index(name)
        flat, routes = np.ascontiguousarray(values).ravel(), values[0].size
        offsets = pa.array(np.arange(0, len(flat) + 1, routes, dtype=np.int32))
        field = tokens.schema.field(name)
        array = pa.ListArray.from_arrays(offsets, pa.array(flat), type=field.type)
        tokens = tokens.set_column(at, field, array)
    return tokens


def _measure(file: Path, table: pa.Table, options: dict[str, Any], rounds: int) -> list[str]:
    written = _seconds(rounds, lambda: pq.write_table(table, file, **options))
    read = _seconds(rounds, lambda: pq.read_table(file, use_threads=False))
    metadata, sizes = pq.read_metadata(file), dict.fromkeys((IDS, WEIGHTS), 0)
    for group in range(metadata.num_row_groups):
        for at in range(metadata.num_columns):
            column = metadata.row_group(group).column(at)
            if column.path_in_schema in sizes:
                sizes[column.path_in_schema] += column.total_compressed_size
    try:
        same = duckdb.sql(f"SELECT sum(list_sum(gate_weights)) FROM '{file}'").fetchall()
        readable = "yes" if same[0][0] > 0 else "no"
    except duckdb.Error:
        readable = "can't read it"
    rows = table.num_rows
    bytes_a_token = [size / rows for size in (file.stat().st_size, *sizes.values())]
    rates = [rows / seconds for seconds in (written, read)]
    return [*(f"{size:.1f}" for size in bytes_a_token), *(f"{r:,.0f}" for r in rates), readable]


def _seconds(rounds: int, work: Callable[[], Any]) -> float:
    """The median CPU seconds of `work`."""
    spent = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        spent.append(time.process_time() - start)
    return statistics.median(spent)


def _print_entropy(ids: NDArray[Any], weights: NDArray[np.float16], shape: MoeShape) -> None:
    bits = weights.view(np.uint16)
    places = [(layer, rank) for layer in range(len(shape.layers)) for rank in range(shape.top_k)]
    sets = np.sort(ids, axis=2)
    # The order of k experts costs log2(k!) bits at most; that of the set is what is left.
    lines = {
        "ids, each by its layer and rank": sum(_entropy(ids[:, a, b]) for a, b in places),
        "ids of a layer in order of ids": sum(_entropy(sets[:, a, b]) for a, b in places),
        "ids, and the same rank of the token before known": sum(
            _entropy(ids[1:, a, b].astype(np.int64) * 65_536 + ids[:-1, a, b])
            - _entropy(ids[:-1, a, b])
            for a, b in places
        ),
        "weights, each by its layer and rank": sum(_entropy(bits[:, a, b]) for a, b in places),
    }
    for name, total in lines.items():
        console.print(f"entropy of {name}: {total / 8:.1f} bytes/token")
    raw = shape.num_routes * (shape.id_dtype.itemsize + 2)
    console.print(f"as plain arrays: {raw} bytes/token ({shape.num_routes} of 3)")


def _entropy(values: NDArray[Any]) -> float:
    """Shannon's entropy of the values' frequencies, in bits."""
    _, counts = np.unique(values, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())
