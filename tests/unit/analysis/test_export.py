"""Rankings as files: every format, whole or not at all."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moescope.analysis import risk_difference
from moescope.analysis.export import write_ranking, written_aside
from moescope.analysis.rd import read_settings
from moescope.tracer.errors import InputError


@pytest.fixture(scope="module")
def ranking(maker, tmp_path_factory):
    path = maker.write(tmp_path_factory.mktemp("export") / "s", maker.random_requests(3, 20))
    return risk_difference(path, positive="a", negative="b")


def test_every_format_has_the_same_rows(ranking, tmp_path):
    for suffix in ("parquet", "csv", "JSON"):
        write_ranking(ranking, tmp_path / f"ranking.{suffix}")
    back = pq.read_table(tmp_path / "ranking.parquet")
    assert back.equals(ranking)
    assert read_settings(back) == read_settings(ranking)
    assert json.loads((tmp_path / "ranking.JSON").read_text()) == ranking.to_pylist()
    with (tmp_path / "ranking.csv").open() as lines:
        rows = [{name: float(text) for name, text in row.items()} for row in csv.DictReader(lines)]
    assert rows == ranking.to_pylist()
    assert len(list(tmp_path.iterdir())) == 3


def test_unknown_suffix_and_folder(ranking, tmp_path):
    with pytest.raises(InputError, match=r"end it with \.csv, \.json, \.parquet"):
        write_ranking(ranking, tmp_path / "ranking.xlsx")
    with pytest.raises(InputError, match="none doesn't exist"):
        write_ranking(ranking, tmp_path / "none" / "ranking.csv")


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "old.csv"
    path.write_text("old")

    def fail():
        with written_aside(path) as aside:
            aside.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_settings_of_a_foreign_table():
    with pytest.raises(InputError, match="no settings"):
        read_settings(pa.table({"layer": [1]}))
