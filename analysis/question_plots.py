"""Figures of the other questions (questions.py, shift.py), as .png, .pdf or .svg files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
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


def plot_tokens(
    tokens: Sequence[dict[str, Any]], labels: Sequence[str], path: str | Path, *, title: str
) -> None:
    """Draw rows of `expert_tokens`: how often each token chose the expert, beside all tokens' rate.

    `labels` name the tokens; the numbers behind the bars are how often, and of how many.
    """
    count = max(len(tokens), 1)
    figure = Figure(figsize=(6.4, 0.24 * count + 1.4), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    axes.barh(range(len(tokens)), [row["rate"] for row in tokens], color="#4477aa")
    for place, row in enumerate(tokens):
        counts = f" {row['count']:,} of {row['total']:,}"
        axes.text(row["rate"], place, counts, va="center", fontsize=7)
    if tokens:
        axes.axvline(tokens[0]["rate"] / tokens[0]["lift"], color="black", ls="--", lw=1)
        axes.set_xlabel("rate; dashed: of all tokens")
    axes.set_yticks(range(len(tokens)), labels, fontsize=7, parse_math=False)
    axes.set_ylim(count - 0.4, -0.6)
    axes.set_xlim(0, 1.18 * max((row["rate"] for row in tokens), default=1))
    axes.set_title(title, fontsize=10, parse_math=False)
    save_figure(figure, path)


def plot_request(
    routing: pa.Table, labels: Sequence[str], path: str | Path, *, num_experts: int, title: str
) -> None:
    """Draw rows of `request_routing`: a panel a layer, experts over tokens, darker the more weight.

    `labels` name the tokens in order; they are written where there is room. Lines part segments.
    """
    layers, rows = np.unique(routing["layer"].to_numpy(), return_inverse=True)
    positions, columns = np.unique(routing["position"].to_numpy(), return_inverse=True)
    shown = np.zeros((len(layers), num_experts, len(positions)))
    experts, weights = routing["experts"].to_pylist(), routing["weights"].to_pylist()
    for row, column, chosen, given in zip(rows, columns, experts, weights, strict=True):
        # A store of ids alone has no weights: then chosen is black.
        shown[row, chosen, column] = 1.0 if given is None or None in given else given
    width = float(np.clip(0.13 * len(positions), 5, 18))
    height = float(np.clip(0.05 * num_experts, 1.2, 4))
    size = width + 1.4, height * len(layers) + 1.2
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    panels = figure.subplots(len(layers), sharex=True, squeeze=False)[:, 0]
    of_first = routing.filter(rows == 0)
    segments = [of_first["segment"].to_pylist()[at] for at in np.argsort(columns[rows == 0])]
    edges = [at for at in range(1, len(segments)) if segments[at] != segments[at - 1]]
    for axes, layer, image in zip(panels, layers, shown, strict=True):
        drawn = axes.imshow(
            image, cmap="Greys", vmin=0, vmax=shown.max(), aspect="auto", interpolation="nearest"
        )
        axes.set_ylabel(f"layer {layer}\nexpert", fontsize=7)
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.tick_params(labelsize=6)
        for edge in edges:
            axes.axvline(edge - 0.5, color="#bb5566", lw=1)
    step = max(1, round(len(positions) * 0.13 / width))
    places = range(0, len(positions), step)
    words = [f"{positions[at]} {labels[at]}".strip() for at in places]
    panels[-1].set_xticks(places, words, rotation=90, fontsize=6, parse_math=False)
    named = " | ".join(segments[at] for at in [0, *edges])
    panels[0].set_title(f"{title}\n{named}", fontsize=9, parse_math=False)
    figure.colorbar(drawn, ax=list(panels), label="gate weight", shrink=0.8, pad=0.01)
    save_figure(figure, path)
