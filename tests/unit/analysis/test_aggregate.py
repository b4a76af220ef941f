"""The aggregate of a store: the same numbers as from tokens, and never a stale one."""

import duckdb
import numpy as np
import pytest

from moescope.analysis import open_store, risk_difference
from moescope.analysis import rd as rd_module
from moescope.analysis.aggregate import FILE_NAME, build_aggregate, read_aggregate
from moescope.analysis.rd import read_settings
from moescope.analysis.verify import verify_store
from moescope.tracer.errors import InputError, StoreError

SIDES = {"positive": "a", "negative": "b"}


def used(table):
    return read_settings(table)["aggregate"]


@pytest.fixture
def store(maker, tmp_path):
    return maker.write(tmp_path / "s", maker.random_requests(2, 60))


@pytest.mark.parametrize("group_values", [48, 1 << 20])  # two rows in a group, or all
def test_gives_the_same_to_the_last_bit(store, monkeypatch, group_values):
    monkeypatch.setattr("moescope.analysis.aggregate._GROUP_VALUES", group_values)
    options = [
        {"estimator": estimator, "gate_mass": gate_mass, "segment": segment, "run": "r"}
        for estimator in ("token", "sequence")
        for gate_mass in (False, True)
        for segment in ("response", "prompt", "all")
    ]
    before = [risk_difference(store, **SIDES, **some) for some in options]
    build_aggregate(store)
    for some, expected in zip(options, before, strict=True):
        table = risk_difference(store, **SIDES, **some)
        assert used(table)
        assert not used(expected)
        assert table.equals(expected)
    assert verify_store(store) == []


def test_counts_what_the_view_counts(store):
    build_aggregate(store)
    with duckdb.connect() as con:
        long = con.sql(
            f"""
            SELECT segment, request_id, unnest(range(24)) AS at, unnest(counts) AS count,
                unnest(gate_mass) AS gate_mass, tokens FROM '{store / FILE_NAME}'
            """
        ).to_arrow_table()
    layers = [1, 3, 4]
    found = {
        (row["segment"], row["request_id"], layers[row["at"] // 8], row["at"] % 8): (
            row["count"], row["gate_mass"], row["tokens"],
        )
        for row in long.to_pylist()
        if row["count"]
    }  # fmt: skip
    view = open_store(store).sql("FROM activation").to_arrow_table().to_pylist()
    keys = ("segment", "request_id", "layer", "expert")
    values = ("count", "gate_mass", "tokens")
    assert found == {
        tuple(row[key] for key in keys): tuple(row[name] for name in values) for row in view
    }


def test_is_not_used_for_a_part_of_the_segment(maker, tmp_path):
    requests = [
        maker.request(f"{name}{side}", ["prompt", "response", "response"], number,
                      example_id=name, condition=side)
        for number, (name, side) in enumerate(["xa", "xb", "ya", "yb"])
    ]  # fmt: skip
    store = maker.write(tmp_path / "s", requests)
    build_aggregate(store)
    parts = [{"length_match": True}, {"positions": "first:2"}, {"exclude_token_ids": [3]}]
    for part in [*parts, {"lead": 1}, {"token_ids": list(range(200))}]:
        assert not used(risk_difference(store, **SIDES, **part))


def test_is_not_used_once_traces_were_added_or_taken_away(store, maker):
    build_aggregate(store)
    more = maker.random_requests(5, 30)
    for request in more:
        request.request_id += "-more"
    maker.write(store, more, writer="other")
    fresh = risk_difference(store, **SIDES)
    assert not used(fresh)
    assert fresh.equals(risk_difference(open_store(store), **SIDES))
    build_aggregate(store)
    assert used(risk_difference(store, **SIDES))
    for folder in ("requests", "tokens"):
        min((store / folder).glob("other-*")).unlink()
    assert not used(risk_difference(store, **SIDES))


def test_is_not_used_when_a_file_has_another_size(store):
    build_aggregate(store)
    file = min((store / "tokens").iterdir())
    file.write_bytes(file.read_bytes() + b"x")
    assert read_aggregate(store) is None


def test_traces_that_come_while_counting_are_an_error(store, monkeypatch):
    sizes = iter([{"a": 1}, {"a": 1, "b": 2}])
    monkeypatch.setattr("moescope.analysis.aggregate._file_sizes", lambda _path: next(sizes))
    with pytest.raises(InputError, match="traces were added"):
        build_aggregate(store)
    assert not (store / FILE_NAME).exists()


def test_a_damaged_one_is_an_error(store):
    build_aggregate(store).write_bytes(b"PAR1 no")
    with pytest.raises(StoreError, match="store aggregate"):
        risk_difference(store, **SIDES)


def test_stages_and_empty_stores(maker, tmp_path):
    requests = maker.random_requests(2, 40)
    staged = maker.write_stages(tmp_path / "stages", requests, (2, 1))
    whole = maker.write(tmp_path / "whole", requests)
    build_aggregate(staged)
    table = risk_difference(staged, **SIDES, gate_mass=True)
    assert used(table)
    assert table.equals(risk_difference(whole, **SIDES, gate_mass=True))
    empty = maker.write(tmp_path / "empty", [])
    build_aggregate(empty)
    with pytest.raises(InputError, match="the store is empty"):
        risk_difference(empty, **SIDES)


def test_experts_in_parts_are_the_same(maker, tmp_path, monkeypatch):
    """With little memory, a few experts at a time: from the counts, and from the aggregate."""
    requests = []
    for number in range(30):
        side = "ab"[number % 2]
        request = maker.request(f"q{number}", ["response"] * 5, number, condition=side)
        request.example_id = f"e{number // 2}"
        # Expert 6 of layer 4 is always chosen under a, and never under b.
        last = request.experts[:, 2]
        last[:] = np.where(last == 6, 7 - last[:, ::-1] % 6, last)
        if side == "a":
            last[:, 0] = 6
        requests.append(request)
    store = maker.write(tmp_path / "s", requests)
    options = {"resamples": 200, "stability": 4}
    whole = risk_difference(store, **SIDES, **options)
    assert whole["p_value"][0].as_py() < 1 / 201  # looked at again, being the only one
    monkeypatch.setattr("moescope.analysis.rd_estimates._MATRIX_BYTES", 1000)
    tables = [risk_difference(store, **SIDES, **options)]
    build_aggregate(store)
    tables.append(risk_difference(store, **SIDES, **options))
    stable = read_settings(whole)["stability"]
    for table in tables:
        assert read_settings(table)["stability"]["top"] == stable["top"]
        for name in whole.column_names:
            for part, all_ in zip(table[name].to_pylist(), whole[name].to_pylist(), strict=True):
                assert part == pytest.approx(all_, abs=1e-9)
    assert rd_module.METADATA_KEY in tables[0].schema.metadata
    assert not np.isnan(stable["bootstrap"]["spearman"]["mean"])
