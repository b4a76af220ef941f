"""The machine's part of `moescope doctor`: memory, limits, the clock and the store's disk."""

import fcntl
import importlib.metadata
import math
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from moescope.clients.doctor import Check
from moescope.tracer.errors import InputError, StoreError
from moescope.tracer.format import MoeShape
from moescope.tracer.object_path import ObjectPath, StorePath
from moescope.tracer.settings import Settings, load_settings
from moescope.tracer.store import read_manifest

DEFAULT_SHAPE = MoeShape(tuple(range(1, 27)), 64, 6)  # DeepSeek-V2-Lite
# A gate weight after compression (of 2), if routing were random (docs/operations.md).
_WEIGHT_BYTES = 1.63
_GIB = 2**30
_FILE_BYTES = 48 << 20  # about 131,072 rows, the setting `file_rows`
_MEASURE_S = 1.0
_OPEN_FILES = 4096
_SKEW_S = 5.0
_NOTES = {
    "nfs": "flock must work there (NFS 4, or `local_lock=none`), and a sync waits for the server",
    "cifs": "its locks and links depend on the server",
    "smb": "its locks and links depend on the server",
    "9p": "its locks and links depend on the host",
    "fuse": "its locks and links depend on the program behind it",
    "tmpfs": "it is memory: the traces are gone with the machine",
    "ramfs": "it is memory: the traces are gone with the machine",
    "overlay": "it is a container's own layer, gone with the container: mount a volume there",
}


def stored_bytes(shape: MoeShape) -> int:
    """How many bytes a token takes on disk at most; real routing takes some per cent less."""
    id_bytes = math.log2(max(shape.num_experts, 2)) / 8
    return round(12 + shape.num_routes * (id_bytes + _WEIGHT_BYTES))


def check_machine(
    store: StorePath | None, shape: MoeShape | None, tokens_per_s: int
) -> Iterator[Check]:
    """Memory, limits and the clock; with a store's folder, its disk, which takes seconds.

    `shape`: the model's; the store's own if there is one, or else DeepSeek-V2-Lite's.
    """
    if shape is None and store is not None:
        with suppress(StoreError, OSError):
            shape = read_manifest(store).shape
    shape = shape or DEFAULT_SHAPE
    try:
        settings = load_settings()
        yield Check("settings", "ok", f"policy {settings.policy}, ring {settings.ring_mib} MiB")
        yield check_memory(settings, shape, tokens_per_s)
    except InputError as error:
        yield Check("settings", "fail", str(error), "correct the environment variable")
    yield check_shm()
    yield check_open_files()
    yield check_clock()
    needed = stored_bytes(shape) * tokens_per_s
    if isinstance(store, ObjectPath):
        yield _check_objects(store, needed)
    elif store is not None:
        yield from check_store(store, needed)


def check_memory(settings: Settings, shape: MoeShape, tokens_per_s: int) -> Check:
    """Whether the ring and the writer's rows find room in memory."""
    ring, free = settings.ring_mib << 20, _free_memory()
    rows = ring // shape.row_bytes
    found = (
        f"the ring's {settings.ring_mib:,} MiB hold {rows:,} tokens: {rows / tokens_per_s:.1f} s "
        f"at {tokens_per_s:,} tokens/s; {free / _GIB:.1f} GiB are free"
    )
    if ring > free:
        remedy = "lower MOESCOPE_RING_MIB, or give the container more memory"
        return Check("memory", "fail", found, remedy)
    if ring + (settings.writer_mib << 20) > free:
        remedy = (
            f"lower MOESCOPE_WRITER_MIB ({settings.writer_mib:,}) to what is left: rows of "
            "unfinished requests beyond it go to the disk"
        )
        return Check("memory", "warn", found, remedy)
    return Check("memory", "ok", found)


def check_shm(shm: Path = Path("/dev/shm")) -> Check:
    """Shared memory for vLLM's processes; the ring needs none of it (memfd)."""
    try:
        there = os.statvfs(shm)
    except OSError as error:
        remedy = f"mount a tmpfs on {shm}: vLLM's processes share memory there"
        return Check("shared memory", "fail", f"{shm}: {error.strerror}", remedy)
    size, free = there.f_blocks * there.f_frsize, there.f_bavail * there.f_frsize
    found = f"{shm} has {free / _GIB:.2f} of {size / _GIB:.2f} GiB free; the ring needs none of it"
    if free < _GIB:
        remedy = "engines on several GPUs need more: docker run --ipc=host, or --shm-size=8g"
        return Check("shared memory", "warn", found, remedy)
    return Check("shared memory", "ok", found)


def check_open_files() -> Check:
    """The limit of open files; every connection and every file of a query counts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"at most {soft:,}"
    if soft < _OPEN_FILES:
        most = "the administrator" if 0 <= hard < _OPEN_FILES else "`ulimit -n 65536` before"
        remedy = f"raise it ({most}): a busy server has a file open for each connection"
        return Check("open files", "warn", found, remedy)
    return Check("open files", "ok", found)


def check_clock() -> Check:
    """Whether the clock stands before the day on which moescope was installed."""
    with suppress(importlib.metadata.PackageNotFoundError):
        folder = getattr(importlib.metadata.distribution("moescope"), "_path", None)
        if isinstance(folder, Path) and folder.stat().st_mtime > time.time() + _SKEW_S:
            found = f"{time.strftime('%Y-%m-%d %H:%M')}, before moescope was installed"
            remedy = "set it (NTP): the audit log, the manifests and TLS go by it"
            return Check("clock", "fail", found, remedy)
    return Check("clock", "ok", time.strftime("%Y-%m-%d %H:%M:%S %z"))


def check_store(store: Path, bytes_per_s: float) -> Iterator[Check]:
    """The store's folder: what it is, what its file system can do, and whether it keeps up."""
    there = next((path for path in [store, *store.absolute().parents] if path.exists()), Path("/"))
    yield _look_at(store)
    kind = _file_system(there)
    try:
        with tempfile.TemporaryDirectory(prefix=".moescope-doctor-", dir=there) as name:
            folder = Path(name)
            yield _check_file_system(folder, kind)
            yield _check_skew(folder)
            yield _check_speed(folder, bytes_per_s)
    except OSError as error:
        remedy = "name another folder, mount it for writing, or change its owner"
        yield Check("store's disk", "fail", f"can't write to {there}: {error.strerror}", remedy)
        return
    yield _check_room(there, bytes_per_s)


def _check_objects(store: ObjectPath, bytes_per_s: float) -> Check:
    """Put an object of the size of the store's files, read it and remove it."""
    place, data = store / ".moescope-doctor", os.urandom(_FILE_BYTES)
    remedy = "see docs/object-stores.md for the endpoint, the credentials and what they must allow"
    try:
        started = time.monotonic()
        place.write_bytes(data)
        speed = _FILE_BYTES / (time.monotonic() - started)
        same = place.read_bytes() == data
        place.unlink()
    except (StoreError, OSError) as error:
        return Check("store", "fail", str(error), remedy)
    if not same:
        return Check("store", "fail", f"{store} gave other bytes than it was given", remedy)
    return _compare(speed, bytes_per_s, "put into the bucket")


def _look_at(store: Path) -> Check:
    if store.exists() and not store.is_dir():
        return Check("store", "fail", f"{store} is a file", "name a folder")
    if not store.exists() or not any(store.iterdir()):
        return Check("store", "ok", f"{store} will be made")
    if not (store / "manifest.json").exists():
        remedy = "name a new folder, or one that moescope made"
        return Check("store", "fail", f"{store} holds other things than traces", remedy)
    try:
        facts = read_manifest(store)
    except StoreError as error:
        return Check("store", "fail", str(error), "restore it, or name a new folder")
    return Check("store", "ok", f"traces of {facts.model} ({facts.architecture})")


def _check_file_system(folder: Path, kind: str) -> Check:
    """Do what a writer does: lock, link, rename, sync."""
    lock, linked = folder / "lock", folder / "linked"
    with lock.open("w") as one, lock.open("w") as other:
        try:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                works = False
            except BlockingIOError:
                works = True
        except OSError:
            works = False
    if not works:
        remedy = "put the store on a local disk: a writer's lock tells others that it lives"
        return Check("file system", "fail", f"{kind}: locks (flock) don't hold", remedy)
    try:
        os.link(lock, linked)
        linked.rename(folder / "renamed")
    except OSError as error:
        remedy = "put the store on a local disk: a manifest is made by a link"
        return Check("file system", "fail", f"{kind}: no links ({error.strerror})", remedy)
    note = next((text for name, text in _NOTES.items() if kind.startswith(name)), None)
    if note is not None:
        return Check("file system", "warn", kind, note)
    return Check("file system", "ok", f"{kind}: locks, links and renaming work")


def _check_skew(folder: Path) -> Check:
    """A file server with another clock than this machine's."""
    (folder / "now").touch()
    skew = (folder / "now").stat().st_mtime - time.time()
    if abs(skew) > _SKEW_S:
        remedy = "set both by NTP: ages of files are wrong here"
        return Check("disk's clock", "warn", f"{skew:+.0f} s from this machine's", remedy)
    return Check("disk's clock", "ok", "agrees with this machine's")


def _check_speed(folder: Path, bytes_per_s: float) -> Check:
    """Write and sync files of the size of the store's, and compare with what is needed."""
    data, number, started = os.urandom(_FILE_BYTES), 0, time.monotonic()
    while number == 0 or time.monotonic() - started < _MEASURE_S:
        with (folder / "data").open("wb") as sink:
            sink.write(data)
            sink.flush()
            os.fsync(sink.fileno())
        number += 1
    return _compare(number * _FILE_BYTES / (time.monotonic() - started), bytes_per_s, "with fsync")


def _compare(speed: float, bytes_per_s: float, how: str) -> Check:
    found = f"{speed / 1e6:,.0f} MB/s {how}; {bytes_per_s / 1e6:,.1f} MB/s are needed"
    remedy = "use a faster disk, trace fewer requests, or let MOESCOPE_POLICY=drop count the loss"
    if speed < bytes_per_s:
        return Check("write speed", "fail", found, remedy)
    if speed < 2 * bytes_per_s:
        return Check("write speed", "warn", found, remedy)
    return Check("write speed", "ok", found)


def _check_room(folder: Path, bytes_per_s: float) -> Check:
    there = os.statvfs(folder)
    free = there.f_bavail * there.f_frsize
    hours = free / bytes_per_s / 3600
    found = f"{free / 1e9:,.0f} GB free: {hours:,.1f} hours of tracing everything"
    remedy = "make room, or move old stores away (docs/operations.md, Retention)"
    if hours < 1:
        return Check("disk space", "fail", found, remedy)
    if hours < 24:
        return Check("disk space", "warn", found, remedy)
    return Check("disk space", "ok", found)


def _free_memory() -> int:
    """Bytes that can be used: what the machine has left, and what the container may still take."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    cgroup = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no limit, or no second version of cgroups
        most = int((cgroup / "memory.max").read_text())
        free = min(free, most - int((cgroup / "memory.current").read_text()))
    return free


def _file_system(path: Path) -> str:
    """The type of file system that a path is on, as the kernel names it."""
    best, kind, target = -1, "unknown", path.resolve()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        mount = Path(before.split()[4].replace("\\040", " "))
        if target.is_relative_to(mount) and len(mount.parts) >= best:
            best, kind = len(mount.parts), after.split()[0]
    return kind
