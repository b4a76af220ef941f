"""The report's figures. Arms and strengths differ by marker, line and grey, not by colour alone."""

import io
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from moescope.analysis.plot import heatmap_figure
from moescope.analysis.report_axes import AxesCompared
from moescope.analysis.report_numbers import Expert, metric_words, scale_of

WIDTH_INCHES = 7.2  # the text's width on A4
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # letters stay letters: small, and found by a search
}
# role -> marker, fill, line, colour
_LOOKS = {
    "base": {"marker": "D", "color": "#222222", "linestyle": "-"},
    "steered": {"marker": "o", "color": "#0b5394", "linestyle": "-"},
    "reverse": {"marker": "s", "color": "#b45309", "linestyle": "--", "markerfacecolor": "white"},
    "random": {"marker": "x", "color": "#777777", "linestyle": ":"},
}


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file of 150 dots an inch."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element to stand in a page; equal figures give equal text.

    All ids begin with `name`, so that several elements can be in one page.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)  # HTML knows both
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)


def rd_figure(ranking: pa.Table, gate_mass: bool, boxed: Collection[Expert]) -> Figure:
    """RD, layers down and experts across; the experts in `boxed` (the mask's) have a frame."""
    with matplotlib.rc_context({**_STYLE, "font.size": 8}):
        return heatmap_figure(ranking, gate_mass=gate_mass, boxed=boxed, width=WIDTH_INCHES)


def load_figure(load: Sequence[Mapping[str, Any]]) -> Figure:
    """Per layer the experts' load over even load, sorted; one grey band a layer.

    Each of `load` has `layer` and `loads`: the experts' shares of the choices times their number.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(0.24 * len(load) + 1.4, max_height=7)
        values = np.array([sorted(layer["loads"], reverse=True) for layer in load])
        image = axes.imshow(values, cmap="Greys", vmin=0, aspect="auto", interpolation="nearest")
        step = max(1, len(load) // 24)
        axes.set_yticks(range(0, len(load), step), [str(row["layer"]) for row in load][::step])
        axes.set_ylabel("MoE layer")
        axes.set_xlabel("experts of the layer, busiest first")
        figure.colorbar(image, ax=axes, label="load (1 = even)", pad=0.01)
    return figure


def arms_figure(levels: Sequence[Mapping[str, Any]], metric: str) -> Figure:
    """The main metric of each arm with its interval: base, steered, reverse, each random draw.

    Each of `levels` has `arm`, `role`, `value`, `low`, `high`.
    """
    factor, unit = scale_of(metric)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(0.26 * len(levels) + 0.8)
        for row, level in enumerate(levels):
            value, low, high = (factor * level[name] for name in ("value", "low", "high"))
            _point(axes, row, value, low, high, level["role"])
        base = next((level for level in levels if level["role"] == "base"), None)
        if base:
            axes.axvline(factor * base["value"], color="#222222", lw=0.8, ls=(0, (1, 2)), zorder=0)
        axes.set_yticks(range(len(levels)), [level["arm"] for level in levels])
        axes.set_ylim(len(levels) - 0.4, -0.6)
        axes.set_xlabel(f"{metric_words(metric)}, {unit}")
        if unit == "%":
            axes.set_xlim(-2, 102)
    return figure


def forest_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Changes against base in points with 95 % intervals, and the random control's beside them.

    `rows` are rows of the effects table with `role` ("steered" or "reverse"), of rates alone.
    """
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["axis"], row["kind"], row["metric"]), []).append(row)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(0.36 * len(groups) + 1.0)
        for at, group in enumerate(groups.values()):
            if at % 2:
                axes.axhspan(at - 0.5, at + 0.5, color="#f3f3f3", zorder=0)
            for row in group:
                shift = {"steered": -0.16, "reverse": 0.16}[row["role"]]
                control, low, high = _points(row, "control_delta", "control_low", "control_high")
                if not np.isnan(control):
                    axes.plot([low, high], [at + shift] * 2, lw=6, color="#cccccc", zorder=1,
                              solid_capstyle="butt")  # fmt: skip
                    axes.plot(control, at + shift, "|", color="#555555", ms=7)
                value, low, high = _points(row, "delta", "ci_low", "ci_high")
                _point(axes, at + shift, value, low, high, row["role"])
        axes.axvline(0, color="#222222", lw=0.8)
        axes.set_yticks(
            range(len(groups)),
            [metric_words(metric, kind) for _, kind, metric in groups],
        )
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_xlabel("change against base, points")
        handles = [_handle(axes, role) for role in ("steered", "reverse")]
        handles += axes.plot([], [], lw=6, color="#cccccc", label="random experts, all draws")
        figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False)
    return figure


def dose_figure(
    doses: Mapping[str, Sequence[Mapping[str, Any]]],
    metric: str,
    loss_allowed: float | None,
) -> Figure:
    """Effect (top) and utility (bottom) over the number of experts, one column a strength.

    `doses` maps a strength to rows with `role`, `experts`, and `effect` and `utility`: rows of
    the effects table or None, and `headline`. The grey band is the random control's.
    """
    experts = sorted({row["experts"] for rows in doses.values() for row in rows})
    place = {number: at for at, number in enumerate(experts)}
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 4.4), layout="constrained", dpi=150)
        grid = figure.subplots(2, len(doses), sharex=True, sharey="row", squeeze=False)
        for column, (strength, rows) in enumerate(doses.items()):
            for line, what in enumerate(("effect", "utility")):
                axes = grid[line][column]
                axes.axhline(0, color="#222222", lw=0.8)
                for role in ("steered", "reverse"):
                    curve = [
                        (place[row["experts"]], row[what])
                        for row in sorted(rows, key=lambda row: row["experts"])
                        if row["role"] == role and row[what] is not None
                    ]
                    _curve(axes, curve, role)
                for at in {place[row["experts"]] for row in rows if row["headline"]}:
                    axes.axvline(at, color="#999999", lw=0.8, ls=(0, (1, 2)), zorder=0)
                axes.set_xticks(range(len(experts)), [str(number) for number in experts])
                axes.set_xlim(-0.4, len(experts) - 0.6)
            grid[0][column].set_title(strength, fontsize=9)
            if loss_allowed is not None:
                grid[1][column].axhline(
                    -loss_allowed, color="#222222", lw=0.8, ls=(0, (5, 3)), zorder=0
                )
        figure.supxlabel("experts in the mask", fontsize="medium")
        if len(doses) * len(experts) > 24:
            for axes in grid[1]:
                axes.tick_params(axis="x", labelsize=6)
        grid[0][0].set_ylabel(f"{metric_words(metric)}\nchange, points")
        grid[1][0].set_ylabel("utility\nchange, points")
        handles = [_handle(grid[0][0], role) for role in ("steered", "reverse")]
        handles.append(
            grid[0][0].fill_between([], [], [], color="#dddddd", label="random experts, all draws")
        )
        figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False)
    return figure


def scatter_figure(compared: AxesCompared) -> Figure:
    """Each expert's RD on one axis over that on the other; the strongest of each are marked."""
    looks: dict[str, Any] = {
        "neither": {"marker": ".", "color": "#999999", "s": 18},
        "first": {"marker": "^", "color": "#0b5394", "s": 34},
        "second": {"marker": "s", "color": "#b45309", "s": 26, "facecolor": "white"},
        "both": {"marker": "*", "color": "#222222", "s": 90},
    }
    first, second = compared.titles
    words = {
        "neither": "other experts",
        "first": f"top {compared.top} of {first}",
        "second": f"top {compared.top} of {second}",
        "both": "top of both",
    }
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 4.6), layout="constrained", dpi=150)
        axes = figure.add_subplot()
        axes.axhline(0, color="#bbbbbb", lw=0.8, zorder=0)
        axes.axvline(0, color="#bbbbbb", lw=0.8, zorder=0)
        groups = np.array([compared.group(expert) for expert in compared.experts])
        for group, look in looks.items():
            mine = groups == group
            axes.scatter(
                compared.first[mine], compared.second[mine], **look,
                label=f"{words[group]} ({int(mine.sum())})",
            )  # fmt: skip
        named = sorted(
            (at for at, group in enumerate(groups) if group != "neither"),
            key=lambda at: -max(abs(compared.first[at]), abs(compared.second[at])),
        )
        points = np.stack([compared.first, compared.second], axis=1)
        near = 0.1 * np.abs(points).max()  # labels would lie on each other
        clusters: list[list[int]] = []
        for at in named[:12]:
            cluster = next((c for c in clusters if np.ptp(points[[c[0], at]], 0).max() < near), [])
            clusters += [] if cluster else [cluster]
            cluster.append(at)
        for together in clusters:
            axes.annotate(
                ", ".join("{}·{}".format(*compared.experts[at]) for at in sorted(together)),
                (compared.first[together[0]], compared.second[together[0]]),
                xytext=(4, 4), textcoords="offset points", fontsize=7,
            )  # fmt: skip
        axes.set_xlabel(f"RD, {first}")
        axes.set_ylabel(f"RD, {second}")
        axes.margins(0.1)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _figure(height: float, max_height: float = 9) -> tuple[Figure, Any]:
    height = float(np.clip(height, 1.6, max_height))
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained", dpi=150)
    return figure, figure.add_subplot()


def _points(row: Mapping[str, Any], *names: str) -> list[float]:
    """Shares as percentage points, NaN where there is none."""
    return [np.nan if row[name] is None else 100 * row[name] for name in names]


def _point(axes: Any, row: float, value: float, low: float, high: float, role: str) -> None:
    look = {name: value for name, value in _LOOKS[role].items() if name != "linestyle"}
    error = np.array([[max(value - low, 0)], [max(high - value, 0)]])
    axes.errorbar(value, row, xerr=np.nan_to_num(error), capsize=2.5, lw=1.2, ms=5, **look)


def _handle(axes: Any, role: str) -> Any:
    [line] = axes.plot([], [], label=role, ms=5, lw=1.2, **_LOOKS[role])
    return line


def _curve(axes: Any, curve: Sequence[tuple[int, Mapping[str, Any]]], role: str) -> None:
    """One arm's line with its intervals, over the band of its random control."""
    if not curve:
        return
    shift = {"steered": -0.03, "reverse": 0.03}[role]
    places = np.array([place for place, _ in curve])
    names = ("delta", "ci_low", "ci_high", "control_low", "control_high")
    delta, low, high, control_low, control_high = np.array(
        [_points(row, *names) for _, row in curve]
    ).T
    if role == "steered":
        axes.fill_between(places, control_low, control_high, color="#dddddd", zorder=0)
        axes.plot(places, control_low, color="#888888", lw=0.6, ls=":", zorder=1)
        axes.plot(places, control_high, color="#888888", lw=0.6, ls=":", zorder=1)
    error = np.nan_to_num(np.clip([delta - low, high - delta], 0, None))
    axes.errorbar(places + shift, delta, yerr=error, capsize=2, lw=1.2, ms=4.5, **_LOOKS[role])
