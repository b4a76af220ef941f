"""The commands on real stores, through typer."""

import csv
import io
import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from moescope.clients.cli_analysis import register_analysis, store_app
from moescope.clients.cli_import import import_app
from moescope.tracer.errors import InputError

app = typer.Typer()
register_analysis(app)
app.add_typer(store_app, name="store")
app.add_typer(import_app, name="import")


def invoke(*arguments):
    """Standard output of a command; its errors are raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def store(maker, tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "s"
    return maker.write(path, maker.random_requests(3, 24))


def test_info(store):
    code, output = invoke("store", "info", store)
    assert code == 0
    assert "3, of layers 1 to 4" in output
    assert "8 a layer, top-2" in output
    assert "bytes a token" in output


def test_verify(store, maker, tmp_path):
    assert invoke("store", "verify", store) == (0, f"{store} is sound.\n")
    damaged = maker.write(tmp_path / "s", maker.random_requests(1, 3))
    next((damaged / "tokens").iterdir()).unlink()
    code, output = invoke("store", "verify", damaged)
    assert code == 1
    assert "problem: requests/w-000001.parquet: missing tokens: has no tokens file" in output


def test_sql_formats(store, tmp_path):
    query = "SELECT condition, count(*) AS n FROM requests GROUP BY ALL ORDER BY ALL;"
    expected = invoke("sql", store, query, "--format", "json")[1]
    rows = json.loads(expected)
    assert [row["condition"] for row in rows] == ["a", "b", "c", None]
    text = invoke("sql", store, query, "--format", "csv")[1]
    assert [int(row["n"]) for row in csv.DictReader(io.StringIO(text))] == [r["n"] for r in rows]
    for suffix in ("json", "csv", "parquet"):
        assert invoke("sql", store, query, "--out", tmp_path / f"rows.{suffix}") == (0, "")
    assert (tmp_path / "rows.json").read_text() == expected
    assert (tmp_path / "rows.csv").read_text() == text
    assert pq.read_table(tmp_path / "rows.parquet").to_pylist() == rows


def test_sql_table(store):
    output = invoke("sql", store, "SELECT 'x[/]' AS name, [1, 2] AS list, NULL AS nothing")[1]
    assert ["x[/]", "[1,", "2]", "NULL"] in [line.split() for line in output.splitlines()]
    assert "the first 100 rows" in invoke("sql", store, "FROM range(101)")[1]
    assert "the first" not in invoke("sql", store, "FROM range(100)")[1]
    assert "expert_ids" in invoke("sql", store, "DESCRIBE tokens")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SELEKT 1"], "syntax error"),
        (["FROM traces"], "traces"),
        (["SELEKT 1", "--format", "csv"], "syntax error"),
        (["SELECT 1", "--format", "xml"], "choose table, csv, json, parquet"),
        (["SELECT 1", "--format", "parquet"], "needs --out FILE"),
        (["SELECT 1", "--format", "table", "--out", "x.csv"], "for the terminal only"),
        (["SELECT 1", "--out", "x.txt"], "end it with"),
    ],
)
def test_sql_errors(store, arguments, message):
    with pytest.raises(InputError, match=message):
        invoke("sql", store, *arguments)


def test_rd(store, tmp_path):
    out, plot = tmp_path / "ranking.json", tmp_path / "map.png"
    code, output = invoke(
        "rd", store, "--positive", "a", "--negative", "b", "--estimator", "token",
        "--top", 2, "--out", out, "--plot", plot,
    )  # fmt: skip
    assert code == 0
    best = json.loads(out.read_text())[:2]
    shown = [line.split() for line in output.splitlines() if line.split()[:1]]
    for row in best:
        line = [str(row["layer"]), str(row["expert"]), f"{row['rd']:+.4f}"]
        assert line in [there[:3] for there in shown]
    assert f"a: {best[0]['examples_positive']} requests" in output
    assert plot.stat().st_size > 0


def test_rd_error(store):
    with pytest.raises(InputError, match="choose token or sequence"):
        invoke("rd", store, "--positive", "a", "--negative", "b", "--estimator", "mean")


def test_import_esft(tmp_path):
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / "expert_weights_1.txt").write_text("0\t1\t\t0.5\t0.25\n")
    options = ("--top-k", 2, "--num-experts", 4)
    code, output = invoke("import", "esft", tmp_path, tmp_path / "s", *options)
    assert code == 0
    assert f"{tmp_path / 's'}: 1 requests, 1 tokens." in output


def test_help_does_not_import_the_libraries():
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, moescope.clients.cli_analysis; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert not {"duckdb", "pyarrow", "matplotlib", "numpy"} & set(loaded)
