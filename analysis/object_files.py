"""A store's files in object storage, as DuckDB reads them.

DuckDB has an extension of its own for S3, which it would have to download. So it is given pyarrow's
file system instead, by fsspec's interface. It asks for a file's size and time again and again; they
are asked for once here, and a file is opened once, since files of a store never change.
"""

import io
import re
import threading
from datetime import UTC, datetime
from typing import Any

import duckdb
from fsspec import AbstractFileSystem  # type: ignore[import-untyped]

from moescope.tracer.object_path import ObjectPath, store_path

_NEVER = datetime(2000, 1, 1, tzinfo=UTC)


def register(con: duckdb.DuckDBPyConnection, store: ObjectPath) -> None:
    """Let a connection read the files of the store's kind of storage."""
    con.register_filesystem(ObjectFileSystem(store.scheme))


class ObjectFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """All files of `SCHEME://`, to read."""

    cachable = False  # by fsspec, for all connections

    def __init__(self, scheme: str) -> None:
        super().__init__()
        self.protocol = scheme
        self._opened: dict[str, Any] = {}
        self._mutex = threading.Lock()

    def glob(self, path: str, **_: Any) -> list[str]:
        """The path itself: the files of a store are named one by one, as `glob.escape` does it."""
        return [re.sub(r"\[([*?[])\]", r"\1", path)]

    def open(self, path: str, mode: str = "rb", **_: Any) -> "_Handle":
        """A file to read."""
        if mode != "rb":
            raise PermissionError(f"{path} is opened to be read only, not {mode!r}")
        return _Handle(self._file(path))

    def size(self, path: str) -> int:
        """Bytes of a file."""
        size: int = self._file(path).size()
        return size

    def modified(self, path: str) -> datetime:  # noqa: ARG002
        """The same for all files: they never change."""
        return _NEVER

    def exists(self, path: str, **_: Any) -> bool:
        """Whether there is such a file."""
        return self.isfile(path)

    def isfile(self, path: str) -> bool:
        """Whether there is such a file."""
        try:
            self._file(path)
        except FileNotFoundError:
            return False
        return True

    def _file(self, path: str) -> Any:
        file = self._opened.get(path)
        if file is None:
            where = store_path(path)
            assert isinstance(where, ObjectPath)
            opened = where.open_input()
            with self._mutex:
                file = self._opened.setdefault(path, opened)
        return file


class _Handle(io.RawIOBase):
    """One reader's place in a file that several read at once."""

    def __init__(self, file: Any) -> None:
        self._file, self._size, self._at = file, file.size(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def read(self, size: int = -1) -> bytes:
        wanted = self._size - self._at if size < 0 else size
        data: bytes = self._file.read_at(wanted, self._at)
        self._at += len(data)
        return data
