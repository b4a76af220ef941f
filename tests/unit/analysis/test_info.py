"""What `store info` counts."""

import pytest

from moescope.analysis.info import RequestGroup, store_info


def test_counts_by_run_and_condition(maker, tmp_path):
    requests = [
        maker.request("q0", ["prompt", "response"], condition="b"),
        maker.request("q1", ["prompt"], condition="b", complete=False),
        maker.request("q2", ["prompt"] * 5, condition=None),
        maker.request("q3", ["prompt"] * 3, condition="a", run="s"),
    ]
    path = maker.write(tmp_path / "s", requests)
    info = store_info(path)
    assert info.model == maker.facts()
    assert info.groups == [
        RequestGroup("r", "b", 2, 3, 1),
        RequestGroup("r", None, 1, 5, 0),
        RequestGroup("s", "a", 1, 3, 0),
    ]
    assert (info.files, info.tokens) == (4, 11)
    assert info.bytes == sum(file.stat().st_size for file in path.rglob("*.parquet"))
    assert info.bytes_per_token == pytest.approx(info.bytes / 11)
    assert [writer.dropped_rows for writer in info.writers] == [0]


def test_an_empty_store(maker, tmp_path):
    info = store_info(maker.write(tmp_path / "s", []))
    assert (info.groups, info.tokens, info.bytes_per_token) == ([], 0, None)
