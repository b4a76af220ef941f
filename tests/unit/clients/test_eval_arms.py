"""Doses, arms and the choice of the headline dose."""

from collections import Counter

import pytest
from eval_cases import make_ranking

from moescope.clients.eval_arms import (
    Dose,
    Tuned,
    choose,
    parse_dose,
    parse_doses,
    plan,
    steering_arms,
)
from moescope.clients.ranking import read_ranking
from moescope.tracer.errors import InputError


@pytest.fixture(scope="module")
def ranking(tmp_path_factory):
    return read_ranking(make_ranking(tmp_path_factory.mktemp("ranking") / "r.parquet"))


def test_doses_are_all_pairs_without_repeats():
    assert [*map(str, parse_doses("1, 4,4", "deactivate,scale-0.50"))] == [
        "n1/deactivate",
        "n4/deactivate",
        "n1/scale-0.5",
        "n4/scale-0.5",
    ]
    assert parse_dose("n12/activate") == Dose(12, "activate")


@pytest.mark.parametrize(
    ("experts", "strengths", "words"),
    [
        ("0", "deactivate", "--experts 0: '0' is no number of experts"),
        ("1,x", "deactivate", "'x' is no number"),
        ("", "deactivate", "--experts"),
        ("1", "off", "--strengths off: 'off' is no strength"),
        ("1", "scale-1", "'scale-1' is no strength"),
        ("1", "scale--1", "is no strength"),
    ],
)
def test_bad_doses_are_refused(experts, strengths, words):
    with pytest.raises(InputError, match=words):
        parse_doses(experts, strengths)


@pytest.mark.parametrize("text", ["4/deactivate", "n0/deactivate", "n4", "n4/off"])
def test_bad_headlines_are_refused(text):
    with pytest.raises(InputError, match="--headline"):
        parse_dose(text)


def test_arms_of_a_plan(ranking):
    doses = parse_doses("2,5", "deactivate,scale-0.25,activate")
    arms = plan(steering_arms(ranking, doses), doses[4], 4, 2)
    ids = [arm.id(doses[4]) for arm in arms]
    assert ids[:7] == ["base", "steered", "reverse", *(f"random-{n}" for n in range(4))]
    assert ids[7:11] == [
        f"{role}/n2/deactivate" for role in ("steered", "reverse", "random-0", "random-1")
    ]
    assert len({*ids}) == len(ids) == 7 + 5 * 4
    assert len({arm.key for arm in arms}) == len({arm.sha256 for arm in arms}) == len(ids)
    about = arms[1].about(doses[4])
    assert (about["experts"], about["strength"], about["direction"]) == (2, "activate", "positive")
    assert "rd" not in about["mask"]["source"]


def test_steered_and_reverse_act_on_the_two_ends(ranking):
    rds = {(r["layer"], r["expert"]): r["rd"] for r in ranking.to_pylist()}
    for strength, action, sign in (
        ("deactivate", "deactivate", -1),
        ("scale-0.5", "scale", -1),
        ("activate", "activate", 1),
    ):
        dose = Dose(3, strength)
        steered, reverse = steering_arms(ranking, [dose])[dose]
        for arm, direction in ((steered, sign), (reverse, -sign)):
            assert {entry.action for entry in arm.mask.entries} == {action}
            assert len(arm.mask.entries) == 3
            assert all(rds[e.layer, e.expert] * direction > 0 for e in arm.mask.entries)


def test_the_papers_rule_is_in_every_mask_and_knows_no_scale(ranking):
    dose = Dose(3, "deactivate")
    steering = steering_arms(ranking, [dose], "steermoe")
    assert {arm.mask.mode for arm in plan(steering, dose, 2, 0) if arm.mask} == {"steermoe"}
    with pytest.raises(InputError, match=r"--mode steermoe with the dose n3/scale-0.5"):
        steering_arms(ranking, [dose, Dose(3, "scale-0.5")], "steermoe")


def test_random_arms_have_as_many_experts_a_layer_and_none_of_the_same(ranking):
    dose = Dose(6, "scale-0.5")
    steering = steering_arms(ranking, [dose])
    _, steered, _, *random = plan(steering, dose, 5, 0)
    named = {(entry.layer, entry.expert) for entry in steered.mask.entries}
    drawn = [{(e.layer, e.expert) for e in arm.mask.entries} for arm in random]
    assert len(random) == len({frozenset(each) for each in drawn}) == 5
    for each in drawn:
        assert Counter(layer for layer, _ in each) == Counter(layer for layer, _ in named)
        assert not each & named


def test_a_dose_beyond_the_ranking_is_refused(ranking):
    with pytest.raises(InputError, match=r"n40/activate, steered: the ranking gives only 12"):
        steering_arms(ranking, [Dose(40, "activate")])


def tuned(experts, gain, loss, strength="deactivate"):
    return Tuned(Dose(experts, strength), 0.5 + gain, gain, 1 - loss, loss)


def test_the_largest_gain_at_a_small_loss_is_chosen():
    table = [tuned(1, 0.1, 0.0), tuned(4, 0.3, 0.02), tuned(8, 0.9, 0.021)]
    assert choose(table) == (
        Dose(4, "deactivate"),
        "largest gain on the tuning items at a loss of utility of at most 2 points",
    )


def test_of_equal_gains_the_gentlest_is_chosen():
    table = [tuned(4, 0.3, 0.0), tuned(2, 0.3, 0.0), tuned(2, 0.3, 0.01, "scale-0.5")]
    assert choose(table)[0] == Dose(2, "scale-0.5")


def test_where_all_lose_too_much_the_least_loss_is_chosen_and_said():
    dose, rule = choose([tuned(1, 0.1, 0.05), tuned(4, 0.3, 0.04)])
    assert dose == Dose(4, "deactivate")
    assert "every dose loses over 2 points" in rule
