"""Two sides compared: distances against scipy, pairs by hand, chance by simulation."""

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from moescope.analysis.questions import Selection, expert_load
from moescope.analysis.shift import compare
from moescope.tracer.errors import InputError

A, B = Selection(condition="a"), Selection(condition="b")


def by_layer(table, layer):
    return next(row for row in table.to_pylist() if row["layer"] == layer)


def test_distances(maker, tmp_path):
    store = maker.write(tmp_path / "s", maker.random_requests(2, 40))
    found = compare(store, A, B)
    sides = [expert_load(store, side).to_pylist() for side in (A, B)]
    for layer in maker.shape.layers:
        one, two = (np.array([r["share"] for r in side if r["layer"] == layer]) for side in sides)
        mass = [np.array([r["gate_mass"] for r in side if r["layer"] == layer]) for side in sides]
        row = by_layer(found.layers, layer)
        assert row["total_variation"] == pytest.approx(np.abs(one - two).sum() / 2)
        assert row["jensen_shannon"] == pytest.approx(jensenshannon(one, two, base=2))
        moved = np.abs(mass[0] / mass[0].sum() - mass[1] / mass[1].sum()).sum() / 2
        assert row["mass_moved"] == pytest.approx(moved)
        shift = two - one
        assert (row["gained_most"], row["lost_most"]) == (shift.argmax(), shift.argmin())
        np.testing.assert_allclose(
            [r["shift"] for r in found.experts.to_pylist() if r["layer"] == layer], shift
        )


def test_disjoint_choices_are_at_distance_one(maker, tmp_path):
    one, two = (maker.request(name, ["prompt"] * 3, condition=name) for name in "ab")
    one.experts[:], two.experts[:] = [0, 1], [2, 3]
    row = by_layer(compare(maker.write(tmp_path / "s", [one, two]), A, B).layers, 3)
    assert row["total_variation"] == pytest.approx(1)
    assert row["jensen_shannon"] == pytest.approx(1)


def test_pairs_share_the_tokens_before(maker, tmp_path, monkeypatch):
    """Of one example, tokens pair up to the first one that differs; then the context does."""
    one, two = (
        maker.request(name, ["prompt"] * 5, condition=name, example_id="x") for name in "ab"
    )
    one.experts[:, 0] = [[0, 1], [0, 1], [0, 1], [0, 1], [0, 1]]
    two.experts[:, 0] = [[1, 0], [0, 2], [3, 4], [5, 6], [5, 6]]
    alone = maker.request("c", ["prompt"] * 2, condition="a", example_id="y")
    unnamed = maker.request("d", ["prompt"] * 2, condition="b")
    rows = type(one).token_rows
    changed = {("b", 3): 999}  # position 4 has the same id again
    monkeypatch.setattr(
        type(one),
        "token_rows",
        lambda self: [
            row | {"token_id": changed.get((self.request_id, row["position"]), row["token_id"])}
            for row in rows(self)
        ],
    )
    found = compare(maker.write(tmp_path / "s", [one, two, alone, unnamed]), A, B)
    assert (found.pairs, found.paired_tokens) == (1, 3)
    row = by_layer(found.layers, 1)
    assert row["same_experts"] == pytest.approx(1 / 3)
    assert row["kept"] == pytest.approx((1 + 0.5 + 0) / 3)
    replaced = [
        (row["lost"], row["gained"], row["tokens"])
        for row in found.replaced.to_pylist()
        if row["layer"] == 1
    ]
    assert sorted(replaced) == [(0, 3, 1), (0, 4, 1), (1, 2, 1), (1, 3, 1), (1, 4, 1)]


def test_runs_pair_within_a_condition_and_repeats_have_no_pair(maker, tmp_path):
    requests = [
        maker.request(
            f"{run}{condition}{n}", ["prompt"] * 2, run=run, condition=condition, example_id=f"x{n}"
        )
        for run in "st"
        for condition in "ab"
        for n in range(3)
    ]
    requests.append(maker.request("again", ["prompt"] * 2, run="t", condition="a", example_id="x0"))
    store = maker.write(tmp_path / "s", requests)
    found = compare(store, Selection(run="s"), Selection(run="t"))
    assert (found.pairs, found.paired_tokens) == (5, 10)
    # All have the same seed, and so the same routing.
    assert by_layer(found.layers, 1)["same_experts"] == 1
    assert found.replaced.num_rows == 0
    assert compare(store, Selection(run="t"), Selection(run="s")).pairs == 5


def planted(maker, rng, shift):
    """Twelve requests a side; a share `shift` of side b's tokens choose expert 0 of layer 1."""
    requests = []
    for number in range(24):
        condition = "ab"[number % 2]
        request = maker.request(
            f"q{number:02}", ["response"] * 20, rng, condition=condition, example_id=f"x{number}"
        )
        favourite = rng.integers(1, 8)  # tokens of a request are alike
        request.experts[:10, 0] = [favourite, (favourite + 1) % 8]
        if condition == "b":
            request.experts[: int(20 * shift), 0] = [0, 1]
        requests.append(request)
    return requests


def test_by_chance(maker, tmp_path):
    """Where nothing shifts, p-values are as they come; a planted shift is far from chance."""
    rng = np.random.default_rng(0)
    p_values, moved = [], []
    for number in range(25):
        store = maker.write(tmp_path / f"n{number}", planted(maker, rng, 0), per_file=24)
        row = by_layer(compare(store, A, B, relabellings=100).layers, 1)
        p_values.append(row["p_value"])
        moved.append((row["total_variation"], row["by_chance"]))
    assert 0.3 < np.mean(p_values) < 0.7
    observed, by_chance = np.mean(moved, axis=0)
    assert observed == pytest.approx(by_chance, rel=0.15)
    assert np.mean(np.array(p_values) <= 0.05) <= 0.15
    store = maker.write(tmp_path / "planted", planted(maker, rng, 0.9), per_file=24)
    row = by_layer(compare(store, A, B).layers, 1)
    assert row["p_value"] == pytest.approx(1 / 201)
    assert row["total_variation"] > 2 * row["by_chance"]
    assert compare(store, A, B, seed=3).layers == compare(store, A, B, seed=3).layers


def test_pairs_swap_sides_together(maker, tmp_path):
    """Where both of a pair are routed alike, chance moves nothing, however examples differ."""
    requests = [
        maker.request(f"{c}{n}", ["prompt"] * 5, n, condition=c, example_id=f"x{n}")
        for c in "ab"
        for n in range(6)
    ]
    store = maker.write(tmp_path / "s", requests)
    row = by_layer(compare(store, A, B).layers, 1)
    assert (row["total_variation"], row["by_chance"], row["p_value"]) == (0, 0, 1)
    for request in requests:
        request.example_id = None
    store = maker.write(tmp_path / "t", requests)
    assert by_layer(compare(store, A, B).layers, 1)["by_chance"] > 0.1


def test_too_few_requests_have_no_chance(maker, tmp_path):
    requests = [
        maker.request(f"{c}{n}", ["prompt"], n, condition=c) for c in "ab" for n in range(3)
    ]
    row = by_layer(compare(maker.write(tmp_path / "s", requests), A, B).layers, 1)
    assert row["by_chance"] is row["p_value"] is row["kept"] is None


def test_mistakes(maker, tmp_path):
    store = maker.write(tmp_path / "s", maker.random_requests(2, 12))
    with pytest.raises(InputError, match="both sides are condition=a"):
        compare(store, A, A)
    with pytest.raises(InputError, match="no token with condition=x"):
        compare(store, A, Selection(condition="x"))
