"""Check a trace store: every invariant that readers rely on, one pair of files at a time."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moescope.analysis.views import connect, read_sql, unreadable
from moescope.tracer.errors import StoreError
from moescope.tracer.format import MoeShape, requests_schema, tokens_schema
from moescope.tracer.object_path import (
    ObjectPath,
    StorePath,
    Where,
    list_files,
    store_path,
)
from moescope.tracer.store import (
    WriterCounters,
    living_writers,
    read_manifest,
    read_writers,
    stage_of,
)

# What to do about a failed check. Rows and requests can't be mended, so mostly it is the last one.
_REMEDIES = {
    "missing tokens": "restore the tokens file, or remove this one to give up its requests",
    "request twice": "the same request was stored twice: remove one of the pairs of files",
    "counters": "find out which files were added, removed or changed by hand, and restore them",
    "writers": "restore it from a backup",
    "missing stage": "its engine ended early, or a pair of files was removed: restore it, or trace "
    "the request again (it counts as incomplete)",
}
_REPLACE = "restore both files of the pair from a backup, or remove both and trace again"

_BATCH_ROWS = 8192


@dataclass(frozen=True, slots=True)
class Problem:
    """A check that failed in one file: for which request first, and for how many more.

    `file` is relative to the store. `count` counts requests, or tokens for checks of routes.
    """

    check: str
    file: str
    request: str | None
    what: str
    count: int = 1

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return _REMEDIES.get(self.check, _REPLACE)

    def __str__(self) -> str:
        request = "" if self.request is None else f", request {self.request}"
        more = "" if self.count == 1 else f" (and {self.count - 1:,} more such)"
        return f"{self.file}{request}: {self.check}: {self.what}{more}; {self.remedy}."


def verify_store(path: Where) -> list[Problem]:
    """Everything that is wrong with the store at `path`; an empty list if it is sound.

    Reads every committed file once; memory stays within a batch of tokens and one file's request
    ids and positions. Raises StoreError when `path` is no trace store.
    """
    path = store_path(path)
    facts = read_manifest(path)
    whole = facts.shape
    problems: list[Problem] = []
    readable: list[StorePath] = []
    counts: dict[str, WriterCounters] = {}
    layers = _layers(path)
    committed = _committed(path)
    there = {file.name: file for file in list_files(path / "tokens", "[!.]*.parquet")}
    for requests in committed:
        tokens = there.get(requests.name)
        shape = replace(whole, layers=layers.get(_writer(requests), whole.layers))
        if tokens is None:
            problems.append(Problem("missing tokens", _name(requests), None, "has no tokens file"))
            continue
        with _fetched(tokens, requests) as pair:
            faults = list(_check_pair(*pair, shape, facts.weights))
            problems += faults
            if not any(fault.check in ("unreadable", "schema") for fault in faults):
                readable.append(requests)
                writer = _writer(requests)
                _count(counts.setdefault(writer, WriterCounters(writer)), *pair)
    problems += _check_across(path, readable)
    problems += _check_counters(path, counts)
    return problems


@contextmanager
def _fetched(tokens: StorePath, requests: StorePath) -> Iterator[tuple[Path, Path]]:
    """Both files of a pair, here: of objects, copies that are gone afterwards."""
    if isinstance(tokens, Path) and isinstance(requests, Path):
        yield tokens, requests
        return
    with TemporaryDirectory() as folder:
        copies = []
        for file in (tokens, requests):
            assert isinstance(file, ObjectPath)
            copy = Path(folder, file.parent.name, file.name)
            copy.parent.mkdir()
            file.download(copy)
            copies.append(copy)
        yield copies[0], copies[1]


def store_notes(path: Where) -> list[str]:
    """What is no damage, but good to know: uncommitted files, writers not closed, lost rows."""
    path = store_path(path)
    committed = {file.name for file in _committed(path)}
    notes = [
        f"{_name(file)} is not committed, so it is passed over: its writer is at it, or was killed."
        for file in list_files(path / "tokens", "[!.]*.parquet")
        if file.name not in committed
    ]
    living = set(living_writers(path))
    for writer in read_writers(path):
        if writer.state == "open":
            how = " and at work" if writer.writer in living else ", but gone: it was killed"
            notes.append(f"writer {writer.writer} is still open{how}; its counters may be behind.")
        elif writer.state == "killed":
            notes.append(f"writer {writer.writer} was killed; what it had not written is lost.")
        if writer.dropped_rows:
            notes.append(
                f"writer {writer.writer} dropped {writer.dropped_rows:,} rows; "
                f"{writer.incomplete_requests:,} of its requests are incomplete."
            )
        if writer.unfinished_requests:
            notes.append(
                f"writer {writer.writer}: {writer.unfinished_requests:,} requests were running "
                "when their engine ended, and are not in the store."
            )
    return notes


def _committed(path: StorePath) -> list[StorePath]:
    return list_files(path / "requests", "[!.]*.parquet")


def _layers(path: StorePath) -> dict[str, tuple[int, ...]]:
    """The layers of each writer that has not all of the model's."""
    try:
        return {w.writer: tuple(w.layers) for w in read_writers(path) if w.layers}
    except StoreError:  # `_check_counters` says so
        return {}


def _writer(file: StorePath) -> str:
    return file.stem.rpartition("-")[0]


def _name(file: StorePath) -> str:
    return f"{file.parent.name}/{file.name}"


def _check_pair(tokens: Path, requests: Path, shape: MoeShape, weights: bool) -> Iterator[Problem]:
    sound = True
    schemas = tokens_schema(shape, weights=weights), requests_schema()
    for file, schema in zip((tokens, requests), schemas, strict=True):
        try:
            there = pq.read_schema(file)
        except (pa.ArrowException, OSError) as error:
            yield Problem("unreadable", _name(file), None, str(error))
            sound = False
        else:
            if not there.equals(schema):
                yield Problem("schema", _name(file), None, _first_difference(there, schema))
                sound = False
    if not sound:
        return
    try:
        yield from _check_requests(tokens, requests)
        yield from _check_routes(tokens, shape, weights)
    except (pa.ArrowException, OSError, duckdb.Error) as error:
        yield Problem("unreadable", _name(tokens), None, str(error))


def _first_difference(there: pa.Schema, schema: pa.Schema) -> str:
    for field in schema:
        if field.name not in there.names:
            return f"column {field.name} is missing"
        if there.field(field.name) != field:
            return f"column {field.name} is {there.field(field.name).type}, not {field.type}"
    return f"has the columns {', '.join(there.names)}; they should be {', '.join(schema.names)}"


def _check_requests(tokens: Path, requests: Path) -> Iterator[Problem]:
    files = {"tokens": escape(str(tokens)), "requests": escape(str(requests))}
    with closing(duckdb.connect()) as con:
        for name, request, what, count in con.execute(read_sql("verify"), files).fetchall():
            yield Problem(name, _name(tokens), request, what, count)


def _check_routes(file: Path, shape: MoeShape, has_weights: bool) -> Iterator[Problem]:
    """The lists of every token: first their lengths, then what stands in them."""
    found: dict[str, Problem] = {}
    columns = ["request_id", "position", "expert_ids", "gate_weights"]
    for batch in pq.ParquetFile(file).iter_batches(_BATCH_ROWS, columns=columns):
        failed = []
        if not has_weights:
            failed.append(
                ("weight", batch, batch["gate_weights"].is_valid().to_numpy(False)[:, None])
            )
        lists = columns[2:] if has_weights else columns[2:3]
        whole = np.ones(batch.num_rows, bool)
        for name in lists:
            whole &= pc.list_value_length(batch[name]).to_numpy() == shape.num_routes
        failed.append(("list length", batch, ~whole[:, None]))
        batch = batch.filter(pa.array(whole))
        ids, *weights = (
            batch[name].flatten().to_numpy().reshape(-1, len(shape.layers), shape.top_k)
            for name in lists
        )
        failed += [(name, batch, wrong) for name, wrong in _wrong_ids(ids, shape)]
        if weights:
            failed += [(name, batch, wrong) for name, wrong in _wrong_weights(weights[0])]
        for name, rows, wrong in failed:
            if num_tokens := int(wrong.any(axis=1).sum()):
                count = found[name].count if name in found else 0
                new = _first_wrong(name, file, rows, wrong, shape)
                found[name] = replace(found.get(name, new), count=count + num_tokens)
    yield from found.values()


def _wrong_ids(ids: NDArray[Any], shape: MoeShape) -> Iterator[tuple[str, NDArray[Any]]]:
    """Each check of routes [tokens, layers, top_k], and where it fails [tokens, layers]."""
    yield "expert range", np.any(ids >= shape.num_experts, axis=2)
    yield "expert twice", np.any(np.diff(np.sort(ids, axis=2)) == 0, axis=2)


def _wrong_weights(weights: NDArray[Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    """The same for their gate weights."""
    weights = weights.astype(np.float32)  # numpy compares float16 slowly
    yield "weight", np.any(~np.isfinite(weights) | (weights < 0), axis=2)
    yield "weight order", np.any(weights[..., 1:] > weights[..., :-1], axis=2)


def _first_wrong(
    check: str, file: Path, rows: pa.RecordBatch, wrong: NDArray[Any], shape: MoeShape
) -> Problem:
    token, layer = (int(index) for index in np.argwhere(wrong)[0])
    where = f"position {rows['position'][token]}"
    if check != "list length":
        where += f", layer {shape.layers[layer]}"
    return Problem(check, _name(file), str(rows["request_id"][token]), f"at {where}")


def _check_across(path: StorePath, requests: list[StorePath]) -> Iterator[Problem]:
    """No request is there twice, and each of a pipeline-parallel engine is there in every stage.

    While a stage's writer is at it, or when it was killed, requests may lack that stage.
    """
    if not requests:
        return
    unfinished = [stage_of(writer)[1] for writer, state in _states(path) if state != "closed"]
    files = [(str(file), _name(file), *stage_of(file.name)) for file in requests]
    names = ["filename", "name", "stage", "stages"]
    table = pa.Table.from_pylist([dict(zip(names, file, strict=True)) for file in files])
    with closing(connect(path)) as con:
        con.register("files", table)
        try:
            found = con.execute(
                read_sql("verify_across"),
                {"files": [escape(file[0]) for file in files], "unfinished": unfinished},
            )
        except duckdb.Error as error:
            raise unreadable(path, error) from error
        problems: dict[tuple[str, str], Problem] = {}
        for check, file, request, what in found.fetchall():
            new = problems.get((check, file), Problem(check, file, request, what, count=0))
            problems[check, file] = replace(new, count=new.count + 1)
    yield from problems.values()


def _states(path: StorePath) -> list[tuple[str, str]]:
    try:
        return [(writer.writer, writer.state) for writer in read_writers(path)]
    except StoreError:  # `_check_counters` says so
        return []


def _count(counts: WriterCounters, tokens: Path, requests: Path) -> None:
    """Add what a pair of files has."""
    complete = pq.read_table(requests, columns=["complete"])["complete"]
    counts.files += 1
    counts.rows += pq.read_metadata(tokens).num_rows
    counts.requests += len(complete)
    counts.incomplete_requests += complete.to_pylist().count(False)
    counts.bytes += tokens.stat().st_size + requests.stat().st_size


def _check_counters(path: StorePath, there: dict[str, WriterCounters]) -> Iterator[Problem]:
    """Compare writers/*.json with the files; a writer that is still open may be behind them."""
    try:
        writers = read_writers(path)
    except StoreError as error:
        yield Problem("writers", "writers", None, str(error))
        return
    there = dict(there)
    for said in writers:
        found = there.pop(said.writer, WriterCounters(said.writer))
        differ = [
            f"{name} {getattr(said, name):,} there, {getattr(found, name):,} in the files"
            for name in ("files", "rows", "requests", "incomplete_requests", "bytes")
            if getattr(said, name) != getattr(found, name)
        ]
        if differ and said.state != "open":
            yield Problem("counters", f"writers/{said.writer}.json", None, "; ".join(differ))
    for writer, found in there.items():
        what = f"is missing, but the writer has {found.files:,} files"
        yield Problem("writers", f"writers/{writer}.json", None, what)
