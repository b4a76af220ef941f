"""The report of made-up evaluations: its numbers are the tables', its texts are escaped."""

import base64
import dataclasses
import json
import re

import lxml.html
import numpy as np
import pyarrow.compute as pc
import pytest
from evaluations import Made, make_evaluation
from PIL import Image

from moescope.analysis import risk_difference
from moescope.analysis.evaluation import Evaluation
from moescope.analysis.report import write_report
from moescope.tracer.errors import InputError

QUICK = {"n": 40, "doses": (2, 4)}
BAD = '<script>alert("1")</script>&amp;'


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """An evaluation of each axis with a clear effect, and its page."""
    folder = tmp_path_factory.mktemp("both")
    faithfulness = make_evaluation(folder / "f", Made(gain=0.4, **QUICK))
    safety = make_evaluation(folder / "s", Made(axis="safety", gain=0.45, seed=5, **QUICK))
    out = write_report(folder / "report.html", [safety, faithfulness])
    return out, faithfulness, safety


@pytest.fixture(scope="module")
def small(both):
    """The two evaluations with their rankings alone: quick to report."""
    return [
        Evaluation(
            each.settings,
            each.ranking,
            *(getattr(each, name).slice(0, 0) for name in ("answers", "outcomes", "effects")),
        )
        for each in both[1:]
    ]


def with_settings(evaluation, **settings):
    return dataclasses.replace(evaluation, settings={**evaluation.settings, **settings})


@pytest.fixture(scope="module")
def page(both):
    return read(both[0])


def read(path):
    return lxml.html.fromstring(path.read_text())


def text(element):
    for line_break in element.xpath(".//br"):
        line_break.tail = f" {line_break.tail or ''}"
    return " ".join(element.text_content().replace("\N{NO-BREAK SPACE}", " ").split())


def table_rows(section, kind):
    """Cells of the body of a section's first table of a class."""
    table = section.xpath(f'.//table[@class="{kind}"]')[0]
    return [[text(cell) for cell in row.xpath("th|td")] for row in table.xpath("tbody/tr")]


def section_of(page, name):
    return page.xpath(f'//section[@aria-labelledby="{name}"]')[0]


def number(cell):
    return float(cell.replace("\N{MINUS SIGN}", "-").removesuffix(" %"))


def main_effect(evaluation, arm, kind, metric):
    [row] = evaluation.effects.filter(
        (pc.field("arm") == arm) & (pc.field("kind") == kind) & (pc.field("metric") == metric)
    ).to_pylist()
    return row


def test_the_effects_are_those_of_the_table(both, page):
    _, faithfulness, _ = both
    first = table_rows(section_of(page, "faithfulness"), "effects")[0]
    steered, reverse = (
        main_effect(faithfulness, arm, "conflict", "follows_document")
        for arm in ("steered", "reverse")
    )
    assert first[:3] == ["document-following (conflict)", "40", f"{100 * steered['base']:.1f} %"]
    for start, row in ((3, steered), (6, reverse)):
        assert number(first[start]) == pytest.approx(100 * row["value"], abs=0.051)
        delta, low, _, high = first[start + 1].split()
        wanted = [100 * row[name] for name in ("delta", "ci_low", "ci_high")]
        assert [number(cell) for cell in (delta, low, high)] == pytest.approx(wanted, abs=0.051)
        assert first[start + 2].split()[-1] == row["verdict"]
    control, low, _, high = first[9].split()
    wanted = [100 * steered[f"control_{name}"] for name in ("delta", "low", "high")]
    assert [number(cell) for cell in (control, low, high)] == pytest.approx(wanted, abs=0.051)


def test_the_levels_are_of_the_headline_arms(both, page):
    drawing = section_of(page, "faithfulness").xpath('.//div[contains(@aria-label, "each arm")]')[0]
    said = drawing.get("aria-label").split(": ")[1].removesuffix(".").split(", ")
    base = main_effect(both[1], "steered", "conflict", "follows_document")["base"]
    levels = {"base": base} | {
        arm: main_effect(both[1], arm, "conflict", "follows_document")["value"]
        for arm in ("steered", "reverse", *(f"random-{seed}" for seed in range(5)))
    }
    assert said == [f"{arm} {100 * level:.1f}" for arm, level in levels.items()]


def test_the_experts_are_the_rankings(both, page):
    _, faithfulness, _ = both
    rows = table_rows(section_of(page, "faithfulness"), "experts")
    ranking = faithfulness.ranking.slice(0, len(rows)).to_pylist()
    masked = {
        (entry["layer"], entry["expert"])
        for arm in faithfulness.settings["arms"]
        if arm["arm"] == "steered"
        for entry in arm["mask"]["entries"]
    }
    assert len(rows) == 15
    for cells, row in zip(rows, ranking, strict=True):
        assert (int(cells[0]), int(cells[1])) == (row["layer"], row["expert"])
        assert number(cells[2]) == pytest.approx(row["rd"], abs=0.00051)
        low, _, high = cells[3].split()
        assert number(low) == pytest.approx(row["ci_low"], abs=0.00051)
        assert number(high) == pytest.approx(row["ci_high"], abs=0.00051)
        assert number(cells[4]) == pytest.approx(row["rate_positive"], abs=0.00051)
        assert ("steered" in cells[8]) == ((row["layer"], row["expert"]) in masked)


def test_a_ranking_without_intervals_has_no_such_columns(tmp_path):
    made = make_evaluation(tmp_path / "e", Made(interval_columns=False, **QUICK))
    page = read(write_report(tmp_path / "r.html", [made]))
    heads = [text(cell) for cell in page.xpath('//table[@class="experts"]//thead//th')]
    assert heads == ["layer", "expert", "RD", "rate, with_doc", "rate, without_doc", "mask"]


def test_the_dose_curve_has_every_dose(both, page):
    _, _, safety = both
    rows = table_rows(section_of(page, "safety"), "dose")
    assert len(rows) == 2 * 2 * 2  # strengths, arms, doses
    for strength, role, experts, effect, *_ in rows:
        headline = (strength, experts) == ("deactivate", "4")
        arm = role if headline else f"{role}/n{experts}/{strength}"
        row = main_effect(safety, arm, "forbidden", "refused")
        assert number(effect) == pytest.approx(100 * row["delta"], abs=0.051)


def test_the_choice_of_the_dose_is_shown(page):
    rows = table_rows(section_of(page, "safety"), "tuning")
    assert rows == [
        ["2", "deactivate", "55.0 %", "+5.0", "97.5 %", "\N{MINUS SIGN}0.5", ""],
        ["4", "deactivate", "60.0 %", "+10.0", "97.0 %", "\N{MINUS SIGN}1.0", "chosen"],
    ]


def test_side_effects_have_utility_harm_and_perplexity(both, page):
    _, _, safety = both
    rows = {row[0]: row for row in table_rows(section_of(page, "safety-utility"), "effects")}
    assert {"over-refusal (benign)", "utility", "exact match (copying)"} <= rows.keys()
    assert "refusals (forbidden)" not in rows
    loss = main_effect(safety, "steered", "held-out text", "nll")
    ratio = rows["perplexity, base = 1 (held-out text)"]
    assert number(ratio[3]) == pytest.approx(np.exp(loss["delta"]), abs=0.00051)


def test_axes_are_compared_by_their_experts(both, page):
    _, faithfulness, safety = both
    tops = [
        {(row["layer"], row["expert"]) for row in each.ranking.slice(0, 10).to_pylist()}
        for each in (faithfulness, safety)
    ]
    said = text(section_of(page, "axes"))
    assert f"{len(tops[0] & tops[1])} of the 10 strongest of faithfulness and of safety" in said
    for layer, expert in tops[0] & tops[1]:
        assert f"layer {layer}, expert {expert}" in said


def test_rankings_of_different_models_are_not_compared(small, tmp_path):
    other = with_settings(small[1], model="another")
    page = read(write_report(tmp_path / "r.html", [small[0], other]))
    assert "Not compared" in text(section_of(page, "axes"))
    assert not page.xpath('//div[contains(@aria-label, "Scatter")]')


def test_no_effect_is_said_plainly(tmp_path):
    made = make_evaluation(tmp_path / "e", Made(gain=0.0, **QUICK))
    assert main_effect(made, "steered", "conflict", "follows_document")["verdict"] == "no effect"
    page = read(write_report(tmp_path / "r.html", [made]))
    lines = [text(line) for line in page.xpath('//section[@class="verdicts"]//li')]
    assert len(lines) == 3
    for line in lines[:2]:
        assert ": no effect on document-following (conflict), " in line
    assert "only the faithfulness axis was evaluated" in lines[2]


def test_texts_are_escaped(tmp_path):
    made = make_evaluation(tmp_path / "e", Made(html=BAD, **QUICK))
    made.settings["model"] = BAD
    page = read(write_report(tmp_path / "r.html", [made]))
    assert not page.xpath("//script")
    prompts = [prompt.text_content() for prompt in page.xpath('//div[@class="text prompt"]')]
    assert prompts
    assert all(prompt.endswith(BAD) for prompt in prompts)
    assert BAD in page.xpath("string(//h1/following::b[1])")


def test_answers_are_drawn_from_both_heaps_and_equal_each_time(both, tmp_path):
    out, faithfulness, safety = both
    section = section_of(read(out), "faithfulness-answers")
    heads = [text(head) for head in section.xpath(".//h3")]
    base, steered = (
        {
            row["example_id"]: row["answer"]
            for row in faithfulness.answers.to_pylist()
            if row["arm"] == arm
        }
        for arm in ("base", "steered")
    )
    changed = sum(base[example] != steered[example] for example in base)
    assert heads == [
        f"Changed by the steered mask: 4 of {changed}",
        f"Unchanged by the steered mask: 3 of {len(base) - changed}",
    ]
    for article, differs in zip(section.xpath(".//article"), [True] * 4 + [False] * 3, strict=True):
        example = article.xpath("string(h4/text())").strip()
        answers = [text(answer) for answer in article.xpath(".//dd")]
        assert answers[:2] == [base[example], steered[example]]
        assert (answers[0] != answers[1]) == differs
    again = write_report(tmp_path / out.name, [safety, faithfulness])
    assert again.read_bytes() == out.read_bytes()


def test_safety_texts_are_shown_only_on_request(both, tmp_path):
    out, _, safety = both
    hidden = section_of(read(out), "safety-answers")
    assert "sealed box" not in out.read_text()
    counts = table_rows(hidden, "labels")
    assert [row[:2] for row in counts] == [["forbidden", "complied"], ["forbidden", "refused"]]
    assert sum(int(row[2]) for row in counts) == 40
    shown = write_report(tmp_path / "r.html", [safety], show_safety_text=True)
    assert "Please open the sealed box" in shown.read_text()


def test_nothing_is_fetched(both):
    out = both[0]
    page = out.read_text()
    assert not re.search(r"(?:src|href|action|data)\s*=\s*[\"']?\s*(?:https?:|//|file:)", page)
    assert not re.search(r"@import|url\((?!#)", page)
    assert not re.search(r"<(?:script|link|iframe|object|embed)\b", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:href="#|url\(#)([^")]+)', page):
        assert target in ids


def test_settings_to_do_it_again(small, tmp_path):
    made = with_settings(
        small[0],
        engine={"options": ["--dtype", "float32"]},
        tuning={"files": [{"path": "t.jsonl"}], "counts": {"safety/forbidden": 3, "utility/x": 4}},
    )
    page = read(write_report(tmp_path / "r.html", [made]))
    rows = dict(table_rows(section_of(page, "reproduce"), "settings"))
    assert rows["items.sha256"] == "ab" * 32
    assert rows["engine.options"] == "--dtype float32"
    assert rows["tuning.files.1.path"] == "t.jsonl"
    assert rows["tuning.counts"] == "safety/forbidden 3, utility/x 4"
    assert not any(name.startswith(("arms", "headline.tuning")) for name in rows)
    hashes = table_rows(section_of(page, "reproduce"), "arms")
    assert [row[0] for row in hashes] == [arm["arm"] for arm in made.settings["arms"]]
    assert {row[5] for row in hashes[1:]} == {"ef" * 32}
    ranking = page.xpath('//table[@class="settings"]')[1]
    assert "200 entries" in text(ranking)  # the examples


def test_masks_can_be_saved(both, page):
    [link] = page.xpath('//a[@download="faithfulness-steered.json"]')
    kind, _, encoded = link.get("href").partition(",")
    assert kind == "data:application/json;base64"
    [arm] = [arm for arm in both[1].settings["arms"] if arm["arm"] == "steered"]
    assert json.loads(base64.b64decode(encoded)) == arm["mask"]


def test_figures_are_described_and_are_beside_the_page(both, page):
    out = both[0]
    drawings = page.xpath('//div[@role="img"]')
    assert all(len(drawing.get("aria-label")) > 40 for drawing in drawings)
    files = sorted(path.name for path in (out.parent / "report_files").iterdir())
    assert len(files) == len(drawings) == 9
    for name in files:
        with Image.open(out.parent / "report_files" / name) as image:
            assert min(image.size) > 200
            grey = np.asarray(image.convert("L"))
        assert 0.005 < (grey < 200).mean() < 0.9, name


def test_tables_have_heads_and_captions(page):
    for table in page.xpath("//table"):
        assert table.xpath("caption"), text(table)[:80]
        assert table.xpath("thead//th[@scope]"), text(table)[:80]


@pytest.mark.parametrize(
    ("planted", "said"), [(True, "is a planted specimen"), (False, "the negative control")]
)
def test_a_specimen_is_named_so(small, tmp_path, planted, said):
    made = with_settings(small[0], specimen={"recipe": {"planted": planted}})
    page = read(write_report(tmp_path / "r.html", [made]))
    assert said in text(section_of(page, "reproduce"))


def test_no_other_model_is_called_a_specimen(page):
    said = text(section_of(page, "reproduce")).replace("made/specimen", "")
    assert "specimen" not in said


def test_a_store_alone(maker, tmp_path):
    store = maker.write(tmp_path / "s", maker.random_requests(3, 24))
    ranking = risk_difference(store, positive="a", negative="b")
    page = read(write_report(tmp_path / "r.html", ranking=ranking))
    section = section_of(page, "store")
    assert "Verdict" not in page.text_content()
    top = table_rows(section, "experts")[0]
    assert number(top[2]) == pytest.approx(ranking["rd"][0].as_py(), abs=0.00051)
    load = table_rows(section, "load")
    for layer, _, busiest, _ in load:
        mine = ranking.filter(pc.field("layer") == int(layer))
        chosen = pc.add(mine["a1"], mine["a2"])
        share = pc.max(chosen).as_py() / pc.sum(chosen).as_py()
        assert busiest.endswith(f"({share * 8:.2f})")
    assert len(load) == 3


def test_an_older_report_is_replaced_whole(small, tmp_path):
    out = tmp_path / "r.html"
    write_report(out, small)
    assert "Safety" in out.read_text()
    write_report(out, small[:1])
    assert "Safety" not in out.read_text()
    assert [path.name for path in (tmp_path / "r_files").iterdir()] == ["faithfulness-rd.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r_files"]


def test_a_failure_leaves_the_old_report(small, tmp_path):
    out = tmp_path / "r.html"
    write_report(out, small[:1])
    before = out.read_bytes()
    with pytest.raises(UnicodeEncodeError):
        write_report(out, [with_settings(small[1], model="\ud800")])  # not to be had in UTF-8
    assert out.read_bytes() == before
    assert [path.name for path in (tmp_path / "r_files").iterdir()] == ["faithfulness-rd.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r_files"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("r.pdf", "end its name with .html"), ("no/r.html", "doesn't exist"), ("d.html", "a folder")],
)
def test_a_bad_target(both, tmp_path, name, reason):
    (tmp_path / "d.html").mkdir()
    with pytest.raises(InputError, match=reason):
        write_report(tmp_path / name, [both[1]])


def test_foreign_files_are_left_alone(both, tmp_path):
    (tmp_path / "r_files").mkdir()
    (tmp_path / "r_files" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="something else is there"):
        write_report(tmp_path / "r.html", [both[1]])
    assert (tmp_path / "r_files" / "mine.txt").read_text() == "mine"
    assert not (tmp_path / "r.html").exists()


def test_an_evaluation_that_measured_little(small, tmp_path):
    """No outcome of the axis, no answers, no masks, no settings: the page says so, and stands."""
    bare = dataclasses.replace(
        small[0],
        settings={"axis": "faithfulness", "arms": [{"arm": "base", "role": "base"}]},
        ranking=small[0].ranking.replace_schema_metadata(None),
    )
    page = read(write_report(tmp_path / "r.html", [bare]))
    assert "nothing was measured" in text(page)
    assert "Utility was not measured" in text(page)


def test_nothing_to_report(tmp_path):
    with pytest.raises(InputError, match="name an evaluation or a store"):
        write_report(tmp_path / "r.html")
