"""What is in a trace store: the model, the requests by run and condition, files, bytes, drops."""

from contextlib import closing
from dataclasses import dataclass

import duckdb

from moescope.analysis.views import open_store, unreadable
from moescope.tracer.format import ModelFacts
from moescope.tracer.object_path import Where, store_path
from moescope.tracer.store import WriterCounters, committed_files, read_manifest, read_writers


@dataclass(frozen=True, slots=True)
class RequestGroup:
    """The requests of one run and condition; `tokens` counts their rows."""

    run: str
    condition: str | None
    requests: int
    tokens: int
    incomplete: int


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """Facts and counts of a store; `files` and `bytes` are of the committed Parquet files."""

    model: ModelFacts
    groups: list[RequestGroup]
    files: int
    bytes: int
    writers: list[WriterCounters]

    @property
    def tokens(self) -> int:
        """Rows of all requests."""
        return sum(group.tokens for group in self.groups)

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes on disk for each row; None in a store without rows."""
        return self.bytes / self.tokens if self.tokens else None


def store_info(path: Where) -> StoreInfo:
    """Describe the store at `path` without reading its tokens; StoreError if it is none."""
    path = store_path(path)
    tokens, requests = committed_files(path)
    with closing(open_store(path)) as con:
        try:
            groups = con.execute(
                """
                SELECT run, condition, count(*), sum(tokens)::BIGINT, count(*) FILTER (NOT complete)
                FROM requests GROUP BY run, condition ORDER BY run, condition
                """
            ).fetchall()
        except duckdb.Error as error:
            raise unreadable(path, error) from error
    return StoreInfo(
        model=read_manifest(path),
        groups=[RequestGroup(*group) for group in groups],
        files=len(tokens) + len(requests),
        bytes=sum(file.stat().st_size for file in tokens + requests),
        writers=read_writers(path),
    )
