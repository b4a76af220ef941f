"""The masks that a server knows, on disk: versions that never change, and what is in force.

    DIR/NAME/VERSION.json   a mask; versions are 1, 2, ... and stay when the name is deleted, since
                            traces that name them should remain explicable
    DIR/state.json          the global mask's key, and up to which version each name is deleted
    DIR/audit.jsonl         one line a change (audit.py)
    DIR/.lock               held while a server uses the folder

Files are written aside and renamed. A change writes its file first and its line after it; if a
crash comes between, the next start finds the difference and logs it.
"""

import fcntl
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moescope.server.audit import AuditLog, State, replay
from moescope.server.errors import ConflictError, UnknownError
from moescope.tracer.errors import InputError, StoreError
from moescope.tracer.mask import Mask, read_mask
from moescope.tracer.mask_format import check_name
from moescope.tracer.store_files import write_json

_RESERVED = ("state.json", "audit.jsonl")
_KEY = re.compile(r"(?P<name>[^@]+)(?:@(?P<version>[1-9][0-9]{0,8}))?")


@dataclass(frozen=True, slots=True)
class StoredMask:
    """One version of a mask."""

    name: str
    version: int
    mask: Mask

    @property
    def key(self) -> str:
        """How requests, traces and the audit log name it."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class RegistryCopy:
    """A registry in plain values, that can be sent to another machine."""

    state: State
    masks: dict[tuple[str, int], dict[str, Any]]


class Registry:
    """The masks in a folder, which is made if there is none.

    StoreError when another server uses the folder or a file of it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / ".lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise StoreError(
                f"another server uses the masks in {folder}: stop it, or name another --masks"
            ) from None
        self._audit = AuditLog(folder / "audit.jsonl")
        self._masks = _read_masks(folder)
        self.state = self._recover()

    def close(self) -> None:
        """Let another server use the folder."""
        self._lock.close()

    def all(self) -> list[StoredMask]:
        """The last version of every mask, by name."""
        names = sorted(name for name in self.state.latest if self.state.current(name))
        return [self.get(name) for name in names]

    def versions(self, name: str) -> list[int]:
        """The versions of a mask that can be asked for."""
        first = self.state.deleted.get(name, 0) + 1
        numbers = range(first, self.state.latest.get(name, 0) + 1)
        return [number for number in numbers if (name, number) in self._masks]

    def get(self, name: str, version: int | None = None) -> StoredMask:
        """A mask, in its last version if none is said; UnknownError if it isn't there."""
        number = find_version(self.state, name, version)
        mask = self._masks.get((name, number))
        if mask is None:
            raise _no_version(name, number, self.versions(name))
        return StoredMask(name, number, mask)

    def resolve(self, text: str) -> StoredMask:
        """The mask that "NAME" or "NAME@VERSION" means; InputError if it is neither."""
        return self.get(*read_key(text))

    def content(self, name: str, version: int) -> Mask:
        """A version as it was put, also of a name that was deleted; StoreError if its file is gone.

        What requests still run under, and what a copy of the registry needs to have.
        """
        mask = self._masks.get((name, version))
        if mask is None:
            raise StoreError(
                f"{self._folder / name / f'{version}.json'} is gone: restore it from a backup"
            )
        return mask

    def copy(self) -> "RegistryCopy":
        """All of it, for `write_copy`."""
        return RegistryCopy(self.state, {key: _as_json(mask) for key, mask in self._masks.items()})

    def put(self, mask: Mask, who: str) -> tuple[StoredMask, bool]:
        """Add a version, unless the last one is the same; returns it, and whether it is new."""
        name = mask.name
        if name.lower() in _RESERVED:
            raise InputError(f"{name!r} can't be a mask's name here: choose another")
        before = self.state.current(name)
        if before is not None:
            there = self.get(name)
            if there.mask == mask:
                return there, False
        version = self.state.latest.get(name, 0) + 1
        stored = StoredMask(name, version, mask)
        with _writing(self._folder):
            folder = self._folder / name
            folder.mkdir(exist_ok=True)
            write_json(folder / f"{version}.json", _as_json(mask), replace=False)
            self._audit.append(who, "put", name, before, stored.key)
        self._masks[name, version] = mask
        self.state = self.state.put(name, version)
        return stored, True

    def delete(self, name: str, who: str) -> str:
        """Remove a mask for requests that come; returns the key of its last version."""
        key = self.get(name).key
        if self.state.steering is not None and self.state.steering.rpartition("@")[0] == name:
            raise ConflictError(
                f"{self.state.steering} is the global mask: DELETE /v1/steering, or PUT another "
                "one there, first"
            )
        self._change(self.state.delete(name), who, "delete", name, key, None)
        return key

    def set_steering(self, key: str | None, who: str) -> None:
        """Keep the global mask; what is kept already is no change."""
        if key != self.state.steering:
            self._change(self.state.steer(key), who, "steering", None, self.state.steering, key)

    def _change(
        self,
        state: State,
        who: str,
        what: str,
        name: str | None,
        before: str | None,
        after: str | None,
    ) -> None:
        with _writing(self._folder):
            self._save(state)
            self._audit.append(who, what, name, before, after)
        self.state = state

    def _save(self, state: State) -> None:
        _write_state(self._folder, state)

    def _recover(self) -> State:
        """The state that the files show; where the log says otherwise, it is told so."""
        logged = replay(self._audit.lines())
        found = _read_state(self._folder / "state.json")
        latest: dict[str, int] = {}
        for name, version in self._masks:
            latest[name] = max(version, latest.get(name, 0))
        state = replace(found, latest=latest)
        for name, version in logged.latest.items():
            if version > latest.get(name, 0):
                # Its file is gone. Its number must not come again, so the name counts as deleted.
                state = state.put(name, version).delete(name)
        if state.steering is not None:
            name, _, number = state.steering.rpartition("@")
            if not (number.isdigit() and state.has(name, int(number))):
                raise StoreError(
                    f"the global mask {state.steering} is not in {self._folder}: restore its "
                    'file, or write "steering": null into state.json'
                )
        if state != logged:
            with _writing(self._folder):
                self._save(state)
                self._audit.append("recovery", "recover", None, logged, state)
        return state


def read_key(text: str) -> tuple[str, int | None]:
    """("calm", 2) of "calm@2" and ("calm", None) of "calm"; InputError if it is neither."""
    parts = _KEY.fullmatch(text)
    if parts is None:
        raise InputError(f"{text!r} names no mask: use NAME or NAME@VERSION (a number from 1)")
    version = parts["version"]
    return check_name(parts["name"]), None if version is None else int(version)


def find_version(state: State, name: str, version: int | None) -> int:
    """The version that is meant, the last one if none is said; UnknownError if it isn't there."""
    if state.current(name) is None:
        raise UnknownError(f"there is no mask {name}: GET /v1/masks lists those there are")
    last = state.latest[name]
    number = last if version is None else version
    if not state.has(name, number):
        raise _no_version(name, number, range(state.deleted.get(name, 0) + 1, last + 1))
    return number


def resolve_key(state: State, text: str) -> str:
    """The key that "NAME" or "NAME@VERSION" means; InputError or UnknownError if there is none."""
    name, version = read_key(text)
    return f"{name}@{find_version(state, name, version)}"


def write_copy(folder: Path, copy: RegistryCopy) -> None:
    """Make a folder of masks that a `Registry` opens as the same masks, versions and state."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for (name, version), data in copy.masks.items():
            (folder / name).mkdir(exist_ok=True)
            write_json(folder / name / f"{version}.json", data)
        _write_state(folder, copy.state)
        # So that it knows the numbers of versions whose files are gone.
        AuditLog(folder / "audit.jsonl").append("copy", "recover", None, State(), copy.state)


def _as_json(mask: Mask) -> dict[str, Any]:
    return mask.model_dump(mode="json", exclude_none=True)


def _write_state(folder: Path, state: State) -> None:
    write_json(folder / "state.json", {"steering": state.steering, "deleted": state.deleted})


def _no_version(name: str, version: int, there: Iterable[int]) -> UnknownError:
    return UnknownError(f"mask {name} has no version {version}, only {', '.join(map(str, there))}")


def _read_masks(folder: Path) -> dict[tuple[str, int], Mask]:
    masks = {}
    for file in sorted(folder.glob("[!.]*/[!.]*.json")):
        if not re.fullmatch(r"[1-9][0-9]*", file.stem):
            raise StoreError(f"{file} is no version of a mask: its name must be a number")
        mask = read_mask(file)
        if mask.name != file.parent.name:
            raise StoreError(f"{file} holds the mask {mask.name}, of another name than its folder")
        masks[mask.name, int(file.stem)] = mask
    return masks


def _read_state(file: Path) -> State:
    try:
        data = json.loads(file.read_text())
        return State(deleted=dict(data["deleted"]), steering=data["steering"])
    except FileNotFoundError:
        return State()
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{file} is damaged ({error}): restore it from a backup") from None


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"can't write to the masks' folder {folder}: {error.strerror}") from error
