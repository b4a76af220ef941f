"""Another reader of the store, written from docs/format.md with pyarrow alone."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from moescope.analysis import open_store
from moescope.analysis.routed_experts import import_routed_experts
from moescope.analysis.routed_sources import Layout
from moescope.tracer.format import requests_schema, tokens_schema

PAGE = (Path(__file__).parents[3] / "docs" / "format.md").read_text()


def read_store(path):
    """(routes, requests): {(request, position, layer, rank): (expert, weight)}, {id: (…)}."""
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format_version"] == 1
    model = manifest["model"]
    top_k = model["top_k"]
    committed = [
        file for file in sorted((path / "requests").glob("*.parquet")) if file.name[0] != "."
    ]
    parts, said = {}, {}
    for file in committed:
        stage = re.match(r"p(\d+)of(\d+)-", file.name)
        number, count = (int(stage[1]), int(stage[2])) if stage else (1, 1)
        for row in pq.read_table(path / "tokens" / file.name).to_pylist():
            key = row["request_id"], row["position"]
            parts.setdefault(key, {})[number, count] = row
        for row in pq.read_table(file).to_pylist():
            said.setdefault(row["request_id"], []).append((count, row))
    routes = {}
    for (request, position), stages in parts.items():
        [count] = {count for _, count in stages}
        if len(stages) < count:
            continue
        ordered = [stages[number, count] for number in range(1, count + 1)]
        ids = [expert for row in ordered for expert in row["expert_ids"]]
        if model.get("weights", True):
            weights = [weight for row in ordered for weight in row["gate_weights"]]
        else:
            weights = [None] * len(ids)
        assert len(ids) == len(weights) == len(model["moe_layers"]) * top_k
        for at, layer in enumerate(model["moe_layers"]):
            for rank in range(top_k):
                entry = at * top_k + rank
                routes[request, position, layer, rank] = ids[entry], weights[entry]
    requests = {}
    for name, rows in said.items():
        [count] = {count for count, _ in rows}
        lengths = {row["tokens"] for _, row in rows}
        complete = len(rows) == count and len(lengths) == 1
        requests[name] = (
            rows[0][1]["condition"], complete and all(row["complete"] for _, row in rows)
        )  # fmt: skip
    return routes, requests


def ours(path):
    con = open_store(path)
    rows = con.execute(
        "SELECT request_id, position, layer, rank, expert, gate_weight FROM routing"
    ).fetchall()
    requests = con.execute("SELECT request_id, condition, complete FROM requests").fetchall()
    return {row[:4]: row[4:] for row in rows}, {row[0]: row[1:] for row in requests}


def test_a_store_of_many_files(maker, tmp_path):
    path = maker.write(tmp_path / "s", maker.random_requests(1, 11))
    assert read_store(path) == ours(path)


def test_what_a_reader_must_ignore(maker, tmp_path):
    path = maker.write(tmp_path / "s", maker.random_requests(1, 6))
    whole = read_store(path)
    for folder in ("tokens", "requests"):
        (path / folder / ".w-000003.parquet").write_bytes(b"half a file")
    (path / "tokens" / "w-000003.parquet").write_bytes(b"no requests file yet")
    (path / "notes.txt").write_text("mine")
    assert read_store(path) == ours(path) == whole


@pytest.mark.parametrize("sizes", [(1, 2), (1, 1, 1)])
def test_pipelines(maker, tmp_path, sizes):
    requests = maker.random_requests(2, 9)
    path = maker.write(tmp_path / "s", requests[:4])
    maker.write_stages(path, requests[4:], sizes, writer="x")
    assert read_store(path) == ours(path)
    for folder in ("tokens", "requests"):  # an engine that ended early
        (path / folder / f"p{len(sizes)}of{len(sizes)}-x-000001.parquet").unlink()
    there, requests_there = read_store(path)
    assert there == ours(path)[0]
    assert requests_there == ours(path)[1]


def test_a_store_without_weights(tmp_path):
    ids = np.random.default_rng(0).random((5, 3, 8)).argsort(axis=2)[..., :2]
    np.save(tmp_path / "q.npy", ids)
    import_routed_experts([tmp_path / "q.npy"], tmp_path / "s", Layout(8))
    assert read_store(tmp_path / "s") == ours(tmp_path / "s")


def test_the_tables_of_columns(maker):
    """The page lists the columns of both schemas, in order, with what may be null."""
    for name, schema in (("tokens", tokens_schema(maker.shape)), ("requests", requests_schema())):
        section = PAGE.split(f"## {name}/*.parquet")[1].split("\n## ")[0]
        rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (yes|no)", section, re.MULTILINE)
        assert [row[0] for row in rows] == schema.names
        assert [row[2] == "yes" for row in rows] == [field.nullable for field in schema]
        for (column, said, _), field in zip(rows, schema, strict=True):
            found = re.sub(r", ordered=0| not null|element: |values=|indices=", "", str(field.type))
            kind = said.split(",")[0].split("<")[0]
            assert found.startswith(kind), column


def test_the_keys_of_the_json_files(maker, tmp_path):
    path = maker.write_stages(tmp_path / "s", maker.random_requests(0, 2), (1, 2))
    manifest = json.loads((path / "manifest.json").read_text())
    writer = json.loads((path / "writers" / "p1of2-w.json").read_text())
    keys = {*manifest, *(f"model.{key}" for key in manifest["model"]), *writer}
    assert [key for key in keys if f"`{key}`" not in PAGE] == []
