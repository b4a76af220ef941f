"""Read the rankings that `moescope rd --out` writes."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from moescope.analysis.export import file_format
from moescope.tracer.errors import InputError
from moescope.tracer.format import MoeShape

_COLUMNS = ("layer", "expert", "a1", "d1", "a2", "d2", "rd")


def read_ranking(path: str | Path) -> pa.Table:
    """A ranking that `moescope rd --out` wrote, in any of its formats."""
    file_format(Path(path))  # what is wrong with the name comes first
    if not Path(path).is_file():
        raise InputError(f"there is no ranking {path}: make it with `moescope rd --out`")
    return read_table(path, "ranking")


def read_table(path: str | Path, what: str = "table") -> pa.Table:
    """A .parquet, .csv or .json file (an array with one object a row)."""
    path = Path(path)
    kind = file_format(path)
    try:
        if kind == "parquet":
            return pq.read_table(path)
        if kind == "csv":
            return pyarrow.csv.read_csv(path)
        return pa.Table.from_pylist(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        # Arrow's are ValueErrors; a JSON file that is no array of rows gives the others.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"can't read the {what} {path}: {reason}") from error


def ranking_shape(table: pa.Table) -> MoeShape:
    """The model's shape: a ranking has a row for each expert, and each token chose k of a layer."""
    missing = [name for name in _COLUMNS if name not in table.column_names]
    if missing:
        raise InputError(
            f"the ranking has no column {', '.join(missing)}: make it with `moescope rd --out`"
        )
    layers, experts = (sorted(set(table[name].to_pylist())) for name in ("layer", "expert"))
    places = set(zip(table["layer"].to_pylist(), table["expert"].to_pylist(), strict=True))
    tokens = sum(table[name][0].as_py() for name in ("a1", "d1", "a2", "d2")) if places else 0
    chosen = Counter[int]()
    for row in table.select(["layer", "a1", "a2"]).to_pylist():
        chosen[row["layer"]] += row["a1"] + row["a2"]
    top_k = min(chosen.values()) // tokens if tokens else 0
    whole = len(places) == table.num_rows == len(layers) * len(experts)
    if not whole or top_k == 0 or set(chosen.values()) != {top_k * tokens}:
        raise InputError(
            "the ranking has not one row for each expert of each layer, or its counts don't add up "
            "to a top-k: give the whole file that `moescope rd --out` wrote"
        )
    return MoeShape(tuple(layers), len(experts), top_k)
