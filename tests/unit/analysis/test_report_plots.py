"""Figures as files: they hold what is plotted, and can stand together in one page."""

import io
import re

import numpy as np
import pyarrow as pa
import pytest
from evaluations import EXPERTS, LAYERS, Made, make_ranking
from matplotlib.patches import Rectangle
from PIL import Image

from moescope.analysis import report_plots as plots
from moescope.analysis.report_numbers import load_by_layer


@pytest.fixture(scope="module")
def ranking():
    return make_ranking(Made(), np.random.default_rng(0))


def test_svgs_share_no_id_and_are_equal_each_time(ranking):
    one, two = (plots.to_svg(plots.rd_figure(ranking, False, ()), name) for name in ("one", "two"))
    ids = [re.findall(r'\bid="([^"]+)"', svg) for svg in (one, two)]
    assert ids[0]
    assert not set(ids[0]) & set(ids[1])
    for svg, mine in zip((one, two), ids, strict=True):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= set(mine)
        assert "http" not in svg
    assert plots.to_svg(plots.rd_figure(ranking, False, ()), "one") == one


def test_the_map_frames_the_mask_and_marks_signs(ranking):
    boxed = {(LAYERS[1], 5), (LAYERS[2], 0)}
    figure = plots.rd_figure(ranking, False, boxed)
    axes = figure.axes[0]
    frames = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert {(frame.get_x(), frame.get_y()) for frame in frames} == {(4.5, 0.5), (-0.5, 1.5)}
    rows = ranking.to_pylist()
    limit = max(abs(row["rd"]) for row in rows)
    signs = {
        (LAYERS[round(sign.get_position()[1])], round(sign.get_position()[0])): sign.get_text()
        for sign in axes.texts
    }
    assert signs == {
        (row["layer"], row["expert"]): "+" if row["rd"] > 0 else "\N{MINUS SIGN}"
        for row in rows
        if abs(row["rd"]) >= limit / 4
    }


def test_a_large_model_fits_the_page():
    rows = [
        {"layer": layer, "expert": expert, "rd": (-1) ** expert * (layer + 1) / 48}
        for layer in range(48)
        for expert in range(128)
    ]
    figure = plots.rd_figure(pa.Table.from_pylist(rows), False, {(40, 7)})
    with Image.open(io.BytesIO(plots.to_png(figure))) as image:
        assert image.width == round(150 * plots.WIDTH_INCHES)
        assert image.height < 1.6 * image.width


def row(role, experts, delta, control=0.0):
    effect = {
        "delta": delta, "ci_low": delta - 0.05, "ci_high": delta + 0.05,
        "control_delta": control, "control_low": control - 0.01, "control_high": control + 0.02,
    }  # fmt: skip
    utility = {**effect, **dict.fromkeys(("control_delta", "control_low", "control_high"))}
    return {"role": role, "experts": experts, "headline": experts == 4, "effect": effect,
            "utility": utility}  # fmt: skip


def test_the_dose_figure_draws_each_arm_over_its_doses():
    curves = {"deactivate": [row(r, n, s * n / 100) for r, s in (("steered", 1), ("reverse", -1))
                             for n in (8, 1, 4)]}  # fmt: skip
    figure = plots.dose_figure(curves, "refused", 2)
    top, bottom = figure.axes
    lines = {line.get_marker(): line for line in top.lines if len(line.get_xdata()) == 3}
    assert lines["o"].get_ydata().tolist() == pytest.approx([1, 4, 8])
    assert lines["s"].get_ydata().tolist() == pytest.approx([-1, -4, -8])
    assert [label.get_text() for label in bottom.get_xticklabels()] == ["1", "4", "8"]
    assert [-2, -2] in [list(line.get_ydata()) for line in bottom.lines]
    # Told apart without colour: other markers and other lines.
    assert lines["o"].get_linestyle() != lines["s"].get_linestyle()
    assert len(plots.to_png(figure)) > 10_000


def test_the_forest_has_a_row_a_metric():
    shares = {"axis": "safety", "kind": "forbidden", "metric": "refused"}
    rows = [
        {**shares, **row("steered", 4, 0.3)["effect"], "role": "steered"},
        {**shares, **row("reverse", 4, -0.2)["effect"], "role": "reverse"},
        {**shares, **row("steered", 4, 0.0)["utility"], "role": "steered", "metric": "over_refused",
         "kind": "benign"},
    ]  # fmt: skip
    axes = plots.forest_figure(rows).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "refusals (forbidden)",
        "over-refusal (benign)",
    ]
    points = [line.get_xdata()[0] for line in axes.lines if line.get_marker() in ("o", "s")
              and len(line.get_xdata())]  # fmt: skip
    assert points == pytest.approx([30, -20, 0])


def test_load_is_drawn_for_every_layer(ranking):
    load = load_by_layer(ranking)
    image = plots.load_figure(load).axes[0].images[0].get_array().data
    assert image.shape == (len(LAYERS), EXPERTS)
    assert image.sum(axis=1) == pytest.approx([EXPERTS] * len(LAYERS))
    assert (np.diff(image, axis=1) <= 0).all()
