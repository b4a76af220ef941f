"""A store opens with other people's tools, and none of our code: the routing is all there."""

import numpy as np
import pyarrow.dataset as ds
import pytest

duckdb = pytest.importorskip("duckdb")


@pytest.fixture(scope="module")
def requests(maker):
    return maker.random_requests(7, 12)


@pytest.fixture(scope="module")
def store(maker, requests, tmp_path_factory):
    return maker.write(tmp_path_factory.mktemp("interop") / "s", requests, per_file=5)


def expected(requests):
    """(request, position, segment, experts, weights) of every token, in order of the first two."""
    return [
        (r.request_id, at, segment, r.experts[at].ravel().tolist(), r.weights[at].ravel().tolist())
        for r in sorted(requests, key=lambda request: request.request_id)
        for at, segment in enumerate(r.segments)
    ]


COLUMNS = ["request_id", "position", "segment", "expert_ids", "gate_weights"]


def test_pandas(store, requests):
    pd = pytest.importorskip("pandas")
    frame = pd.read_parquet(store / "tokens")  # ids are categories
    rows = [
        (request, position, segment, experts.tolist(), [float(weight) for weight in weights])
        for request, position, segment, experts, weights in frame[COLUMNS].itertuples(index=False)
    ]
    assert sorted(rows) == expected(requests)
    frame = pd.read_parquet(store / "requests").set_index("request_id")
    assert frame["condition"].replace({np.nan: None}).to_dict() == {
        request.request_id: request.condition for request in requests
    }


def test_polars(store, requests):
    pl = pytest.importorskip("polars")
    frame = pl.scan_parquet(store / "tokens" / "*.parquet")
    frame = frame.with_columns(pl.col("request_id", "segment").cast(pl.String))
    rows = frame.sort("request_id", "position").select(COLUMNS).collect().rows()
    assert rows == expected(requests)
    conditions = pl.read_parquet(store / "requests").select("request_id", "condition").rows()
    assert dict(conditions) == {r.request_id: r.condition for r in requests}


def test_datasets(store, requests, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = {"tokens": str(store / "tokens" / "*.parquet")}
    found = datasets.load_dataset(
        "parquet", data_files=files, split="tokens", cache_dir=str(tmp_path)
    )
    rows = found.with_format("arrow")[:].select(COLUMNS).to_pylist()
    assert sorted(tuple(row.values()) for row in rows) == expected(requests)


def test_duckdb_alone(store, requests):
    rows = duckdb.sql(
        f"SELECT {', '.join(COLUMNS)} FROM '{store}/tokens/*.parquet' ORDER BY request_id, position"
    ).fetchall()
    assert rows == expected(requests)
    query = f"SELECT count(*), sum(tokens)::INT FROM '{store}/requests/*.parquet'"
    assert duckdb.sql(query).fetchall() == [(12, len(expected(requests)))]


def test_arrow_alone(store, requests):
    rows = ds.dataset(store / "tokens", format="parquet").to_table(columns=COLUMNS).to_pylist()
    assert sorted(tuple(row.values()) for row in rows) == expected(requests)
