"""The report: one page for people, made from evaluations and from a store's ranking.

Evaluations ─▶ report_numbers ─▶ report_verdict (sentences), report_tables, report_plots (figures)
            ─▶ report.html.jinja ─▶ report.html, and its figures as PNG files in report_files/
"""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa

from moescope.analysis import report_facts as facts
from moescope.analysis import report_plots as plots
from moescope.analysis import report_tables as tables
from moescope.analysis.evaluation import Evaluation
from moescope.analysis.rd import read_settings
from moescope.analysis.report_axes import comparable, correlation_text, overlap_text
from moescope.analysis.report_files import Page, check_target, write_page
from moescope.analysis.report_numbers import (
    EVAL,
    MAIN,
    OTHERS,
    SIDE,
    Side,
    arm_levels,
    correlation_number,
    doses,
    load_by_layer,
    metric_words,
    scale_of,
)
from moescope.analysis.report_verdict import (
    name_sides,
    stability_text,
    verdict,
)
from moescope.tracer.errors import InputError


def write_report(
    out: str | Path,
    evaluations: Sequence[Evaluation] = (),
    *,
    names: Sequence[str] | None = None,
    ranking: pa.Table | None = None,
    show_safety_text: bool = False,
) -> Path:
    """Write the page to `out` and its figures beside it, whole or not at all; returns `out`.

    `names` tell several evaluations of one axis apart. `ranking` is a table of `risk_difference`,
    for a section of its own. Prompts and answers of a safety axis are shown only if
    `show_safety_text`, or if the evaluation says that its items are benign stand-ins.
    """
    out = Path(out)
    check_target(out)
    if not evaluations and ranking is None:
        raise InputError("nothing to report: name an evaluation or a store.")
    page = Page(out.stem)
    sides = name_sides(evaluations, names)
    pair = comparable(sides)
    context = {
        "title": _title(sides, ranking),
        "verdict": verdict(sides) if sides else [],
        "sides": [_side_section(page, side, show_safety_text) for side in sides],
        "several": len({side.axis for side in sides}) > 1,
        "pair": None
        if pair is None
        else {
            "text": f"{overlap_text(pair)}; {correlation_text(pair)}",
            "rho_magnitude": correlation_number(pair.rho_magnitude),
            "p_chance": f"{pair.p_chance:.3f}",
            "shared": [f"layer {layer}, expert {expert}" for layer, expert in pair.shared],
            "top": pair.top,
            "figure": page.figure(
                "axes",
                plots.scatter_figure(pair),
                f"Scatter of {len(pair.experts)} experts: RD on {pair.titles[0]} across, "
                f"RD on {pair.titles[1]} upwards. {correlation_text(pair)}.",
            ),
        },
        "store": None if ranking is None else _store_section(page, ranking),
        "version": version("moescope"),
        "files": page.folder,
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["tight"] = _tight
    text = environment.get_template("report.html.jinja").render(context)
    write_page(out, text, page)
    return out


def _tight(text: str) -> str:
    """Numbers and their units on one line."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%").replace(
        "n = ", "n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}"
    )


def _title(sides: Sequence[Side], ranking: pa.Table | None) -> str:
    axes = list(dict.fromkeys(side.axis for side in sides))
    if axes:
        return f"Steering experts: {' and '.join(axes)}"
    assert ranking is not None
    settings = read_settings(ranking)
    return f"Expert routing: {settings['positive']} against {settings['negative']}"


def _side_section(page: Page, side: Side, show_safety_text: bool) -> dict[str, Any]:
    """All that the page says of one evaluation."""
    slug = "".join(char if char.isalnum() else "-" for char in side.name)
    rd_settings = side.rd_settings()
    masks = {arm: experts for arm in tables.ARMS if (experts := side.mask_experts(arm))}
    main = side.main_metric
    section: dict[str, Any] = {
        "id": slug,
        "title": side.title,
        "axis": side.axis,
        "model": facts.model_text(side.settings.get("model")),
        "positive": rd_settings.get("positive", "the positive condition"),
        "negative": rd_settings.get("negative", "the negative condition"),
        "rd_facts": facts.rd_facts(rd_settings),
        "compared": facts.compared(side),
        "stability": stability_text(rd_settings),
        "heat": page.figure(
            f"{slug}-rd",
            plots.rd_figure(
                side.evaluation.ranking,
                bool(rd_settings.get("gate_mass")),
                masks.get("steered", set()),
            ),
            _heat_alt(side.evaluation.ranking, side.name),
        ),
        "boxed": len(masks.get("steered", set())),
        "experts": tables.top_experts(side.evaluation.ranking, masks),
        "effects": tables.effect_table(side, MAIN),
        "others": tables.effect_table(side, OTHERS),
        "side_effects": tables.effect_table(side, SIDE),
        "all_effects": tables.all_effects(side),
        "tuning": facts.tuning_table(side.settings),
        "kl_top": side.settings.get("kl_top"),
        "arms": facts.arms_table(side),
        "masks": facts.masks(side),
        "settings": facts.settings_lines(side.settings),
        "ranking_settings": facts.settings_lines(rd_settings),
        "specimen": facts.specimen(side.settings),
        "main": None,
        "arms_plot": None,
        "forest": None,
        "dose": None,
    }
    if main is not None:
        section.update(_effect_figures(page, side, slug, *main))
    show = side.axis != "safety" or show_safety_text or facts.is_benign(side.settings)
    section["labels"] = tables.label_counts(side)
    section["examples"] = tables.example_answers(side, main[0] if main else "") if show else None
    return section


def _effect_figures(page: Page, side: Side, slug: str, kind: str, metric: str) -> dict[str, Any]:
    words = metric_words(metric, kind)
    found: dict[str, Any] = {"main": words, "arms_plot": None, "forest": None, "dose": None}
    levels = arm_levels(side, kind, metric)
    if levels:
        factor, unit = scale_of(metric)
        values = ", ".join(f"{row['arm']} {factor * row['value']:.1f}" for row in levels)
        found["arms_plot"] = page.figure(
            f"{slug}-arms",
            plots.arms_figure(levels, metric),
            f"{words} of each arm with 95 % intervals, in {unit}: {values}.",
        )
    forest = tables.forest_rows(side)
    if forest:
        found["forest"] = page.figure(
            f"{slug}-effects",
            plots.forest_figure(forest),
            f"Forest plot of {len(forest)} changes against base with 95 % intervals, steered and "
            "reverse, each beside its random control. The table below has the numbers.",
        )
    split, curves = doses(side, kind, metric)
    if curves:
        rule = (side.settings.get("headline") or {}).get("max_utility_loss", 0.02)
        found["dose"] = {
            "split": "held-out evaluation" if split == EVAL else "tuning",
            "figure": page.figure(
                f"{slug}-dose",
                plots.dose_figure(curves, metric, 100 * rule),
                f"Change of {words} and of utility over the number of experts in the mask, for "
                f"the strengths {', '.join(curves)}; steered, reverse and random experts. The "
                "table below has the numbers.",
            ),
            "rows": tables.dose_table(curves, metric),
            "allowed": f"{100 * rule:g}",
        }
    return found


def _store_section(page: Page, ranking: pa.Table) -> dict[str, Any]:
    settings = read_settings(ranking)
    load = load_by_layer(ranking)
    return {
        "positive": settings["positive"],
        "negative": settings["negative"],
        "rd_facts": facts.rd_facts(settings),
        "heat": page.figure(
            "store-rd",
            plots.rd_figure(ranking, bool(settings["gate_mass"]), ()),
            _heat_alt(ranking, "the store"),
        ),
        "experts": tables.top_experts(ranking, {}, 20),
        "load_plot": page.figure(
            "store-load",
            plots.load_figure(load),
            "Heat map of load: a row a layer, its experts from busiest to idlest.",
        ),
        "load": tables.load_table(load),
        "stability": stability_text(settings),
        "settings": facts.settings_lines(settings),
    }


def _heat_alt(ranking: pa.Table, name: str) -> str:
    strongest = tables.top_experts(ranking, {}, 3)["rows"]
    named = "; ".join(
        f"layer {row['layer']}, expert {row['expert']}: {row['rd']}" for row in strongest
    )
    return (
        f"Heat map of risk differences of {name}, layers down, experts across. Strongest: {named}."
    )
