"""The audit log: one line a change, from which the registry's state can be computed again.

{"when": "2026-05-04T12:00:00.123456+00:00", "who": "key:9f86d081", "what": "put",
 "name": "calm", "before": "calm@1", "after": "calm@2"}

what       before            after             meaning
put        key or null       key               a version was added to a name
delete     key               null              a name was deleted, with all its versions
steering   key or null       key or null       the global mask was changed
recover    state             state             the files were found to differ from this log
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moescope.tracer.errors import StoreError


@dataclass(frozen=True, slots=True)
class State:
    """What the registry holds, apart from the masks' contents.

    `latest` is each name's last version, ever; those up to `deleted` are gone. Numbers are never
    given twice, so that a key ("calm@2") means one mask for all time, in traces and caches too.
    """

    latest: dict[str, int] = field(default_factory=dict)
    deleted: dict[str, int] = field(default_factory=dict)
    steering: str | None = None

    def has(self, name: str, version: int) -> bool:
        """Whether this version may be asked for."""
        return self.deleted.get(name, 0) < version <= self.latest.get(name, 0)

    def current(self, name: str) -> str | None:
        """The key of the name's last version, if the name is there."""
        version = self.latest.get(name, 0)
        return f"{name}@{version}" if self.has(name, version) else None

    def put(self, name: str, version: int) -> "State":
        """The state with one more version."""
        return replace(self, latest=self.latest | {name: version})

    def delete(self, name: str) -> "State":
        """The state without the name."""
        return replace(self, deleted=self.deleted | {name: self.latest[name]})

    def steer(self, key: str | None) -> "State":
        """The state with another global mask."""
        return replace(self, steering=key)


def replay(lines: Iterable[dict[str, Any]]) -> State:
    """The state after all the changes."""
    state = State()
    for line in lines:
        match line["what"]:
            case "put":
                state = state.put(line["name"], split_key(line["after"])[1])
            case "delete":
                state = state.delete(line["name"])
            case "steering":
                state = state.steer(line["after"])
            case "recover":
                state = State(**line["after"])
            case other:
                raise StoreError(f"the audit log has a line of unknown kind {other!r}")
    return state


def split_key(key: str) -> tuple[str, int]:
    """("calm", 2) of "calm@2"."""
    name, _, version = key.rpartition("@")
    return name, int(version)


class AuditLog:
    """Appends lines to a file, each on disk before the change is answered."""

    def __init__(self, file: Path) -> None:
        self.file = file
        _cut_torn_line(file)

    def append(self, who: str, what: str, name: str | None, before: Any, after: Any) -> None:
        """Write one line."""
        when = datetime.now(UTC).isoformat(timespec="microseconds")
        line = {
            "when": when,
            "who": who,
            "what": what,
            "name": name,
            "before": asdict(before) if isinstance(before, State) else before,
            "after": asdict(after) if isinstance(after, State) else after,
        }
        with self.file.open("ab") as sink:
            sink.write(json.dumps(line).encode() + b"\n")
            sink.flush()
            os.fsync(sink.fileno())

    def lines(self) -> Iterator[dict[str, Any]]:
        """Every line, oldest first; StoreError if one is damaged."""
        if not self.file.exists():
            return
        with self.file.open("rb") as source:
            for number, text in enumerate(source, 1):
                try:
                    yield json.loads(text)
                except ValueError as error:
                    raise StoreError(
                        f"{self.file}, line {number}, is damaged ({error}): restore it from a "
                        "backup, or move the file away to begin a new log"
                    ) from None


def _cut_torn_line(file: Path) -> None:
    """Drop a last line that a crash left half written; its change was never answered."""
    if file.exists():
        data = file.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(file, whole)
