"""The trace store: create, append whole files, mend after a crash.

    DIR/manifest.json              the format's version and the traced model; never changes
    DIR/tokens/W-000001.parquet    one row a token       \\  a pair: the requests file is renamed
    DIR/requests/W-000001.parquet  one row a request     /  into place last and commits both
    DIR/writers/W.json             counters of the writer W: what it wrote, what was dropped
    DIR/writers/W.lock             held (flock) while W lives

    W is a random name, and pSofN-NAME for stage S of an N-stage pipeline-parallel engine

Every file appears whole or not at all (store_files.py says how), so a reader never sees half a
file. A writer that was killed leaves at most a tokens file without its twin, which readers pass
over and the next writer removes. Counters are kept a writer each, not in the manifest: several
engines may write one store at the same time.

DIR can be in object storage (object_path.py). There are no locks there, and so nobody mends: a
writer that is slow can't be told from a dead one, and what it left hurts nobody. A living one puts
its counters again every minute.

The stages of a pipeline-parallel engine write each their own pairs of files: the same requests and
positions, and of the layers only their own. Readers join them (analysis/views.py).
"""

import fcntl
import json
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from moescope.tracer.errors import StoreError
from moescope.tracer.format import (
    FORMAT_VERSION,
    ModelFacts,
    Stage,
    requests_schema,
    tokens_schema,
)
from moescope.tracer.object_path import (
    ObjectPath,
    StorePath,
    Where,
    list_files,
    read_texts,
    store_path,
)
from moescope.tracer.store_files import PATIENCE_S, SILENT_S, store_files, write_json

_FOLDERS = ("tokens", "requests", "writers")
_MANIFEST = re.compile(r"manifest\.json|\.manifest\.json\..+")  # as it is, and written aside
_STAGED = re.compile(r"p(\d+)of(\d+)-")


@dataclass(slots=True)
class WriterCounters:
    """What one writer did to a store. `state` is open, closed or killed.

    `unfinished_requests` were running when their engine ended, or went with a killed writer; they
    are not in the store.
    `layers`: those that the writer has, if not all of the model's.
    """

    writer: str
    state: str = "open"
    files: int = 0
    rows: int = 0
    requests: int = 0
    incomplete_requests: int = 0
    dropped_rows: int = 0
    dropped_requests: int = 0
    unfinished_requests: int = 0
    bytes: int = 0
    layers: list[int] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; `layers` only if it says something."""
        out = asdict(self)
        return out if self.layers else {k: v for k, v in out.items() if k != "layers"}


def stage_of(name: str) -> tuple[int, int]:
    """(stage, stages) of a writer's or a file's name; (1, 1) where one process has all layers."""
    match = _STAGED.match(name)
    return (int(match[1]), int(match[2])) if match else (1, 1)


def read_manifest(path: Where) -> ModelFacts:
    """The traced model of the store at `path`; StoreError if there is no such store."""
    path = store_path(path)
    return _parse_manifest(path, (path / "manifest.json").read_text)


def _parse_manifest(path: StorePath, read: Callable[[], str]) -> ModelFacts:
    file = path / "manifest.json"
    try:
        data = json.loads(read())
    except FileNotFoundError:
        what = "folder" if isinstance(path, Path) else "place"
        raise StoreError(
            f"{path} is not a trace store: it has no manifest.json. Name a {what} that "
            "`moescope trace` or `moescope import` wrote."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{file} is damaged ({error}); restore it from a backup.") from None
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{path} has format version {version!r}; this moescope reads version "
            f"{FORMAT_VERSION}. Use the moescope release that wrote it."
        )
    try:
        return ModelFacts.from_json(data["model"])
    except (KeyError, TypeError) as error:
        raise StoreError(f"{file} lacks {error}; restore it from a backup.") from None


def committed_files(path: Where) -> tuple[list[StorePath], list[StorePath]]:
    """The committed (tokens, requests) files of a store, paired by index, oldest name first."""
    path = store_path(path)
    # In this order: a pair that comes meanwhile is whole, or not seen.
    requests = list_files(path / "requests", "[!.]*.parquet")
    there = {file.name: file for file in list_files(path / "tokens", "[!.]*.parquet")}
    missing = next((file.name for file in requests if file.name not in there), None)
    if missing is not None:
        raise StoreError(
            f"{path / 'tokens' / missing} is missing although {missing} is in requests/: "
            "restore it, or remove the requests file to give up its requests."
        )
    return [there[file.name] for file in requests], requests


def read_writers(path: Where) -> list[WriterCounters]:
    """The counters of every writer that the store has had."""
    path = store_path(path)
    files = list_files(path / "writers", "[!.]*.json")
    try:
        return [WriterCounters(**json.loads(text)) for text in read_texts(files)]
    except (json.JSONDecodeError, TypeError) as error:
        raise StoreError(f"{path / 'writers'} holds a damaged file: {error}") from None


def last_seen(path: Where) -> dict[str, float]:
    """When each writer's counters were written, in seconds since 1970."""
    files = (store_path(path) / "writers").glob("[!.]*.json")
    return {file.stem: file.stat().st_mtime for file in files}


def living_writers(path: Where) -> list[str]:
    """The writers that live: they hold their lock, or, in object storage, were seen lately.

    There, one that was killed is among them for five minutes more.
    """
    path = store_path(path)
    if isinstance(path, ObjectPath):
        seen, since = last_seen(path), time.time() - SILENT_S
        still_open = (each.writer for each in read_writers(path) if each.state == "open")
        return [writer for writer in still_open if seen.get(writer, 0) > since]
    return [lock.stem for lock, held in _locks(path, fcntl.LOCK_SH) if held]


class StoreWriter:
    """Appends to a trace store, which it creates if there is none.

    Raises StoreError when `path` is not a store and not empty, or is a store of another model.
    """

    def __init__(
        self,
        path: Where,
        facts: ModelFacts,
        *,
        writer: str | None = None,
        stage: Stage | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """`facts` are the whole model's; `stage`: of a pipeline, where this is one of several.

        What can't be written, since the disk is full or object storage is away, is tried again for
        `patience_s`.
        """
        self.path = store_path(path)
        self._facts = facts
        self._files = store_files(self.path, patience_s)
        # In object storage two may have made the manifest at once, each its own.
        self._sure = self._create_or_match() or isinstance(self.path, Path)
        self._name = name = writer or uuid.uuid4().hex[:12]
        shape = facts.shape
        self.counters = WriterCounters(name)
        if stage is not None:
            shape = stage.of(shape)
            self.counters.writer = f"p{stage.number}of{stage.count}-{name}"
            self.counters.layers = list(stage.layers)
        self._schemas = {
            "tokens": tokens_schema(shape, weights=facts.weights),
            "requests": requests_schema(),
        }
        self._counters_file = self.path / "writers" / f"{self.counters.writer}.json"
        self._closed = False
        self._files.claim(self._counters_file)
        self._save_counters()
        if isinstance(self.path, Path):
            _mend(self.path)

    @property
    def scratch(self) -> Path:
        """A folder for unnamed temporary files: the store's own, or the system's."""
        return self.path if isinstance(self.path, Path) else Path(tempfile.gettempdir())

    def commit(self, tokens: pa.Table, requests: pa.Table) -> None:
        """Write one pair of files; both appear, or neither counts."""
        if not self._sure:
            self._match()
            self._sure = True
        name = f"{self.counters.writer}-{self.counters.files + 1:06}.parquet"
        size = self._write("tokens", name, tokens) + self._write("requests", name, requests)
        counters = self.counters
        counters.files += 1
        counters.rows += tokens.num_rows
        counters.requests += requests.num_rows
        counters.incomplete_requests += requests["complete"].to_pylist().count(False)
        counters.bytes += size
        self._save_counters()

    def close(self) -> None:
        """Mark this writer closed; calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        self.counters.state = "closed"
        self._save_counters()
        self._files.release()

    def earlier(self, names: Iterable[str]) -> list[WriterCounters]:
        """The counters of other writers, named as `writer` is."""
        whole = self.counters.writer
        prefix = whole[: len(whole) - len(self._name)]
        by_name = {each.writer: each for each in read_writers(self.path)}
        return [by_name.get(prefix + name, WriterCounters(prefix + name)) for name in names]

    def amend(self, counters: WriterCounters) -> None:
        """Write the counters of another writer, which is dead."""
        file = self.path / "writers" / f"{counters.writer}.json"
        self._files.put_json(file, counters.to_json())

    def save_dropped(self, rows: int, requests: int) -> None:
        """Set the numbers of rows and of whole requests that never reached this writer."""
        counters = self.counters
        if (rows, requests) != (counters.dropped_rows, counters.dropped_requests):
            counters.dropped_rows, counters.dropped_requests = rows, requests
            self._save_counters()

    def save_unfinished(self, requests: int) -> None:
        """Set the number of requests that were running when the engine ended."""
        if requests != self.counters.unfinished_requests:
            self.counters.unfinished_requests = requests
            self._save_counters()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _create_or_match(self) -> bool:
        """Make the store, or check that this one is of our model; whether it was there."""
        path, there = self.path, True
        if path.is_file():
            raise StoreError(f"{path} is a file; a trace store is a folder: name another path.")
        if not (path / "manifest.json").exists():
            there = False
            # Another writer may be creating the same store: what it makes is no stranger's.
            names = [file.name for file in path.iterdir()] if path.exists() else []
            if any(name not in _FOLDERS and not _MANIFEST.fullmatch(name) for name in names):
                raise StoreError(
                    f"{path} is neither empty nor a trace store; name a new folder for the traces."
                )
            self._files.prepare(path / folder for folder in _FOLDERS)
            manifest = {
                "format_version": FORMAT_VERSION,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "model": self._facts.to_json(),
            }
            # Two engines may start at once: the first one's manifest stays, the other compares.
            self._files.put_json(path / "manifest.json", manifest, replace=False)
        self._match()
        return there

    def _match(self) -> None:
        file = self.path / "manifest.json"
        found = _parse_manifest(self.path, lambda: self._files.get_text(file))
        there, here = (each.to_json() | {"weights": each.weights} for each in (found, self._facts))
        # Another vLLM or another folder of the same model may go on in the same store.
        differ = [key for key in here if key not in ("engine", "model") and there[key] != here[key]]
        if differ:
            what = ", ".join(f"{key} {there[key]!r} there, {here[key]!r} here" for key in differ)
            raise StoreError(
                f"{self.path} holds traces of another model ({there['model']}: {what}); "
                "name another store."
            )

    def _write(self, folder: str, name: str, table: pa.Table) -> int:
        schema = self._schemas[folder]
        if table.schema != schema:
            table = table.cast(schema)
        options = _OPTIONS | (TOKENS_OPTIONS if folder == "tokens" else {})
        return self._files.put_table(self.path / folder / name, table, options)

    def _save_counters(self) -> None:
        self._files.put_json(self._counters_file, self.counters.to_json())


_OPTIONS: dict[str, Any] = {"compression": "zstd", "compression_level": 1}
# Chosen by measuring on real routing (docs/experiments.md).
TOKENS_OPTIONS: dict[str, Any] = {
    "row_group_size": 16_384,  # small enough to be encoded within the processor's cache
    "write_batch_size": 131_072,
    "use_dictionary": ["request_id", "segment", "mask", "expert_ids.list.element"],
    "column_encoding": {
        "position": "DELTA_BINARY_PACKED",
        "token_id": "PLAIN",
        # Byte-stream splitting would save 40 bytes a token here, but DuckDB can't read it.
        "gate_weights.list.element": "PLAIN",
    },
    "write_statistics": ["request_id", "position"],
}


def _mend(path: Path) -> None:
    """Clear up after writers that were killed: a lock that can be taken has no living owner."""
    for lock, held in _locks(path, fcntl.LOCK_EX):
        # Whoever closes or mends takes the name away first and lets the lock go after that.
        if not held and lock.exists():
            _mend_writer(path, lock.stem)
            lock.unlink()


def _locks(path: Path, kind: int) -> Iterator[tuple[Path, bool]]:
    """The writers' locks, and whether another holds it; else it is ours until the next one."""
    for lock in (path / "writers").glob("[!.]*.lock"):
        try:
            handle = lock.open()
        except FileNotFoundError:  # its writer has closed meanwhile
            continue
        with handle:
            try:
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                yield lock, True
            else:
                yield lock, False


def _mend_writer(path: Path, writer: str) -> None:
    requests = {file.name: file for file in (path / "requests").glob(f"{writer}-*.parquet")}
    for folder in ("tokens", "requests"):
        for aside in (path / folder).glob(f".{writer}-*"):
            aside.unlink()
    for file in (path / "tokens").glob(f"{writer}-*.parquet"):
        if file.name not in requests:
            file.unlink()
    counters_file = path / "writers" / f"{writer}.json"
    counters = WriterCounters(writer)
    if counters_file.exists():
        counters = WriterCounters(**json.loads(counters_file.read_text()))
    # A crash between the rename and the counters leaves these behind the files.
    counters.state = "killed"
    counters.files = len(requests)
    counters.rows = counters.requests = counters.incomplete_requests = counters.bytes = 0
    for name, file in requests.items():
        tokens = path / "tokens" / name
        complete = pq.read_table(file, columns=["complete"])["complete"].to_pylist()
        counters.rows += pq.read_metadata(tokens).num_rows
        counters.requests += len(complete)
        counters.incomplete_requests += complete.count(False)
        counters.bytes += file.stat().st_size + tokens.stat().st_size
    write_json(counters_file, counters.to_json())
