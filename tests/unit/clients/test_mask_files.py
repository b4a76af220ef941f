"""Masks from rankings, random controls and differences."""

from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rankings import random_ranking

from moescope.analysis.export import write_ranking
from moescope.clients.mask_files import diff, mask_from_rd, random_mask
from moescope.clients.ranking import ranking_shape, read_ranking
from moescope.tracer.errors import InputError
from moescope.tracer.format import MoeShape
from moescope.tracer.mask import Mask, RouterSpec, check_mask, make_mask, parse_mask
from moescope.tracer.mask_format import Action

SOFTMAX = RouterSpec("softmax", renormalize=False)


def make_ranking(seed, layers=(1, 2, 5), experts=8, top_k=2):
    facts = {"positive": "with_doc", "examples": ["q1", "q2"]}
    return random_ranking(facts, layers, experts, top_k, seed=seed)


def table_of(rds, top_k=2):
    """A ranking with these RDs, {layer: [rd of expert 0, 1, ...]}; counts only add up."""
    experts = len(next(iter(rds.values())))
    each = 100 * top_k // experts
    counts = {"a1": each, "d1": 100 - each, "a2": each, "d2": 100 - each}
    rows = [
        {"layer": layer, "expert": e, "rd": rd} | counts
        for layer, values in rds.items()
        for e, rd in enumerate(values)
    ]
    return pa.Table.from_pylist(rows)


def places(mask, action):
    return [(e.layer, e.expert) for e in mask.entries if e.action == action]


RANKING = table_of({3: [0.5, -0.4, 0.3, -0.2], 4: [0.1, -0.1, 0.0, 0.45]})


def test_positive_experts_are_activated_and_negative_ones_deactivated():
    mask = mask_from_rd(RANKING, name="m", deactivate=2, activate=3)
    assert places(mask, "activate") == [(3, 0), (3, 2), (4, 3)]
    assert places(mask, "deactivate") == [(3, 1), (3, 3)]
    assert mask.note is None
    assert mask.signature is not None
    assert mask.signature.model_dump() == {"moe_layers": (3, 4), "num_experts": 4, "top_k": 2}


def test_reverse_swaps_them():
    mask = mask_from_rd(RANKING, name="m", deactivate=2, activate=1, reverse=True)
    assert places(mask, "activate") == [(3, 1)]
    assert places(mask, "deactivate") == [(3, 0), (4, 3)]


def test_scale_instead_of_deactivate():
    mask = mask_from_rd(RANKING, name="m", deactivate=2, activate=1, scale=0.25)
    assert places(mask, "deactivate") == []
    assert [(e.layer, e.expert, e.value) for e in mask.entries if e.action == "scale"] == [
        (3, 1, 0.25),
        (3, 3, 0.25),
    ]
    with pytest.raises(InputError, match=r"layer 3, expert 1: a scale of -1\.0 is negative"):
        mask_from_rd(RANKING, name="m", deactivate=1, scale=-1)
    with pytest.raises(InputError, match="the mode steermoe knows only"):
        mask_from_rd(RANKING, name="m", deactivate=1, scale=0.5, mode="steermoe")


def test_layers_and_least_rd():
    mask = mask_from_rd(RANKING, name="m", deactivate=1, activate=1, layers="4-9")
    assert (places(mask, "activate"), places(mask, "deactivate")) == ([(4, 3)], [(4, 1)])
    mask = mask_from_rd(RANKING, name="m", deactivate=9, activate=9, min_abs_rd=0.4, layers=" 3, 4")
    assert [(e.layer, e.expert) for e in mask.entries] == [(3, 0), (3, 1), (4, 3)]
    assert mask.note == (
        "activate: 2 instead of 9, for want of candidates with positive RD; "
        "deactivate: 1 instead of 9, for want of candidates with negative RD"
    )
    for text, message in [
        ("1-2", "no layer 1-2; its layers are 3-4"),
        ("3,x", "write numbers and ranges"),
        ("3-", "write numbers"),
        ("", "write numbers"),
    ]:
        with pytest.raises(InputError, match=message):
            mask_from_rd(RANKING, name="m", activate=1, layers=text)


def test_a_full_layer_is_passed_over():
    ranking = table_of({3: [0.9, 0.8, 0.7, 0.6], 4: [0.5, 0.1, -0.1, -0.2]})
    mask = mask_from_rd(ranking, name="m", activate=3)
    assert places(mask, "activate") == [(3, 0), (3, 1), (4, 0)]
    assert mask.note == "activate: 2 passed over in layer 3 (2 there already)"
    # As SteerMoE does: three were asked for, the third finds no room, and that is that.
    mask = mask_from_rd(ranking, name="m", activate=3, select="steermoe")
    assert places(mask, "activate") == [(3, 0), (3, 1)]
    assert mask.note == "activate: 1 passed over in layer 3 (2 there already)"
    mask = mask_from_rd(ranking, name="m", deactivate=3, reverse=True)
    assert places(mask, "deactivate") == [(3, 0), (3, 1), (4, 0)]
    assert mask.note is not None
    assert "(2 there already, the rest are needed)" in mask.note
    assert mask_from_rd(ranking, name="m", deactivate=3, reverse=True, scale=0).note is None


def test_ties_go_by_layer_and_expert():
    ranking = table_of({3: [0.1, -0.1, 0.1, -0.1], 4: [0.1, -0.1, 0.1, -0.1]})
    mask = mask_from_rd(ranking, name="m", deactivate=3, activate=3)
    assert places(mask, "activate") == [(3, 0), (3, 2), (4, 0)]
    assert places(mask, "deactivate") == [(3, 1), (3, 3), (4, 1)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    counts=st.tuples(st.integers(0, 30), st.integers(0, 30)).filter(any),
    reverse=st.booleans(),
    select=st.sampled_from(["rd", "steermoe"]),
    mode=st.sampled_from(["hard", "steermoe"]),
)
def test_every_mask_that_is_made_is_sound(seed, counts, reverse, select, mode):
    off, on = counts
    ranking = make_ranking(seed)
    mask = mask_from_rd(
        ranking, name="m", deactivate=off, activate=on, reverse=reverse, select=select, mode=mode
    )
    check_mask(mask, MoeShape((1, 2, 5), 8, 2), SOFTMAX)
    sign = -1 if reverse else 1
    rds = {(r["layer"], r["expert"]): sign * r["rd"] for r in ranking.to_pylist()}
    for action, way, count in (("activate", 1, on), ("deactivate", -1, off)):
        chosen = places(mask, action)
        assert len(chosen) <= count
        assert all(way * rds[place] > 0 for place in chosen)
        for layer in (1, 2, 5):  # within a layer, the best ones
            there = [way * rds[place] for place in chosen if place[0] == layer]
            left = [way * rds[place] for place in rds if place[0] == layer and place not in chosen]
            assert not there or not left or min(there) >= max(left)


def test_the_source_says_where_it_comes_from(tmp_path):
    ranking = make_ranking(0)
    path = tmp_path / "ranking.parquet"
    write_ranking(ranking, path)
    mask = mask_from_rd(path, name="m", activate=1, layers="1-5")
    assert mask.source == {
        "ranking": str(path),
        "rd": {"positive": "with_doc"},
        "selection": {
            "select": "rd", "deactivate": 0, "activate": 1, "layers": "1-5", "min_abs_rd": None,
            "reverse": False,
        },
    }  # fmt: skip
    for suffix in ("csv", "json"):
        write_ranking(ranking, tmp_path / f"ranking.{suffix}")
        other = mask_from_rd(tmp_path / f"ranking.{suffix}", name="m", activate=1, layers="1-5")
        assert other.entries == mask.entries
        assert other.source is not None
        assert other.source["rd"] is None


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (16, 1), (6, 6)])
def test_the_shape_is_in_the_counts(experts, top_k):
    ranking = make_ranking(1, (2, 3), experts, top_k)
    assert ranking_shape(ranking) == MoeShape((2, 3), experts, top_k)


def test_a_ranking_that_is_none(tmp_path):
    with pytest.raises(InputError, match=r"end it with \.csv"):
        read_ranking(tmp_path / "ranking.txt")
    for name, text in [("r.parquet", "x"), ("r.csv", ""), ("r.json", "{"), ("s.json", "[1]")]:
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=f"can't read the ranking .*{name}"):
            read_ranking(tmp_path / name)
    with pytest.raises(InputError, match=r"there is no ranking .*none\.parquet"):
        read_ranking(tmp_path / "none.parquet")
    pq.write_table(pa.table({"layer": [1], "rd": [0.5]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="no column expert, a1, d1, a2, d2"):
        mask_from_rd(tmp_path / "t.parquet", name="m", activate=1)
    for broken in (RANKING.slice(1), RANKING.slice(0, 0), pa.concat_tables([RANKING] * 2)):
        with pytest.raises(InputError, match="not one row for each expert"):
            mask_from_rd(broken, name="m", activate=1)


def test_nothing_asked_for_and_nothing_found():
    with pytest.raises(InputError, match="say how many"):
        mask_from_rd(RANKING, name="m")
    with pytest.raises(InputError, match="unknown selection rule 'best'"):
        mask_from_rd(RANKING, name="m", activate=1, select="best")
    with pytest.raises(InputError, match=r"no expert is selected: activate: 0 instead of 3"):
        mask_from_rd(RANKING, name="m", activate=3, min_abs_rd=0.9)
    with pytest.raises(InputError, match="can't be a mask's name"):
        mask_from_rd(RANKING, name="none", activate=1)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), off=st.integers(1, 24), on=st.integers(0, 6))
def test_a_random_mask_has_the_same_numbers_of_other_experts(seed, off, on):
    like = mask_from_rd(make_ranking(seed), name="m", deactivate=off, activate=on)
    made = random_mask(like, seed, name="r")
    assert made == random_mask(like, seed, name="r")
    check_mask(made, MoeShape((1, 2, 5), 8, 2), SOFTMAX)
    assert made.source == {"random_like": "m", "seed": seed}
    for layer in (1, 2, 5):
        ours, theirs = ([e for e in m.entries if e.layer == layer] for m in (made, like))
        assert sorted(e.action for e in ours) == sorted(e.action for e in theirs)
        named, drawn = {e.expert for e in theirs}, {e.expert for e in ours}
        assert len(named & drawn) == max(0, len(named) - (8 - len(named)))


def test_a_random_mask_keeps_settings_and_combined_actions():
    entries = [
        {"layer": 3, "expert": 1, "action": "scale", "value": 0.5},
        {"layer": 3, "expert": 1, "action": "activate"},
        {"layer": 3, "expert": 2, "action": "bias", "value": -1},
    ]
    signature = {"moe_layers": [3, 4], "num_experts": 64, "top_k": 6}
    like = make_mask(
        name="m", entries=entries, renormalise=True, note="n", source={}, signature=signature
    )
    made = random_mask(like, 7, name="r")
    groups = [sorted(map(str, group)) for group in made.by_expert().values()]
    assert sorted(groups) == [["activate", "scale 0.5"], ["bias -1.0"]]
    assert (made.renormalise, made.note, made.signature) == (True, None, like.signature)
    draws = {tuple(random_mask(like, seed, name="r").by_expert()) for seed in range(50)}
    assert len(draws) > 45
    assert not {(3, 1), (3, 2)} & {place for draw in draws for place in draw}
    with pytest.raises(InputError, match='mask m has no "signature"'):
        random_mask(like.model_copy(update={"signature": None}), 0, name="r")


def test_the_draw_of_a_layer_is_its_own():
    one = mask_from_rd(RANKING, name="m", deactivate=1, layers="3")
    two = mask_from_rd(RANKING, name="m", deactivate=1, activate=1)
    assert {e.layer for e in two.entries} == {3}
    both = make_mask(**two.model_dump(exclude={"entries"}), entries=[
        *one.entries, {"layer": 4, "expert": 0, "action": "deactivate"},
    ])  # fmt: skip
    alone, among = (random_mask(mask, 3, name="r").entries for mask in (one, both))
    assert alone == tuple(entry for entry in among if entry.layer == 3)


def test_diff():
    one = mask_from_rd(RANKING, name="a", deactivate=2, activate=1)
    assert diff(one, one.model_copy(update={"name": "b", "note": "x"})).experts == {}
    other = mask_from_rd(RANKING, name="b", deactivate=1, activate=1, scale=0.5)
    found = diff(one, other)
    assert found.settings == {}
    assert found.experts == {(3, 1): ("deactivate", "scale 0.5"), (3, 3): ("deactivate", "-")}
    paper = mask_from_rd(RANKING, name="c", deactivate=2, activate=1, mode="steermoe")
    assert diff(one, paper).settings == {"mode": ("hard", "steermoe"), "epsilon": (None, 0.01)}


def test_the_documentations_example_is_a_mask():
    text = (Path(__file__).parents[3] / "docs" / "masks.md").read_text()
    mask = parse_mask(text.split("```json")[1].split("```")[0])
    check_mask(mask, MoeShape((1, 2, 3), 16, 4), SOFTMAX)
    missing = [name for name in (*Mask.model_fields, *get_args(Action)) if f"`{name}`" not in text]
    assert missing == []
