"""How files come into a store whole, here and in object storage.

    FolderFiles    written aside under a dotted name, fsynced, renamed, again and again while the
                   disk is full; a lock says that we live
    ObjectFiles    sent at once, again and again while the network is away; counters that are
                   written anew every minute say that we live

Both have the same methods, and store.py does not care which it has.
"""

import errno
import fcntl
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_delay,
    wait_random_exponential,
)

from moescope.tracer.errors import StoreError
from moescope.tracer.object_path import ObjectPath, StorePath
from moescope.tracer.object_storage import explained, is_refusal

logger = logging.getLogger("moescope")

# How long a writer waits for the disk to have room or the network to be back, once it has begun.
PATIENCE_S = 600.0
_BEAT_S = 60.0
# A writer of which nothing was seen for so long is taken for gone by those who wait for it.
SILENT_S = 5 * _BEAT_S
_MAX_WAIT_S = 30.0
_MAY_PASS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}


class StoreFiles(Protocol):
    """Writes the files of a store."""

    def prepare(self, folders: Iterable[Any]) -> None:
        """Make the folders, where there is such a thing."""

    def get_text(self, file: Any) -> str:
        """Read a small file."""

    def put_table(self, file: Any, table: pa.Table, options: dict[str, Any]) -> int:
        """Write a Parquet file; returns its bytes."""

    def put_json(self, file: Any, data: dict[str, Any], *, replace: bool = True) -> None:
        """Write a JSON file; without `replace` an existing file is left as it is."""

    def claim(self, counters: Any) -> None:
        """Begin to show that the writer of this counters file lives."""

    def release(self) -> None:
        """End it."""


def store_files(path: StorePath, patience_s: float = PATIENCE_S) -> StoreFiles:
    """The files of the store at `path`."""
    return (ObjectFiles if isinstance(path, ObjectPath) else FolderFiles)(patience_s)


class _Insistent:
    """Does again what may yet succeed: when there is room on the disk, or the network is back.

    Until `claim`, an error is raised at once: whoever starts an engine wants to know. After it
    there are rows to lose, and we try for `patience_s`.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s, self._claimed = patience_s, False

    def _may_pass(self, error: BaseException) -> bool:
        """Whether the same may succeed later."""
        raise NotImplementedError

    def _explained(self, error: OSError, file: Any) -> OSError | StoreError:
        """The error to raise or to show, with what to do."""
        raise NotImplementedError

    def _insist(self, what: str, file: Any, do: Callable[[], Any]) -> Any:
        """What `do` gives; it is done again while that can help."""
        began = time.monotonic()

        def say(state: RetryCallState) -> None:
            logger.warning(
                "%s Trying again for %.0f s; rows wait in the ring.",
                self._explained(state.outcome.exception(), file),  # type: ignore[arg-type,union-attr]
                max(0.0, self._patience_s - (time.monotonic() - began)),
            )

        trying = Retrying(
            retry=retry_if_exception(lambda e: isinstance(e, OSError) and self._may_pass(e)),
            stop=stop_after_delay(self._patience_s if self._claimed else 0),
            wait=wait_random_exponential(multiplier=1, max=_MAX_WAIT_S),
            before_sleep=say,
            reraise=True,
        )
        try:
            return trying(do)
        except OSError as error:
            if not self._claimed:
                explained = self._explained(error, file)
                raise explained from (error if explained is not error else None)
            passes = self._may_pass(error)
            self._patience_s = 0  # whatever else is tried on the way out
            tried = f" in {time.monotonic() - began:.0f} s" if passes else ""
            raise StoreError(
                f"could not {what} {file}{tried}: {self._explained(error, file)} The rows that "
                "were not written are lost; what the store has is whole."
            ) from error


class FolderFiles(_Insistent):
    """Files of a folder."""

    def __init__(self, patience_s: float) -> None:
        super().__init__(patience_s)
        self._lock: Any = None
        self._lock_file = Path()

    def _may_pass(self, error: BaseException) -> bool:
        return isinstance(error, OSError) and error.errno in _MAY_PASS

    def _explained(self, error: OSError, file: Path) -> OSError | StoreError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StoreError(f"there is no room for {file}: free some on its disk.")
        return error

    def prepare(self, folders: Iterable[Path]) -> None:
        """Make the folders."""
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)

    def get_text(self, file: Path) -> str:
        """Read a small file."""
        return file.read_text()

    def put_table(self, file: Path, table: pa.Table, options: dict[str, Any]) -> int:
        """Write a Parquet file; returns its bytes."""
        return int(self._insist("write", file, lambda: _write_table(file, table, options)))

    def put_json(self, file: Path, data: dict[str, Any], *, replace: bool = True) -> None:
        """Write a JSON file; without `replace` an existing file is left as it is."""
        self._insist("write", file, lambda: write_json(file, data, replace=replace))

    def claim(self, counters: Path) -> None:
        """Hold a lock beside the counters, which the kernel lets go when we die."""
        self._claimed = True
        # Locked before it gets its name, so that nobody takes it for a dead writer's.
        lock = counters.with_suffix(".lock")
        aside = lock.with_name(f".{lock.name}")
        self._lock = aside.open("x")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        aside.rename(lock)
        self._lock_file = lock

    def release(self) -> None:
        """Take the lock away."""
        self._lock_file.unlink(missing_ok=True)
        self._lock.close()


class ObjectFiles(_Insistent):
    """Objects of a bucket. Before a writer gives up, pyarrow has tried a few times each time."""

    def __init__(self, patience_s: float) -> None:
        super().__init__(patience_s)
        self._counters: ObjectPath | None = None
        self._said = b""  # the counters as they were put last
        self._mutex, self._ended = threading.Lock(), threading.Event()
        self._beats = threading.Thread(target=self._beat, name="moescope-heartbeat", daemon=True)

    def prepare(self, folders: Iterable[ObjectPath]) -> None:
        """Do nothing: a bucket has no folders."""

    def get_text(self, file: ObjectPath) -> str:
        """Read a small file."""
        return str(self._insist("read", file, file.get).decode())

    def put_table(self, file: ObjectPath, table: pa.Table, options: dict[str, Any]) -> int:
        """Write a Parquet file; returns its bytes."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, **options)
        data = sink.getvalue()
        self._put(file, data)
        return len(data)

    def put_json(self, file: ObjectPath, data: dict[str, Any], *, replace: bool = True) -> None:
        """Write a JSON file; without `replace` one that was there a moment ago is left."""
        text = (json.dumps(data, indent=1) + "\n").encode()
        with self._mutex:
            if replace or not file.exists():
                self._put(file, text)
            if file == self._counters:
                self._said = text

    def claim(self, counters: ObjectPath) -> None:
        """Put the counters again every minute: their time says when we last lived."""
        self._counters, self._claimed = counters, True
        self._beats.start()

    def release(self) -> None:
        """End that."""
        self._ended.set()
        self._beats.join()

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_S):
            with self._mutex:
                if self._counters is None or not self._said or self._ended.is_set():
                    continue
                try:
                    self._counters.put(self._said)
                except (OSError, StoreError) as error:  # the next commit says so, and tries longer
                    logger.warning("no sign of life in %s: %s", self._counters, error)

    def _put(self, file: ObjectPath, data: Any) -> None:
        self._insist("write", file, lambda: file.put(data))

    def _may_pass(self, error: BaseException) -> bool:
        return isinstance(error, OSError) and not is_refusal(error)

    def _explained(self, error: OSError, file: ObjectPath) -> StoreError:
        return explained(error, str(file))


def _write_table(file: Path, table: pa.Table, options: dict[str, Any]) -> int:
    """Write a Parquet file whole; returns its bytes."""
    aside = file.with_name(f".{file.name}")
    try:
        with aside.open("wb") as sink:
            pq.write_table(table, sink, **options)
            sink.flush()
            os.fsync(sink.fileno())
            size = sink.tell()
    except OSError:
        aside.unlink(missing_ok=True)  # it takes room that others may have
        raise
    aside.rename(file)
    _sync_folder(file.parent)
    return size


def write_json(file: Path, data: dict[str, Any], *, replace: bool = True) -> None:
    """Write a JSON file whole; without `replace` an existing file is left as it is."""
    aside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        with aside.open("w") as sink:
            json.dump(data, sink, indent=1)
            sink.write("\n")
            sink.flush()
            os.fsync(sink.fileno())
    except OSError:
        aside.unlink(missing_ok=True)
        raise
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
