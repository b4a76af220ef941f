"""Draw a risk-difference table as a heat map: layers down, experts across."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from numpy.typing import NDArray

from moescope.analysis.export import written_aside
from moescope.analysis.rd import read_settings
from moescope.tracer.errors import InputError

_FORMATS = (".pdf", ".png", ".svg")


def heatmap(table: pa.Table, path: str | Path) -> None:
    """Draw a table of `risk_difference` to a .png, .pdf or .svg file.

    Red experts are used more under the positive condition, blue ones under the negative; the
    scale is symmetric, so that white is no difference. Raises InputError for another suffix, or
    a table that isn't from `risk_difference`.
    """
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise InputError(f"can't draw {path}: end its name with {', '.join(_FORMATS)}.")
    layers, rows = np.unique(table["layer"].to_numpy(), return_inverse=True)
    experts, columns = np.unique(table["expert"].to_numpy(), return_inverse=True)
    values = np.zeros((len(layers), len(experts)))
    values[rows, columns] = table["rd"].to_numpy()

    # Inches: cells of about a quarter inch, within what fits a page or a screen.
    width = float(np.clip(0.25 * len(experts), 5.5, 18))
    height = float(np.clip(0.25 * len(layers), 1.5, 10))
    figure = Figure(figsize=(width + 2, height + 1.6), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    limit = float(np.abs(values).max()) or 1.0
    image = axes.imshow(
        values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
    )
    axes.set_xticks(*_ticks(experts, width, 0.12 * len(str(experts[-1]))))
    axes.set_yticks(*_ticks(layers, height, 0.2))
    axes.set_xlabel("expert")
    axes.set_ylabel("MoE layer")
    settings = read_settings(table)
    axes.set_title(_title(settings), fontsize=10, parse_math=False)
    quantity = "mean gate weight" if settings["gate_mass"] else "rate of selection"
    figure.colorbar(image, ax=axes, label=f"difference in {quantity}", pad=0.01)
    with written_aside(path) as aside:
        figure.savefig(aside, format=path.suffix.lower().removeprefix("."))


def _ticks(
    numbers: NDArray[Any], inches: float, label_inches: float
) -> tuple[NDArray[Any], list[str]]:
    """Places and labels along an axis of this length, thinned out to what fits."""
    step = 1
    while step * inches / len(numbers) < label_inches:
        step *= 2
    places = np.arange(0, len(numbers), step)
    return places, [str(number) for number in numbers[places]]


def _title(settings: dict[str, Any]) -> str:
    counted = (
        f"{settings[f'examples_{side}']:,} requests, {settings[f'tokens_{side}']:,} tokens"
        for side in ("positive", "negative")
    )
    what = [f"segment {settings['segment']}", f"estimator {settings['estimator']}"]
    what += ["length-matched"] * settings["length_match"]
    return (
        f"{settings['positive']} minus {settings['negative']}\n"
        f"{', '.join(what)}\n"
        f"{' against '.join(counted)}"
    )
