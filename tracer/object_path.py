"""Where a store lives: a folder here, or a place in object storage that is used like one.

    store_path("traces")               a Path, and nothing is different from any other folder
    store_path("s3://bucket/traces")   an ObjectPath: what stores need of pathlib, over pyarrow's
    store_path("gs://bucket/traces")   file systems

An object appears whole or not at all, so nothing is written aside and renamed there: `write_bytes`
gives pyarrow all bytes at once. (A stream that is written bit by bit must not be used. Closing it
after an error completes the upload of what it has; and pyarrow has no way to abort one.)

docs/object-stores.md says where endpoints and credentials come from.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

from moescope.tracer.errors import InputError, StoreError
from moescope.tracer.object_storage import bucket_of, explained, filesystem, no_bucket

# One slash is what pathlib leaves of two.
_URL = re.compile(r"(s3|gs):/{1,2}(.*)", re.DOTALL)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}")

_AT_ONCE = 16
_COPY_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class ObjectStat:
    """Of an object: bytes, and when it was written (seconds since 1970)."""

    st_size: int
    st_mtime: float


@dataclass(frozen=True, slots=True, order=True)
class ObjectPath:
    """An object or a prefix in object storage; `key` is BUCKET/NAME/…, without slashes at its ends.

    Methods raise FileNotFoundError as pathlib's do, and StoreError for what is wrong with the
    bucket, the credentials or the network.
    """

    scheme: str
    key: str
    # Known of what a listing gave; objects of a store never change, but for its counters.
    known: ObjectStat | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}"

    def __truediv__(self, name: str) -> Self:
        return type(self)(self.scheme, f"{self.key}/{name}")

    @property
    def bucket(self) -> str:
        """The first part."""
        return bucket_of(str(self))

    @property
    def name(self) -> str:
        """The last part."""
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The last part without its suffix."""
        return Path(self.name).stem

    @property
    def parent(self) -> Self:
        """What is above; a bucket's is itself."""
        return type(self)(self.scheme, self.key.rpartition("/")[0] or self.key)

    def absolute(self) -> Self:
        """Itself: it is the same from everywhere."""
        return self

    def relative_to(self, other: "StorePath") -> str:
        """The part below `other`."""
        if isinstance(other, Path) or not str(self).startswith(f"{other}/"):
            raise ValueError(f"{self} is not in {other}")
        return str(self).removeprefix(f"{other}/")

    @property
    def filesystem(self) -> Any:
        """The `pyarrow.fs.FileSystem` whose path `key` is."""
        return filesystem(str(self))

    def stat(self) -> ObjectStat:
        """Size and time; FileNotFoundError if there is no such object."""
        if self.known is not None:
            return self.known
        info = self._info()
        if info.size is None:
            raise FileNotFoundError(f"there is no object {self}")
        return _stat(info)

    def exists(self) -> bool:
        """Whether it is an object, or objects lie below it."""
        return self._info().type.name != "NotFound"

    def is_file(self) -> bool:
        """Whether it is an object."""
        return self._info().type.name == "File"

    def is_dir(self) -> bool:
        """Whether objects lie below it."""
        return self._info().type.name == "Directory"

    def iterdir(self) -> Iterator[Self]:
        """What lies directly below it, in no order; nothing if nothing does."""
        from pyarrow.fs import FileSelector

        with self._explained():
            infos = self.filesystem.get_file_info(FileSelector(self.key, allow_not_found=True))
        if not infos:
            self.check_bucket()
        for info in infos:
            known = None if info.size is None else _stat(info)
            yield type(self)(self.scheme, info.path.strip("/"), known)

    def glob(self, pattern: str) -> Iterator[Self]:
        """The objects directly below it whose names match."""
        for each in self.iterdir():
            if each.known is not None and fnmatchcase(each.name, pattern):
                yield each

    def open_input(self) -> Any:
        """A `pyarrow.NativeFile` to read from anywhere; FileNotFoundError if there is none."""
        with self._explained():
            try:
                return self.filesystem.open_input_file(self.key)
            except FileNotFoundError:
                self.check_bucket()
                raise

    def read_bytes(self) -> bytes:
        """All of it."""
        with self._explained():
            try:
                return self.get()
            except FileNotFoundError:
                self.check_bucket()
                raise

    def get(self) -> bytes:
        """As `read_bytes`, but with pyarrow's own errors, of which `is_refusal` knows some."""
        with self.filesystem.open_input_file(self.key) as file:
            data: bytes = file.read()
            return data

    def read_text(self) -> str:
        """All of it, as UTF-8."""
        return self.read_bytes().decode()

    def download(self, target: Path) -> None:
        """Copy it to a file here."""
        with self.open_input() as file, target.open("wb") as sink, self._explained():
            shutil.copyfileobj(file, sink, _COPY_BYTES)

    def write_bytes(self, data: Any) -> None:
        """Put an object there, whole, in the place of another; `data` is bytes or a buffer."""
        try:
            self.put(data)
        except OSError as error:
            raise explained(error, str(self)) from error

    def put(self, data: Any) -> None:
        """As `write_bytes`, but with pyarrow's own errors, of which `is_refusal` knows some."""
        with self.filesystem.open_output_stream(self.key) as stream:
            stream.write(data)

    def unlink(self) -> None:
        """Remove the object; FileNotFoundError if there is none."""
        with self._explained():
            self.filesystem.delete_file(self.key)

    def check_bucket(self) -> None:
        """StoreError if there is no such bucket, or it can't be seen."""
        with self._explained():
            if self.filesystem.get_file_info(self.bucket).type.name == "NotFound":
                raise StoreError(no_bucket(str(self)))

    def _info(self) -> Any:
        with self._explained():
            info = self.filesystem.get_file_info(self.key)
        if info.type.name == "NotFound":
            self.check_bucket()
        return info

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise explained(error, str(self)) from error


StorePath = Path | ObjectPath
Where = str | os.PathLike[str] | ObjectPath


def store_path(where: Where) -> StorePath:
    """The place that a text names; InputError if it is a URL of something else, or names no bucket.

    A Path made of a URL (`Path("s3://bucket/traces")`) is understood, too.
    """
    if isinstance(where, ObjectPath):
        return where
    text = os.fspath(where)
    match = _URL.fullmatch(text)
    if text.startswith("file:/"):
        raise InputError(f"{text!r}: name the folder itself, without file://.")
    if match is None:
        if not isinstance(where, Path) and _SCHEME.match(text):
            raise InputError(
                f"{text!r} is no place for a store: name a folder, s3://BUCKET/PATH or "
                "gs://BUCKET/PATH."
            )
        return Path(where)
    scheme, rest = match[1], match[2]
    key = "/".join(part for part in rest.split("/") if part)
    bucket = key.partition("/")[0]
    if "@" in bucket or ":" in bucket:
        raise InputError(
            f"the store's URL {scheme}://… holds a password or a port: credentials and the "
            "endpoint go into the environment (docs/object-stores.md)."
        )
    if not _BUCKET.fullmatch(bucket):
        raise InputError(
            f"{scheme}://{rest} names no bucket: write {scheme}://BUCKET/PATH (bucket names are "
            "of small letters, digits, dots and hyphens)."
        )
    return ObjectPath(scheme, key)


def list_files(folder: StorePath, pattern: str) -> list[StorePath]:
    """The files directly below a folder whose names match, by name."""
    files: list[StorePath] = [*folder.glob(pattern)]
    return sorted(files, key=lambda file: file.name)


def read_texts(files: Iterable[StorePath]) -> list[str]:
    """The texts of small files; objects are asked for side by side."""
    files = list(files)
    if not any(isinstance(file, ObjectPath) for file in files):
        return [file.read_text() for file in files]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda file: file.read_text(), files))


def check_bucket(where: Where | None) -> None:
    """StoreError if `where` lies in a bucket that is not there or can't be seen.

    For what takes minutes before it writes: loading a model.
    """
    if where is not None and isinstance(path := store_path(where), ObjectPath):
        path.check_bucket()


def for_pyarrow(file: StorePath) -> Any:
    """What pyarrow's Parquet functions read: a path here as it is, an object opened."""
    return file.open_input() if isinstance(file, ObjectPath) else file


def _stat(info: Any) -> ObjectStat:
    return ObjectStat(info.size, (info.mtime_ns or 0) / 1e9)
