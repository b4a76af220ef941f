"""SteerMoE's `activations_*.pkl` (arXiv 2509.09660) as rankings, and rankings in its columns.

Its file is a pickled pandas.DataFrame with a row an expert: layer, expert, a1, a2, d1, d2 (tokens
that did and did not select it, under its two conditions), a1_n, a2_n (rates), risk_diff,
Layer_Expert ("L02", a line break, "E07") and risk_diff_abs, the largest risk_diff_abs first.
Its `layer` counts the MoE layers from 0, so that it is not the model's number after a dense layer.

A pickle can run any code. Here it can name only what a DataFrame of numbers and texts consists of.
"""

import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moescope.analysis.export import written_aside
from moescope.analysis.rd import METADATA_KEY
from moescope.tracer.errors import InputError

_COUNTS = ("a1", "d1", "a2", "d2")

# What pandas 1 to 3 and numpy 1 to 2 name in a frame of numbers and Python texts. Each makes an
# array, an index or a block, or is a type; none calls what it is given. Arrow's arrays, which back
# the texts of pandas 3, are left out: they trust the sizes that a file claims.
_ALLOWED = {
    "builtins": {"slice"},
    "numpy": {"ndarray", "dtype"},
    "numpy.core.multiarray": {"_reconstruct"},
    "numpy._core.multiarray": {"_reconstruct"},
    "numpy.core.numeric": {"_frombuffer"},
    "numpy._core.numeric": {"_frombuffer"},
    "pandas": {"DataFrame", "Index", "RangeIndex"},
    "pandas.core.frame": {"DataFrame"},
    "pandas.core.internals.managers": {"BlockManager"},
    "pandas.core.indexes.base": {"Index", "_new_Index"},
    "pandas.core.indexes.range": {"RangeIndex"},
    "pandas._libs.internals": {"_unpickle_block"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no table needs")


def read_steermoe(
    path: str | Path,
    *,
    positive: str = "1",
    negative: str = "2",
    layers: Sequence[int] | None = None,
) -> pa.Table:
    """A ranking from SteerMoE's file, with the columns that `risk_difference` has for counts.

    `positive` and `negative` name its conditions 1 and 2. `layers` are the model's numbers of its
    MoE layers, if they don't count from 0 on. Raises InputError when the file names anything but
    tables of pandas and numpy, or holds no such table.
    """
    path = Path(path)
    try:
        frame = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a damaged pickle raises anything
        raise InputError(
            f"can't read {path}: {error}. Only a pickled pandas.DataFrame of numbers and Python "
            "texts is read; with pandas 3, save it with its texts and columns as dtype object."
        ) from error
    columns = _columns(frame, path)
    rates = [
        columns[chose] / np.maximum(columns[chose] + columns[did_not], 1)
        for chose, did_not in (("a1", "d1"), ("a2", "d2"))
    ]
    numbers = columns["layer"]
    if layers is not None:
        if numbers.max() >= len(layers):
            raise InputError(
                f"{path} has {numbers.max() + 1} layers, and {len(layers)} numbers of layers are "
                "given: name every MoE layer of the model."
            )
        numbers = np.array(layers)[numbers]
    rd = rates[0] - rates[1]
    order = np.lexsort((columns["expert"], numbers, -np.abs(rd)))
    table = {
        "layer": numbers.astype(np.int32),
        "expert": columns["expert"].astype(np.int32),
        **{name: columns[name] for name in _COUNTS},
        "rate_positive": rates[0],
        "rate_negative": rates[1],
        "rd": rd,
        "tokens_positive": columns["a1"] + columns["d1"],
        "tokens_negative": columns["a2"] + columns["d2"],
    }
    facts = {
        "source": f"SteerMoE: {path.name}",
        "positive": positive,
        "negative": negative,
        "estimator": "token",
        "gate_mass": False,
        "resamples": 0,
        "examples": None,
    }
    return pa.table(
        {name: pa.array(values[order]) for name, values in table.items()},
        metadata={METADATA_KEY: json.dumps(facts)},
    )


def _columns(frame: Any, path: Path) -> dict[str, Any]:
    """The columns that we need, as int64; InputError if they aren't there or no counts."""
    names = ("layer", "expert", *_COUNTS)
    there = getattr(frame, "columns", None)
    missing = [name for name in names if there is None or name not in there]
    if missing:
        raise InputError(
            f"{path} is no table of SteerMoE: it has no column {', '.join(missing)} (its "
            "routings, output_*.pkl, are not rankings)."
        )
    found = {}
    for name in names:
        try:
            values = np.asarray(frame[name], dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: column {name} holds no numbers: {error}") from error
        if not len(values) or (values < 0).any() or (values != np.floor(values)).any():
            raise InputError(f"{path}: column {name} holds something else than counts.")
        found[name] = values.astype(np.int64)
    return found


def write_steermoe(ranking: pa.Table, path: str | Path) -> None:
    """Write a ranking of `risk_difference` as SteerMoE's notebooks read it (pandas is needed).

    Its risk_diff pools tokens: it is computed from a1, d1, a2, d2, whatever estimator the ranking
    has.
    """
    try:
        import pandas as pd  # type: ignore[import-untyped]
    except ImportError as error:
        raise InputError("SteerMoE's files are pandas tables: pip install pandas") from error
    missing = [n for n in ("layer", "expert", *_COUNTS) if n not in ranking.column_names]
    if missing:
        raise InputError(
            f"the ranking has no column {', '.join(missing)}: make it with `moescope rd --out`."
        )
    columns = {name: ranking[name].to_numpy() for name in ("layer", "expert", *_COUNTS)}
    layers = np.unique(columns["layer"])
    counts = {name: columns[name].astype(np.float64) for name in ("a1", "a2", "d1", "d2")}
    rates = {
        f"a{n}_n": counts[f"a{n}"] / np.maximum(counts[f"a{n}"] + counts[f"d{n}"], 1)
        for n in (1, 2)
    }
    frame = pd.DataFrame(
        {
            "layer": np.searchsorted(layers, columns["layer"]),
            "expert": columns["expert"].astype(np.int64),
            **counts,
            **rates,
            "risk_diff": rates["a1_n"] - rates["a2_n"],
        }
    )
    names = [
        f"L{layer:02d}\nE{expert:02d}"
        for layer, expert in zip(frame["layer"], frame["expert"], strict=True)
    ]
    # Python's texts, also with pandas 3: older pandas reads no others, and nor do we.
    frame["Layer_Expert"] = pd.Series(names, dtype=object)
    frame["risk_diff_abs"] = frame["risk_diff"].abs()
    frame = frame.sort_values(
        ["risk_diff_abs", "layer", "expert"], ascending=[False, True, True]
    ).reset_index(drop=True)
    frame.columns = pd.Index(list(frame.columns), dtype=object)
    with written_aside(Path(path)) as aside:
        frame.to_pickle(aside, compression=None)
