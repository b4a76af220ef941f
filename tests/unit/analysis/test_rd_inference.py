"""Intervals, strata and the unit of analysis, end to end: from a store to the table."""

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from moescope.analysis import risk_difference
from moescope.analysis.rd import read_settings
from moescope.tracer.errors import InputError
from moescope.tracer.format import MoeShape, requests_schema, tokens_schema
from moescope.tracer.store import StoreWriter

SIDES = {"positive": "a", "negative": "b"}
SHAPE = MoeShape((1, 2), 16, 2)


def write(path, maker, routed):
    """A store of (name, example, condition, run, experts [tokens, layers, top_k])."""
    offsets, ids, rows, positions, names = [0], [], [], [], []
    for name, example, condition, run, experts in routed:
        ids.append(experts.reshape(len(experts), -1))
        positions.append(np.arange(len(experts), dtype=np.int32))
        names += [name] * len(experts)
        rows.append(
            {"request_id": name, "run": run, "example_id": example, "condition": condition,
             "mask": None, "prompt_tokens": 0, "tokens": len(experts), "complete": True,
             "spans": None}
        )  # fmt: skip
    ids, positions = np.concatenate(ids), np.concatenate(positions)
    offsets = pa.array(np.arange(len(ids) + 1, dtype=np.int32) * SHAPE.num_routes)
    schema = tokens_schema(SHAPE)
    tokens = pa.Table.from_arrays(
        [
            pa.array(names).dictionary_encode(),
            pa.array(positions),
            pa.array(positions),
            pa.array(["response"] * len(ids)).dictionary_encode(),
            pa.nulls(len(ids), pa.string()).dictionary_encode(),
            pa.ListArray.from_arrays(offsets, pa.array(ids.ravel().astype(np.uint8))),
            pa.ListArray.from_arrays(offsets, pa.array(np.full(ids.size, 0.25, np.float16))),
        ],
        names=schema.names,
    ).cast(schema)
    with StoreWriter(path, maker.facts()) as store:
        store.commit(tokens, pa.Table.from_pylist(rows, requests_schema()))
    return path


def text(rng, liking, length=None):
    """Experts [tokens, layers, top_k] of one text: drawn by `liking` [layers, experts], and by how
    much this text likes each, so that its tokens are alike."""
    mood = rng.normal(0, 0.8, liking.shape)
    noise = rng.gumbel(size=(length or rng.integers(20, 60), *liking.shape))
    return np.argsort(-(liking + mood + noise), axis=2)[..., : SHAPE.top_k]


def planted(rng, pairs, effect=1.5):
    """Pairs of texts of which the second likes experts 0 to 2 of layer 1 less."""
    base = rng.normal(0, 0.5, (2, 16))
    moved = base.copy()
    moved[0, :3] += effect
    for number in range(pairs):
        topic = rng.normal(0, 0.5, base.shape)
        for side, liking in (("a", moved), ("b", base)):
            yield f"{number}{side}", f"e{number}", side, "r", text(rng, liking + topic)


@pytest.fixture(scope="module")
def maker2(maker_of):
    return maker_of(SHAPE)


@pytest.fixture(scope="module")
def store(maker2, tmp_path_factory):
    path = tmp_path_factory.mktemp("planted") / "s"
    return write(path, maker2, list(planted(np.random.default_rng(0), 50)))


def cell(table, layer, expert):
    rows = table.to_pylist()
    return next(row for row in rows if (row["layer"], row["expert"]) == (layer, expert))


def test_planted_experts_are_found_and_hardly_another(store):
    table = risk_difference(store, **SIDES)
    found = {(row["layer"], row["expert"]) for row in table.to_pylist() if row["q_value"] <= 0.05}
    assert {(1, 0), (1, 1), (1, 2)} <= found
    # The others of layer 1 give way to them; layer 2 doesn't.
    assert len([place for place in found if place[0] == 2]) <= 1
    for row in table.to_pylist():
        assert row["ci_low"] <= row["rd"] <= row["ci_high"]
    facts = read_settings(table)
    assert (facts["design"], facts["pairs"], facts["num_examples"]) == ("paired", 50, 50)
    assert facts["power"][0]["needed"]["0.5"] == 34


def test_pairs_agree_with_the_t_test(store):
    """The means of so many differences are near normal, so all of this is close to Student's."""
    table = risk_difference(store, **SIDES, resamples=10_000)
    for layer, expert in ((1, 0), (1, 9), (2, 4), (2, 11)):
        rates = rates_of(store, layer, expert)
        test = stats.ttest_rel(rates["a"], rates["b"])
        row = cell(table, layer, expert)
        assert row["effect"] == pytest.approx(test.statistic / np.sqrt(50))
        low, high = test.confidence_interval()
        assert (row["ci_low"], row["ci_high"]) == pytest.approx((low, high), abs=0.1 * (high - low))
        assert row["p_value"] == pytest.approx(test.pvalue, abs=0.02)


def rates_of(store, layer, expert):
    from moescope.analysis import open_store

    rows = open_store(store).execute(
        """
        SELECT condition, coalesce(rate, 0) FROM requests
        LEFT JOIN (FROM activation WHERE layer = ? AND expert = ?) USING (request_id)
        ORDER BY example_id
        """,
        [layer, expert],
    )
    rates = {"a": [], "b": []}
    for condition, rate in rows.fetchall():
        rates[condition].append(rate)
    return {side: np.array(values) for side, values in rates.items()}


def test_repeats_of_an_example_are_no_new_examples(maker2, tmp_path):
    """Ten runs over the same four pairs: still four pairs, whose sign flips give 1/8 at best."""
    rng = np.random.default_rng(1)
    base = rng.normal(0, 0.5, (2, 16))
    moved = base + np.eye(2, 16) * 4
    routed = []
    for number in range(4):
        for side, liking in (("a", moved), ("b", base)):
            for run in range(10):
                name = f"{number}{side}{run}"
                routed.append((name, f"e{number}", side, f"r{run}", text(rng, liking)))
    table = risk_difference(write(tmp_path / "s", maker2, routed), **SIDES)
    assert read_settings(table)["pairs"] == 4
    assert table["examples_positive"][0].as_py() == 40
    assert min(table["p_value"].to_pylist()) == 2 / 2**4
    # As requests of their own, forty against forty, the same data look certain.
    alone = [(name, None, side, run, experts) for name, _, side, run, experts in routed]
    table = risk_difference(write(tmp_path / "alone", maker2, alone), **SIDES)
    assert read_settings(table)["design"] == "unpaired"
    assert min(table["p_value"].to_pylist()) < 0.001


def test_a_topic_does_not_look_like_a_behaviour_within_strata(maker2, tmp_path):
    """Law texts like expert 5, and the positive condition has more of them: no behaviour."""
    rng = np.random.default_rng(2)
    base = rng.normal(0, 0.3, (2, 16))
    law = base + np.eye(16)[5] * 2.5
    routed, topics = [], ["example_id,topic"]
    for side, laws in (("a", 30), ("b", 10)):
        for number in range(40):
            topic = "law" if number < laws else "chat"
            liking = law if topic == "law" else base
            routed.append((f"{side}{number}", f"{side}{number}", side, topic, text(rng, liking)))
            topics.append(f"{side}{number},{topic}")
    routed.append(("lone", "lone", "a", "poem", text(rng, base)))
    topics.append("lone,poem")
    store = write(tmp_path / "s", maker2, routed)
    pooled = cell(risk_difference(store, **SIDES), 1, 5)
    assert pooled["q_value"] < 0.01
    assert pooled["rd"] > 0.1
    table = risk_difference(store, **SIDES, strata="run")
    within = cell(table, 1, 5)
    assert within["q_value"] > 0.05
    assert within["ci_low"] < 0 < within["ci_high"]
    facts = read_settings(table)
    assert facts["strata_used"] == ["chat", "law"]
    assert facts["left_out"] == {"its stratum has fewer than two examples of a condition": 1}
    (tmp_path / "topics.csv").write_text("\n".join(topics))
    from_file = risk_difference(store, **SIDES, strata=f"{tmp_path / 'topics.csv'}:topic")
    assert from_file.equals(table)


def test_strata_combine_by_n1_n2_over_their_sum(maker2, tmp_path):
    rng = np.random.default_rng(3)
    base = rng.normal(0, 0.5, (2, 16))
    sizes = {("a", "x"): 3, ("b", "x"): 7, ("a", "y"): 6, ("b", "y"): 4}
    routed = [
        (f"{side}{topic}{number}", None, side, topic, text(rng, base))
        for (side, topic), size in sizes.items()
        for number in range(size)
    ]
    store = write(tmp_path / "s", maker2, routed)
    table = risk_difference(store, **SIDES, strata="run")
    parts = [risk_difference(store, **SIDES, run=topic) for topic in "xy"]
    weights = np.array([3 * 7 / 10, 6 * 4 / 10])
    for layer, expert in ((1, 3), (2, 8)):
        rds = [cell(part, layer, expert)["rd"] for part in parts]
        expected = rds @ weights / weights.sum()
        assert cell(table, layer, expert)["rd"] == pytest.approx(expected)


def test_the_seed_and_nothing_else_decides(store):
    one = risk_difference(store, **SIDES, resamples=300)
    assert one.equals(risk_difference(store, **SIDES, resamples=300))
    other = risk_difference(store, **SIDES, resamples=300, seed=1)
    assert other["rd"].equals(one["rd"])
    assert not other["ci_low"].equals(one["ci_low"])


def test_no_resamples_no_columns(store):
    table = risk_difference(store, **SIDES, resamples=0)
    assert not {"ci_low", "p_value", "q_value", "effect"} & set(table.column_names)
    assert "power" not in read_settings(table)


def test_stability_is_in_the_metadata(store):
    facts = read_settings(risk_difference(store, **SIDES, stability=3))["stability"]
    assert facts["top"] == 3
    assert facts["split_half"]["overlap"]["mean"] > 0.7  # the three that were planted
    assert 0 < facts["split_half"]["spearman"]["mean"] < facts["bootstrap"]["spearman"]["mean"] < 1


def test_strata_that_can_not_be(store, tmp_path):
    topics = tmp_path / "topics.csv"
    topics.write_text("example_id,topic\ne1,x\ne1,y\n")
    with pytest.raises(InputError, match="several values of topic"):
        risk_difference(store, **SIDES, strata=f"{topics}:topic")
    with pytest.raises(InputError, match="can't read example_id and theme"):
        risk_difference(store, **SIDES, strata=f"{topics}:theme")
    topics.write_text("example_id,topic\n" + "".join(f"e{n},{n}\n" for n in range(50)))
    with pytest.raises(InputError, match="has two examples of each condition"):
        risk_difference(store, **SIDES, strata=f"{topics}:topic")
