"""Counting a store's tokens on a Ray cluster: a task for some of its files each, merged exactly.

A request lies within one file, so no two tasks count one request, and the driver puts their rows
together as they are: the result is what counting here gives, bit for bit. (It would be so even for
a request in several parts: counts are integers, and weights multiples of 2^-24.)
"""

import glob
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from moescope.analysis.counts import CountBlock, Counts
from moescope.analysis.rd_requests import token_lengths
from moescope.analysis.token_files import choose_tokens, read_tokens
from moescope.analysis.views import connect
from moescope.tracer.errors import MoescopeError, StoreError
from moescope.tracer.format import MoeShape
from moescope.tracer.object_path import StorePath, Where, store_path

# Tasks for each core, so that one with long requests doesn't keep the others waiting.
_TASKS_A_CORE = 4
# Blocks of counts that a task may be ahead of the driver.
_AHEAD = 4


class RayCounts:
    """What `risk_difference` counts, counted by the tasks of a cluster; `ray` is connected."""

    def __init__(self, ray: Any, store: Where, files: Sequence[StorePath]) -> None:
        """`files`: the store's token files, each with whole tokens (`token_files.whole_files`)."""
        self._ray, self._store = ray, str(store_path(store).absolute())
        files = [file.absolute() for file in files]
        cores = int(ray.cluster_resources().get("CPU", 1))
        number = max(1, min(len(files), cores * _TASKS_A_CORE))
        self._parts = [list(files[at::number]) for at in range(number)]
        self._requests: list[pa.ChunkedArray] = []

    def lengths(self, settings: dict[str, Any]) -> pa.Table:
        """As rd_requests.token_lengths gives them, in another order."""
        task = self._ray.remote(num_cpus=1)(_lengths)
        asked = [task.remote(self._store, part, settings) for part in self._parts]
        tables = [self._get(each) for each in asked]
        self._requests = [table["request_id"] for table in tables]
        whole = pa.concat_tables(tables)
        if len(whole["request_id"].unique()) < whole.num_rows:
            raise StoreError(
                f"a request of {self._store} has rows in several files: `moescope store verify` "
                "names it."
            )
        return whole

    def blocks(
        self, units: pa.Table, settings: dict[str, Any], shape: MoeShape
    ) -> Iterator[CountBlock]:
        """The counts of the requests of `number_units`, in no order; after `lengths`."""
        task = self._ray.remote(
            num_cpus=1, num_returns="streaming", _generator_backpressure_num_objects=_AHEAD
        )(_count)
        running = []
        for part, requests in zip(self._parts, self._requests, strict=True):
            mine = units.filter(pc.is_in(units["request_id"], value_set=requests.combine_chunks()))
            if mine.num_rows:
                running.append(task.remote(part, mine, settings, shape))
        for stream in running:
            for block in stream:
                yield self._get(block)

    def _get(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MoescopeError | duckdb.Error):
                raise error.cause from None
            raise


def _lengths(store: str, files: list[StorePath], settings: dict[str, Any]) -> pa.Table:
    """The lengths of the requests in these files."""
    with closing(connect(store_path(store))) as con:
        names = [glob.escape(str(file)) for file in files]
        con.read_parquet(names, hive_partitioning=False).create_view("tokens")
        return token_lengths(con, settings)


def _count(
    files: list[StorePath], units: pa.Table, settings: dict[str, Any], shape: MoeShape
) -> Iterator[CountBlock]:
    """The counts of `units`, which these files hold."""
    counts = Counts(units.num_rows, shape, gate_mass=settings["gate_mass"])
    choose = choose_tokens(units, settings)
    counts.add_tokens(read_tokens(files, choose, shape, weights=settings["gate_mass"]))
    numbers = units["unit"].to_numpy()
    for block in counts.blocks():
        yield replace(block, units=numbers[block.units])
