"""The trace store on disk: create, append whole files, mend after a crash.

    DIR/manifest.json              the format's version and the traced model; never changes
    DIR/tokens/W-000001.parquet    one row a token       \\  a pair: the requests file is renamed
    DIR/requests/W-000001.parquet  one row a request     /  into place last and commits both
    DIR/writers/W.json             counters of the writer W: what it wrote, what was dropped
    DIR/writers/W.lock             held (flock) while W lives

    W is a random name, and pSofN-NAME for stage S of an N-stage pipeline-parallel engine

Every file is written aside under a dotted name, fsynced and renamed, so a reader never sees half
a file. A writer that was killed leaves at most a tokens file without its twin, which readers pass
over and the next writer removes. Counters are kept a writer each, not in the manifest: several
engines may write one store at the same time.

The stages of a pipeline-parallel engine write each their own pairs of files: the same requests and
positions, and of the layers only their own. Readers join them (analysis/views.py).
"""

import fcntl
import json
import os
import re
import uuid
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

_FOLDERS = ("tokens", "requests", "writers")
_STAGED = re.compile(r"p(\d+)of(\d+)-")


@dataclass(slots=True)
class WriterCounters:
    """What one writer did to a store. `state` is open, closed or killed.

    `unfinished_requests` were running when their engine ended, and are not in the store.
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


def read_manifest(path: Path) -> ModelFacts:
    """The traced model of the store at `path`; StoreError if there is no such store."""
    file = path / "manifest.json"
    try:
        data = json.loads(file.read_text())
    except FileNotFoundError:
        raise StoreError(
            f"{path} is not a trace store: it has no manifest.json. Name a folder that "
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


def committed_files(path: Path) -> tuple[list[Path], list[Path]]:
    """The committed (tokens, requests) files of a store, paired by index, oldest name first."""
    requests = sorted((path / "requests").glob("[!.]*.parquet"))
    tokens = [path / "tokens" / file.name for file in requests]
    missing = next((file for file in tokens if not file.exists()), None)
    if missing is not None:
        raise StoreError(
            f"{missing} is missing although {missing.name} is in requests/: "
            "restore it, or remove the requests file to give up its requests."
        )
    return tokens, requests


def read_writers(path: Path) -> list[WriterCounters]:
    """The counters of every writer that the store has had."""
    files = sorted((path / "writers").glob("[!.]*.json"))
    try:
        return [WriterCounters(**json.loads(file.read_text())) for file in files]
    except (json.JSONDecodeError, TypeError) as error:
        raise StoreError(f"{path / 'writers'} holds a damaged file: {error}") from None


class StoreWriter:
    """Appends to a trace store, which it creates if there is none.

    Raises StoreError when `path` is not a store and not empty, or is a store of another model.
    """

    def __init__(
        self,
        path: Path,
        facts: ModelFacts,
        *,
        writer: str | None = None,
        stage: Stage | None = None,
    ) -> None:
        """`facts` are the whole model's; `stage`: of a pipeline, where this is one of several."""
        self.path = path
        self._create_or_match(facts)
        name, shape = writer or uuid.uuid4().hex[:12], facts.shape
        self.counters = WriterCounters(name)
        if stage is not None:
            shape = stage.of(shape)
            self.counters.writer = f"p{stage.number}of{stage.count}-{name}"
            self.counters.layers = list(stage.layers)
        self._schemas = {
            "tokens": tokens_schema(shape, weights=facts.weights),
            "requests": requests_schema(),
        }
        # Locked before it gets its name, so that nobody takes it for a dead writer's.
        lock = path / "writers" / f"{self.counters.writer}.lock"
        aside = lock.with_name(f".{lock.name}")
        self._lock = aside.open("x")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        aside.rename(lock)
        self._lock_file = lock
        self._save_counters()
        _mend(path)

    def commit(self, tokens: pa.Table, requests: pa.Table) -> None:
        """Write one pair of files; both appear, or neither counts."""
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
        if self._lock.closed:
            return
        self.counters.state = "closed"
        self._save_counters()
        self._lock_file.unlink(missing_ok=True)
        self._lock.close()

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

    def _create_or_match(self, facts: ModelFacts) -> None:
        path = self.path
        if path.exists() and not path.is_dir():
            raise StoreError(f"{path} is a file; a trace store is a folder: name another path.")
        if not (path / "manifest.json").exists():
            # Another writer may be creating the same store: what it makes is no stranger's.
            names = [file.name for file in path.iterdir()] if path.exists() else []
            if any(name not in _FOLDERS and "manifest.json" not in name for name in names):
                raise StoreError(
                    f"{path} is neither empty nor a trace store; name a new folder for the traces."
                )
            for folder in _FOLDERS:
                (path / folder).mkdir(parents=True, exist_ok=True)
            manifest = {
                "format_version": FORMAT_VERSION,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "model": facts.to_json(),
            }
            # Two engines may start at once: the first one's manifest stays, the other compares.
            write_json(path / "manifest.json", manifest, replace=False)
        there, here = (
            each.to_json() | {"weights": each.weights} for each in (read_manifest(path), facts)
        )
        # Another vLLM or another folder of the same model may go on in the same store.
        differ = [key for key in here if key not in ("engine", "model") and there[key] != here[key]]
        if differ:
            what = ", ".join(f"{key} {there[key]!r} there, {here[key]!r} here" for key in differ)
            raise StoreError(
                f"{path} holds traces of another model ({there['model']}: {what}); "
                "name another store."
            )

    def _write(self, folder: str, name: str, table: pa.Table) -> int:
        final, aside = self.path / folder / name, self.path / folder / f".{name}"
        schema = self._schemas[folder]
        options = TOKENS_OPTIONS if folder == "tokens" else {}
        with aside.open("wb") as sink:
            pq.write_table(
                table.cast(schema) if table.schema != schema else table,
                sink,
                compression="zstd",
                compression_level=1,
                **options,
            )
            sink.flush()
            os.fsync(sink.fileno())
            size = sink.tell()
        aside.rename(final)
        _sync_folder(final.parent)
        return size

    def _save_counters(self) -> None:
        file = self.path / "writers" / f"{self.counters.writer}.json"
        write_json(file, self.counters.to_json())


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


def write_json(file: Path, data: dict[str, Any], *, replace: bool = True) -> None:
    """Write a JSON file whole; without `replace` an existing file is left as it is."""
    aside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    with aside.open("w") as sink:
        json.dump(data, sink, indent=1)
        sink.write("\n")
        sink.flush()
        os.fsync(sink.fileno())
    if replace:
        aside.rename(file)
    else:
        try:
            os.link(aside, file)
        except FileExistsError:
            pass
        finally:
            aside.unlink()
    _sync_folder(file.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _mend(path: Path) -> None:
    """Clear up after writers that were killed: a lock that can be taken has no living owner."""
    for lock in (path / "writers").glob("[!.]*.lock"):
        try:
            handle = lock.open()
        except FileNotFoundError:  # its writer has closed meanwhile
            continue
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            # Whoever closes or mends takes the name away first and lets the lock go after that.
            if lock.exists():
                _mend_writer(path, lock.stem)
                lock.unlink()


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
