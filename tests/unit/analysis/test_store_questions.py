"""Load, co-activation, tokens and requests, against counts in numpy and by hand."""

import numpy as np
import pytest

from moescope.analysis import open_store
from moescope.analysis.questions import (
    Context,
    Selection,
    coactivation,
    contexts,
    even_lift,
    expert_load,
    expert_tokens,
    layer_load,
    parse_expert,
    request_routing,
)
from moescope.tracer.errors import InputError, StoreError
from moescope.tracer.format import MoeShape


@pytest.fixture(scope="module")
def requests(maker):
    return maker.random_requests(5, 30)


@pytest.fixture(scope="module")
def store(maker, requests, tmp_path_factory):
    return maker.write(tmp_path_factory.mktemp("questions") / "s", requests)


def routes(requests, keep=lambda *_: True):
    """(experts [tokens, layers, top_k], weights) of the tokens to keep."""
    rows = [
        (request.experts[at], request.weights[at])
        for request in requests
        for at, segment in enumerate(request.segments)
        if keep(request, segment)
    ]
    return np.array([row[0] for row in rows]), np.array([row[1] for row in rows])


@pytest.mark.parametrize(
    ("chosen", "keep"),
    [
        (Selection(), lambda *_: True),
        (Selection(segment="response"), lambda _, segment: segment == "response"),
        (Selection(condition="a"), lambda request, _: request.condition == "a"),
        (
            Selection(run="r", condition="b", mask="none", segment="doc"),
            lambda request, segment: request.condition == "b" and segment == "doc",
        ),
    ],
)
def test_load(maker, requests, store, chosen, keep):
    ids, weights = routes(requests, keep)
    shape = maker.shape
    table = expert_load(store, chosen)
    assert table.num_rows == len(shape.layers) * shape.num_experts
    layers = {row["layer"]: row for row in layer_load(store, chosen, overload=1.5).to_pylist()}
    for at, layer in enumerate(shape.layers):
        rows = [row for row in table.to_pylist() if row["layer"] == layer]
        counts = np.bincount(ids[:, at].ravel(), minlength=shape.num_experts)
        mass = np.bincount(ids[:, at].ravel(), weights[:, at].ravel(), shape.num_experts)
        shares = counts / counts.sum()
        assert [row["count"] for row in rows] == counts.tolist()
        np.testing.assert_allclose([row["share"] for row in rows], shares)
        np.testing.assert_allclose([row["load"] for row in rows], shares * shape.num_experts)
        np.testing.assert_allclose([row["gate_mass"] for row in rows], mass, rtol=1e-12)
        used = shares[shares > 0]
        entropy = -(used * np.log(used)).sum()
        found = layers[layer]
        assert found["tokens"] == len(ids)
        assert found["entropy"] == pytest.approx(entropy)
        assert found["evenness"] == pytest.approx(entropy / np.log(shape.num_experts))
        assert found["effective"] == pytest.approx(np.exp(entropy))
        assert found["dead"] == (counts == 0).sum()
        assert found["overused"] == (shares * shape.num_experts >= 1.5).sum()
        assert found["busiest"] == counts.argmax()


def test_dead_and_overused_experts(maker, tmp_path):
    request = maker.request("q", ["prompt"] * 4)
    request.experts[:, 0] = [[0, 1], [0, 2], [0, 1], [0, 2]]
    [row, *_] = layer_load(maker.write(tmp_path / "s", [request])).to_pylist()
    assert (row["dead"], row["overused"], row["busiest"], row["busiest_load"]) == (5, 1, 0, 4.0)


def test_coactivation(maker, requests, store):
    ids, _ = routes(requests)
    table = coactivation(store, 3).to_pylist()
    assert table == sorted(table, key=lambda row: (-row["lift"], row["expert"], row["other"]))
    chosen = np.zeros((len(ids), maker.shape.num_experts), int)
    np.put_along_axis(chosen, ids[:, 1], 1, axis=1)
    together = chosen.T @ chosen
    assert len(table) == 8 * 7 // 2
    for row in table:
        a, b = row["expert"], row["other"]
        assert a < b
        assert row["together"] == together[a, b]
        assert (row["count"], row["other_count"]) == (together[a, a], together[b, b])
        lift = together[a, b] * len(ids) / (together[a, a] * together[b, b])
        assert row["lift"] == pytest.approx(lift)
        assert row["pmi"] == (None if lift == 0 else pytest.approx(np.log2(lift)))


def test_the_lift_of_a_random_router(maker_of, tmp_path):
    """The average over the pairs of a router that chooses at random is what `even_lift` says."""
    maker = maker_of(MoeShape((0,), 8, 3))
    store = maker.write(tmp_path / "s", [maker.request("q", ["prompt"] * 20_000)])
    lifts = coactivation(store, 0)["lift"].to_numpy()
    np.testing.assert_allclose(lifts, even_lift(8, 3), rtol=0.05)
    assert lifts.mean() == pytest.approx(even_lift(8, 3), rel=0.01)


def test_tokens_of_an_expert(maker, tmp_path):
    request = maker.request("q", ["prompt"] * 6)  # token ids 100 to 105
    request.experts[:, 0] = [[0, 1], [2, 0], [1, 2], [1, 2], [0, 3], [2, 3]]
    request.weights[:, 0] = np.float16([[0.5, 0.25]] * 6)
    other = maker.request("p", ["prompt"] * 2)
    other.experts[:, 0] = [[1, 2], [0, 1]]
    other.weights[:, 0] = np.float16([[0.5, 0.25]] * 2)
    store = maker.write(tmp_path / "s", [request, other])
    rows = expert_tokens(store, 1, 0, by="count").to_pylist()
    # Of 8 tokens, 4 chose it; 101 did twice, once at rank 1.
    assert [(row["token_id"], row["count"], row["total"], row["rate"]) for row in rows] == [
        (101, 2, 2, 1.0),
        (104, 1, 1, 1.0),
        (100, 1, 2, 0.5),
    ]
    assert [row["lift"] for row in rows] == [2.0, 2.0, 1.0]
    assert [row["mean_weight"] for row in rows] == [0.375, 0.5, 0.5]
    by_lift = expert_tokens(store, 1, 0, min_total=2).to_pylist()
    assert [row["token_id"] for row in by_lift] == [101, 100]
    found = contexts(store, 1, 0, [101, 104], around=1, each=1)
    assert found == {
        101: [Context("p", 1, 0.5, [100], 101, [])],
        104: [Context("q", 4, 0.5, [103], 104, [105])],
    }
    assert len(contexts(store, 1, 0, [101], each=5)[101]) == 2


def test_tokens_without_ids_have_no_favourites(maker, tmp_path, monkeypatch):
    request = maker.request("q", ["prompt"] * 3)
    rows = [row | {"token_id": -1} for row in request.token_rows()]
    monkeypatch.setattr(type(request), "token_rows", lambda _: rows)
    assert expert_tokens(maker.write(tmp_path / "s", [request]), 1, 0, by="count").num_rows == 0


def test_a_request_token_by_token(maker, requests, store):
    request = requests[4]
    rows = request_routing(store, request.request_id).to_pylist()
    assert len(rows) == len(request.segments) * len(maker.shape.layers)
    for row in rows:
        at = maker.shape.layers.index(row["layer"])
        assert row["experts"] == request.experts[row["position"], at].tolist()
        assert row["weights"] == request.weights[row["position"], at].tolist()
        assert row["segment"] == request.segments[row["position"]]


def test_a_staged_store_gives_the_same(maker, requests, store, tmp_path):
    staged = maker.write_stages(tmp_path / "staged", requests, (1, 2))
    assert expert_load(staged) == expert_load(store)
    assert coactivation(staged, 4) == coactivation(store, 4)


def test_a_connection_serves_as_well(store):
    con = open_store(store)
    assert expert_load(con) == expert_load(store)
    assert con.execute("SELECT count(*) FROM model").fetchall() == [(1,)]  # still open


def test_masks_by_name_version_and_none(maker, tmp_path, monkeypatch):
    requests = [maker.request(name, ["prompt"] * 2) for name in "abc"]
    masks = {"a": None, "b": "follow@1", "c": "follow@2"}
    rows = type(requests[0]).token_rows
    monkeypatch.setattr(
        type(requests[0]),
        "token_rows",
        lambda self: [row | {"mask": masks[self.request_id]} for row in rows(self)],
    )
    store = maker.write(tmp_path / "s", requests)
    for mask, tokens in (("none", 2), ("follow", 4), ("follow@2", 2)):
        assert layer_load(store, Selection(mask=mask))["tokens"].to_pylist() == [tokens] * 3


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (lambda s: layer_load(s, Selection(run="x")), "no token with run=x. It has run: r"),
        (lambda s: coactivation(s, 3, Selection(segment="x")), "segment: doc, prompt, response"),
        (lambda s: layer_load(s, Selection(mask="x")), "mask: None"),
        (lambda s: coactivation(s, 2), "no MoE layer 2: the model has the MoE layers 1, 3-4"),
        (lambda s: expert_tokens(s, 1, 8), "no expert 8 of layer 1.*experts 0 to 7"),
        (lambda s: expert_tokens(s, 1, 1, by="rate"), "choose lift or count"),
        (lambda s: request_routing(s, "nobody"), "no request 'nobody'.*the first: q0"),
        (lambda _: Selection.parse(["run=a", "run=b"]), "'run=b'.*once"),
        (lambda _: Selection.parse(["segment=a"]), "run, condition, mask"),
        (lambda _: Selection.parse(["run"]), "NAME=VALUE"),
        (lambda _: parse_expert("L1-E2"), "as L12E07"),
    ],
)
def test_mistakes_are_named(store, question, message):
    with pytest.raises(InputError, match=message):
        question(store)


def test_selections_in_words():
    chosen = Selection.parse(["run=a=b", "mask=m"], segment="response")
    assert str(chosen) == "run=a=b, mask=m, segment=response"
    assert str(Selection()) == "all tokens"
    assert parse_expert("L02E117") == (2, 117)


def test_damage_is_named(maker, tmp_path):
    path = maker.write(tmp_path / "s", maker.random_requests(0, 2))
    con = open_store(path)
    next((path / "tokens").iterdir()).unlink()
    with pytest.raises(StoreError, match="can't be read"):
        layer_load(con)
