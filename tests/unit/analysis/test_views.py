"""What the SQL views say of small stores, row by row."""

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from moescope.analysis import open_store
from moescope.tracer.errors import StoreError
from moescope.tracer.format import MoeShape
from moescope.tracer.store import StoreWriter

COLUMNS = {
    "tokens": "request_id position token_id segment mask expert_ids gate_weights",
    "requests": "request_id run example_id condition mask prompt_tokens tokens complete spans",
    "routing": "request_id position token_id segment mask layer rank expert gate_weight",
    "activation": "request_id segment layer expert tokens count rate gate_mass",
}


def types(con, view):
    return {row[0]: row[1] for row in con.execute(f"DESCRIBE {view}").fetchall()}


def test_routing_has_a_row_a_route(maker, tmp_path):
    requests = maker.random_requests(1, 5)
    con = open_store(maker.write(tmp_path / "s", requests, per_file=2))
    expected = [
        (request.request_id, position, 100 + position, segment, None, layer, rank, expert, weight)
        for request in sorted(requests, key=lambda request: request.request_id)
        for position, segment in enumerate(request.segments)
        for at, layer in enumerate(maker.shape.layers)
        for rank, (expert, weight) in enumerate(
            zip(request.experts[position, at], request.weights[position, at], strict=True)
        )
    ]
    rows = con.execute("FROM routing ORDER BY request_id, position, layer, rank").fetchall()
    assert rows == expected


def test_activation_counts_chosen_experts(maker, tmp_path):
    request = maker.request("q", ["prompt", "prompt", "response"])
    request.experts[:2, 0] = [[5, 2], [2, 7]]
    request.weights[:2, 0] = np.float16([[0.5, 0.25], [0.75, 0.125]])
    con = open_store(maker.write(tmp_path / "s", [request]))
    rows = con.execute(
        "FROM activation WHERE segment = 'prompt' AND layer = 1 ORDER BY expert"
    ).fetchall()
    assert rows == [
        ("q", "prompt", 1, 2, 2, 2, 1.0, 1.0),
        ("q", "prompt", 1, 5, 2, 1, 0.5, 0.5),
        ("q", "prompt", 1, 7, 2, 1, 0.5, 0.125),
    ]


def test_columns_are_the_same_in_an_empty_store(maker, tmp_path):
    with StoreWriter(tmp_path / "empty", maker.facts()):
        pass
    empty = open_store(tmp_path / "empty")
    filled = open_store(maker.write(tmp_path / "s", maker.random_requests(0, 2)))
    for view, columns in COLUMNS.items():
        assert types(empty, view) == types(filled, view)
        assert list(types(filled, view)) == columns.split()
        assert empty.execute(f"SELECT count(*) FROM {view}").fetchone() == (0,)
    assert types(filled, "tokens")["gate_weights"] == "FLOAT[]"


def test_ids_over_255(maker_of, tmp_path):
    maker = maker_of(MoeShape((0,), 300, 2))
    request = maker.request("q", ["prompt"])
    request.experts[0, 0] = [299, 3]
    con = open_store(maker.write(tmp_path / "s", [request]))
    assert con.execute("SELECT expert FROM routing ORDER BY rank").fetchall() == [(299,), (3,)]


def test_uncommitted_files_are_passed_over(maker, tmp_path):
    path = maker.write(tmp_path / "s", maker.random_requests(0, 4), per_file=2)
    sorted((path / "requests").iterdir())[1].unlink()
    con = open_store(path)
    assert con.execute("SELECT count(DISTINCT request_id) FROM tokens").fetchone() == (2,)
    assert con.execute("SELECT count(*) FROM requests").fetchone() == (2,)


def test_any_folder_name(maker, tmp_path):
    path = maker.write(tmp_path / "run=1" / "it's [1]*?", maker.random_requests(0, 2))
    con = open_store(str(path))
    assert con.execute("SELECT DISTINCT run FROM requests").fetchall() == [("r",)]
    assert con.execute("SELECT store FROM model").fetchone() == (str(path),)


def test_a_cursor_sees_the_views(maker, tmp_path):
    con = open_store(maker.write(tmp_path / "s", maker.random_requests(0, 2))).cursor()
    assert con.execute("SELECT count(layer) = count(*) FROM routing").fetchone() == (True,)


def test_not_a_store(tmp_path):
    with pytest.raises(StoreError, match=r"manifest\.json"):
        open_store(tmp_path)


def test_a_damaged_file_is_named(maker, tmp_path):
    path = maker.write(tmp_path / "s", maker.random_requests(0, 2))
    next((path / "tokens").iterdir()).write_bytes(b"PAR1 not really")
    with pytest.raises(StoreError, match="store verify"):
        open_store(path)


def rows_of(con):
    return [con.execute(f"FROM {view} ORDER BY ALL").fetchall() for view in COLUMNS]


@pytest.mark.parametrize("sizes", [(1, 2), (1, 1, 1)])
def test_the_stages_of_a_pipeline_are_one(maker, tmp_path, sizes):
    requests = maker.random_requests(3, 6)
    whole = open_store(maker.write(tmp_path / "whole", requests))
    staged = open_store(maker.write_stages(tmp_path / "staged", requests, sizes))
    assert rows_of(staged) == rows_of(whole)
    for view in COLUMNS:
        assert types(staged, view) == types(whole, view)


def test_engines_of_any_number_of_stages_share_a_store(maker, tmp_path):
    requests = maker.random_requests(4, 9)
    whole = open_store(maker.write(tmp_path / "whole", requests))
    path = maker.write(tmp_path / "s", requests[:3])
    maker.write_stages(path, requests[3:5], (2, 1), writer="a")
    maker.write_stages(path, requests[5:7], (1, 2), writer="b")
    maker.write_stages(path, requests[7:], (1, 1, 1), writer="c")
    assert rows_of(open_store(path)) == rows_of(whole)


def test_a_request_that_lacks_a_stage_is_incomplete(maker, tmp_path):
    path = maker.write_stages(
        tmp_path, [maker.request(name, ["prompt"] * 3) for name in "qr"], (1, 2)
    )
    for folder in ("tokens", "requests"):
        file = path / folder / "p2of2-w-000001.parquet"
        table = pq.read_table(file)
        pq.write_table(table.filter(pc.equal(table["request_id"].cast("string"), "q")), file)
    query = "SELECT request_id, tokens, complete FROM requests ORDER BY ALL"
    assert open_store(path).execute(query).fetchall() == [("q", 3, True), ("r", 0, False)]
    for folder in ("tokens", "requests"):
        (path / folder / "p2of2-w-000001.parquet").unlink()
    con = open_store(path)
    assert con.execute(query).fetchall() == [("q", 0, False), ("r", 0, False)]
    assert con.execute("SELECT count(*) FROM tokens").fetchone() == (0,)
