"""Draw a risk-difference table as a heat map: layers down, experts across."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from moescope.analysis.export import written_aside
from moescope.analysis.rd import read_settings
from moescope.tracer.errors import InputError

_FORMATS = (".pdf", ".png", ".svg")


def heatmap(table: pa.Table, path: str | Path) -> None:
    """Draw a table of `risk_difference` to a .png, .pdf or .svg file.

    Red experts are used more under the positive condition, blue ones under the negative; the
    scale is symmetric, so that white is no difference. A plus or minus stands in the cells of
    large differences, so that the drawing can be read in grey. Raises InputError for another
    suffix, or a table that isn't from `risk_difference`.
    """
    check_drawing(path)
    settings = read_settings(table)
    figure = heatmap_figure(table, gate_mass=settings["gate_mass"])
    figure.axes[0].set_title(_title(settings), fontsize=10, parse_math=False)
    save_figure(figure, path)


def check_drawing(path: str | Path) -> None:
    """InputError unless we can draw to a file of this name."""
    if Path(path).suffix.lower() not in _FORMATS:
        raise InputError(f"can't draw {path}: end its name with {', '.join(_FORMATS)}.")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure to a .png, .pdf or .svg file, whole."""
    check_drawing(path)
    path = Path(path)
    with written_aside(path) as aside:
        figure.savefig(aside, format=path.suffix.lower().removeprefix("."))


def heatmap_figure(
    table: pa.Table,
    *,
    gate_mass: bool = False,
    label: str | None = None,
    boxed: Collection[tuple[int, int]] = (),
    width: float | None = None,
) -> Figure:
    """The heat map as a figure without a title; (layer, expert) in `boxed` get a frame.

    `width` in inches is that of the whole figure; without it, it is what the cells need. `label`
    says what the colours mean, where it is no risk difference.
    """
    layers, rows = np.unique(table["layer"].to_numpy(), return_inverse=True)
    experts, columns = np.unique(table["expert"].to_numpy(), return_inverse=True)
    values = np.zeros((len(layers), len(experts)))
    values[rows, columns] = table["rd"].to_numpy()

    # Inches: cells of about a quarter inch, within what fits a page or a screen.
    across = width - 2 if width else float(np.clip(0.25 * len(experts), 5.5, 18))
    height = float(np.clip(0.25 * len(layers), 1.5, 10 if width is None else 6))
    figure = Figure(figsize=(across + 2, height + 1.6), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    limit = float(np.abs(values).max()) or 1.0
    image = axes.imshow(
        values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
    )
    axes.set_xticks(*_ticks(experts, across, 0.12 * len(str(experts[-1]))))
    axes.set_yticks(*_ticks(layers, height, 0.2))
    axes.set_xlabel("expert")
    axes.set_ylabel("MoE layer")
    _mark_signs(axes, values, limit, across / len(experts), height / len(layers))
    line = float(np.clip(18 * min(across / len(experts), height / len(layers)), 0.7, 1.8))
    for layer, expert in boxed:
        corner = np.searchsorted(experts, expert) - 0.5, np.searchsorted(layers, layer) - 0.5
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", lw=line))
    quantity = "mean gate weight" if gate_mass else "rate of selection"
    figure.colorbar(image, ax=axes, label=label or f"difference in {quantity}", pad=0.01)
    return figure


def _mark_signs(
    axes: Any, values: NDArray[Any], limit: float, cell_width: float, cell_height: float
) -> None:
    """Write the sign into the cells of at least a quarter of the largest difference."""
    points = float(np.clip(60 * min(cell_width, cell_height), 3, 10))  # of a cell in inches
    for row, column in np.argwhere(np.abs(values) >= limit / 4):
        value = values[row, column]
        dark = abs(value) > 0.6 * limit  # the map's ends are dark, white letters show there
        axes.text(
            column, row, "+" if value > 0 else "\N{MINUS SIGN}", ha="center", va="center",
            fontsize=points, color="white" if dark else "black",
        )  # fmt: skip


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
