"""Counting from files. That it gives what the query and the reference give, test_rd.py shows."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from moescope.analysis import risk_difference
from moescope.analysis.counts import Counts, _widen
from moescope.analysis.token_files import TokenBlock, read_tokens, whole_files
from moescope.tracer.errors import StoreError

SIDES = {"positive": "a", "negative": "b", "resamples": 0}


def test_every_float16_without_a_sign_is_widened_exactly():
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    assert _widen(halves).dtype == np.float32
    assert (_widen(halves) == halves.astype(np.float64)).all()
    for odd in (np.nan, np.inf, -0.5, -0.0):
        some = np.array([0.25, odd, 6e-8], np.float16)
        assert np.array_equal(_widen(some), some.astype(np.float32), equal_nan=True)
    assert len(_widen(halves[:0])) == 0


def test_tokens_of_a_unit_may_be_scattered_and_many(maker):
    """Runs of one token and of more than are counted at once give the same as one by one."""
    shape, rng = maker.shape, np.random.default_rng(0)
    units = np.concatenate([rng.integers(0, 4, 500), np.full(2000, 2), rng.integers(0, 4, 500)])
    routes = rng.random((len(units), len(shape.layers), shape.num_experts)).argsort(axis=2)
    ids = routes[..., : shape.top_k].astype(np.uint8).reshape(len(units), -1)
    weights = rng.random(ids.shape).astype(np.float16)
    counts = Counts(4, shape, gate_mass=True)
    counts.add_tokens([TokenBlock(units[:1700], ids[:1700], weights[:1700])])
    counts.add_tokens([TokenBlock(units[1700:], ids[1700:], weights[1700:])])
    [block] = counts.blocks()
    expected = np.zeros((2, 4, len(shape.layers) * shape.num_experts))
    firsts = np.repeat(np.arange(len(shape.layers)) * shape.num_experts, shape.top_k)
    for unit, chosen, weight in zip(units, ids, weights, strict=True):
        expected[0, unit, chosen + firsts] += 1
        expected[1, unit, chosen + firsts] += weight
    assert (block.counts == expected[0]).all()
    assert (block.mass == expected[1]).all()


def test_row_groups_without_a_token_that_counts_are_not_decoded(maker, tmp_path):
    """One with damaged lists is no matter to who doesn't ask for its run."""
    requests = [
        maker.request(f"{run}{number}", ["response"] * 40, number, condition="ab"[number], run=run)
        for run in ("old", "new")
        for number in (0, 1)
    ]
    path = maker.write(tmp_path / "s", requests, per_file=2)
    old, _ = whole_files(path)
    column = pq.ParquetFile(old).metadata.row_group(0).column(5)
    assert column.path_in_schema.startswith("expert_ids")
    with old.open("r+b") as file:
        file.seek(column.data_page_offset)
        file.write(bytes(column.total_compressed_size // 2))
    assert risk_difference(path, **SIDES, run="new").num_rows == maker.shape.num_experts * 3
    with pytest.raises(StoreError, match=f"{old} can't be read"):
        risk_difference(path, **SIDES, run="old")


def test_reading_may_stop_halfway(maker, tmp_path):
    requests = [maker.request(f"q{number}", ["response"] * 3, number) for number in range(30)]
    path = maker.write(tmp_path / "s", requests, per_file=1)

    def choose(keys):
        return np.zeros(keys.num_rows, np.int64)

    blocks = read_tokens(whole_files(path), choose, maker.shape, weights=False)
    assert next(blocks).weights is None
    blocks.close()
