"""Figures of load, co-activation, shifts and two rankings, written to .png, .pdf or .svg files."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from moescope.analysis.plot import heatmap_figure, save_figure
from moescope.analysis.report_axes import AxesCompared
from moescope.analysis.report_plots import load_figure, scatter_figure


def plot_load(experts: pa.Table, path: str | Path) -> None:
    """Draw a table of `expert_load`: a line a layer, its experts sorted, darker the more used."""
    layers: dict[int, list[float]] = {}
    for row in experts.select(["layer", "load"]).to_pylist():
        layers.setdefault(row["layer"], []).append(row["load"])
    save_figure(load_figure([{"layer": n, "loads": layers[n]} for n in layers]), path)


def plot_coactivation(pairs: pa.Table, path: str | Path, *, even_lift: float, title: str) -> None:
    """Draw a table of `coactivation`: experts by experts, red where they are chosen together.

    The colours are log2 of the lift over `even_lift`, which is that of a random router; experts
    that are chosen together stand beside each other (average linkage). Grey is never together.
    """
    experts, logs = _log_matrix(pairs, even_lift)
    order = _side_by_side(logs)
    logs = logs[np.ix_(order, order)]
    inches = float(np.clip(0.16 * len(experts), 4, 10))
    figure = Figure(figsize=(inches + 1.2, inches), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    there = np.abs(logs[~np.isnan(logs)])
    limit = float(np.quantile(there, 0.98)) if len(there) else 0.0
    axes.set_facecolor("#bbbbbb")
    limit = limit or 1.0
    image = axes.imshow(logs, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    step = max(1, round(len(experts) * 0.14 / inches))
    places = range(0, len(experts), step)
    labels = [str(experts[order[place]]) for place in places]
    axes.set_xticks(places, labels, rotation=90, fontsize=6)
    axes.set_yticks(places, labels, fontsize=6)
    axes.set_xlabel("expert")
    axes.set_ylabel("expert")
    axes.set_title(title, fontsize=9, parse_math=False)
    label = "log2 of lift over a random router's"
    figure.colorbar(image, ax=axes, label=label, shrink=0.8, extend="both")
    save_figure(figure, path)


def _log_matrix(pairs: pa.Table, even_lift: float) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """(experts, log2 of lift over even lift [experts, experts]); NaN: never, or with itself."""
    first, second = pairs["expert"].to_numpy(), pairs["other"].to_numpy()
    experts = np.unique(np.concatenate([first, second]))
    lift = pairs["lift"].to_numpy() / (even_lift or 1)
    logs = np.full((len(experts), len(experts)), np.nan)
    rows, columns = np.searchsorted(experts, first), np.searchsorted(experts, second)
    logs[rows, columns] = np.log2(np.where(lift > 0, lift, np.nan))
    logs[columns, rows] = logs[rows, columns]
    return experts, logs


def _side_by_side(logs: NDArray[np.float64]) -> NDArray[np.int64]:
    """An order of the experts in which those of large lift are neighbours."""
    if len(logs) < 3:
        return np.arange(len(logs))
    lowest = np.nanmin(logs, initial=0) - 1  # never together is farther than anything
    distances = np.nanmax(logs, initial=0) - np.nan_to_num(logs, nan=lowest)
    np.fill_diagonal(distances, 0)
    tree = hierarchy.linkage(squareform(distances, checks=False), "average", optimal_ordering=True)
    return np.asarray(hierarchy.leaves_list(tree), np.int64)


def plot_shift(experts: pa.Table, path: str | Path, *, title: str) -> None:
    """Draw a table of `expert_shift`: red experts gained choices from side a to side b."""
    table = pa.table(
        {name: experts[name] for name in ("layer", "expert")} | {"rd": experts["shift"]}
    )
    figure = heatmap_figure(table, label="shift of the share of choices")
    figure.axes[0].set_title(title, fontsize=10, parse_math=False)
    save_figure(figure, path)


def plot_overlap(compared: AxesCompared, path: str | Path) -> None:
    """Draw every expert's risk difference in one ranking over that in the other."""
    save_figure(scatter_figure(compared), path)
