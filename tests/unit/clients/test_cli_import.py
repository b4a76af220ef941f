"""`moescope import` and `export`: others' files in, ours out, and back."""

import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from test_cli_questions import STORE, invoke

from moescope.analysis import open_store, risk_difference
from moescope.analysis.export import write_ranking
from moescope.clients.mask_files import mask_from_rd
from moescope.tracer.errors import InputError
from moescope.tracer.mask import read_mask, write_mask


@pytest.fixture
def ranking(tmp_path):
    table = risk_difference(
        STORE, positive="with_doc", negative="without_doc", run="plain", estimator="token",
        segment="question", resamples=0,
    )  # fmt: skip
    write_ranking(table, tmp_path / "ranking.parquet")
    return tmp_path / "ranking.parquet"


@pytest.mark.parametrize(
    "options", [["--num-experts", 8], ["--config", "config.json"], ["--config", "."]]
)
def test_routed_experts(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"num_experts": 8, "num_experts_per_tok": 2}))
    ids = np.random.default_rng(0).random((5, 3, 8)).argsort(axis=2)[..., :2]
    for name in "ab":
        np.save(f"{name}.npy", ids)
    output = invoke(
        "import", "routed-experts", "a.npy", "b.npy", "traces", *options, "--run", "mine",
        "--condition", "c", "--moe-layers", "0,2",
    )  # fmt: skip
    assert output == "traces: 2 requests, 10 tokens, without gate weights.\n"
    con = open_store("traces")
    query = "SELECT DISTINCT run, condition, layer FROM routing JOIN requests USING (request_id)"
    assert sorted(con.execute(query).fetchall()) == [("mine", "c", 0), ("mine", "c", 2)]
    assert "is sound" in invoke("store", "verify", "traces")
    assert "gate weights  none" in invoke("store", "info", "traces")
    assert "gate weights" not in invoke("store", "info", STORE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.npy"], "the store last"),
        (["a.npy", "s"], "give --config or --num-experts"),
        (["a.npy", "s", "--num-experts", 8, "--moe-layers", "x"], "--moe-layers 'x'"),
        (["a.npy", "s", "--config", "none.json"], "can't read the model's config none.json"),
        (["a.npy", "s", "--num-experts", 8], "can't read a.npy"),
    ],
)
def test_mistakes_in_routed_experts(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        invoke("import", "routed-experts", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_ranking_to_steermoe_and_back(ranking, tmp_path):
    invoke("export", "ranking", ranking, tmp_path / "a.pkl")
    frame = pd.read_pickle(tmp_path / "a.pkl")
    assert frame["layer"].unique().tolist() == [1, 0, 2]  # the model's layers 2, 1 and 3
    back = tmp_path / "back.csv"
    output = invoke(
        "import", "steermoe", tmp_path / "a.pkl", back, "--positive", "with_doc",
        "--negative", "without_doc", "--moe-layers", "1-3",
    )  # fmt: skip
    assert output == f"48 experts: {back}\n"
    masks = [
        mask_from_rd(file, name="m", deactivate=5, activate=2).entries for file in (ranking, back)
    ]
    assert masks[0] == masks[1]


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_rankings_in_every_format(ranking, tmp_path, suffix):
    out = tmp_path / f"other.{suffix}"
    invoke("export", "ranking", ranking, out)
    again = tmp_path / "again.parquet"
    invoke("export", "ranking", out, again)
    for name in ("layer", "expert", "a1", "rd"):
        assert pq.read_table(again)[name].to_pylist() == pq.read_table(ranking)[name].to_pylist()


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_masks_in_every_format(ranking, tmp_path, suffix):
    mask = mask_from_rd(ranking, name="m", deactivate=3, scale=2.0, activate=2)
    write_mask(mask, tmp_path / "m.json")
    table = tmp_path / f"table.{suffix}"
    assert invoke("export", "mask", tmp_path / "m.json", table) == f"5 experts: {table}\n"
    invoke("import", "mask", table, "--name", "m", "--out", tmp_path / "back.json")
    assert read_mask(tmp_path / "back.json").entries == mask.entries


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer,expert\n1,2\n", "no column action"),
        ("layer,expert,action\n1,2,melt\n", "melt|action"),
        ("layer,expert,action\n1,2,scale\n", "value"),
    ],
)
def test_tables_that_are_no_masks(tmp_path, text, message):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        invoke(
            "import", "mask", tmp_path / "table.csv", "--name", "m", "--out", tmp_path / "m.json"
        )
    assert not (tmp_path / "m.json").exists()
