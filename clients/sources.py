"""Rows of a data set, with where they came from: a local file or a name on the hub.

    questions.json             a local file: JSON, JSON lines, CSV or Parquet, by its ending
    owner/name:config@split    a data set on the hub; `:config` and `@split` may be left out

`datasets` reads both. A local file needs no network; a hub name needs one, or the hub's cache.
"""

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moescope.tracer.errors import InputError

_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+?)(?::([\w.-]+))?(?:@([\w.\[\]:%-]+))?")
_READERS = {".csv": "csv", ".parquet": "parquet"}  # the others are JSON
_FILE_ENDINGS = (".json", ".jsonl", *_READERS)


@dataclass(frozen=True, slots=True)
class Source:
    """A data set, open for one reading; `origin` is what the data card says of it."""

    name: str
    columns: frozenset[str]
    rows: Iterable[dict[str, Any]]
    origin: dict[str, Any]


@contextmanager
def open_source(source: Path | str, expected: str) -> Iterator[Source]:
    """The rows of a file, or of a hub name if there is no such file.

    Raises InputError, ending in what is `expected`, if there are none to read.
    """
    path, hub_name = Path(source), _HUB_NAME.fullmatch(str(source))
    with _quietly():
        if path.exists() or not hub_name or path.suffix in _FILE_ENDINGS:
            with _local(path, expected) as opened:
                yield opened
        else:
            yield _from_hub(str(source), *hub_name.groups())


@contextmanager
def _local(path: Path, expected: str) -> Iterator[Source]:
    """`datasets` caches what it reads; the cache goes into a folder that is deleted here."""
    reader = _READERS.get(path.suffix, "json")
    options: dict[str, Any] = {}
    if reader == "json":
        options["field"] = "data" if _is_nested(path, expected) else None
    elif reader == "csv":
        options |= {"features": _all_text(path, expected), "keep_default_na": False}
    sha256 = sha256_of(path)
    from datasets import load_dataset

    with TemporaryDirectory(prefix="moescope-") as cache:
        try:
            rows = load_dataset(
                reader,
                data_files=str(path.resolve()),
                split="train",
                cache_dir=cache,
                **options,
            )
        except Exception as error:  # it raises whatever the reader underneath raised
            raise InputError(f"can't read rows in {path}: {_first_line(error)}. {expected}") from (
                error
            )
        origin = {"file": path.name, "sha256": sha256}
        yield Source(str(path), frozenset(rows.column_names), rows, origin)


def _from_hub(source: str, name: str, config: str | None, split: str | None) -> Source:
    """A data set of the hub, in the hub's own cache; without a split, its validation split."""
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(name, config)
        builder.download_and_prepare()
        splits = list(builder.info.splits or [])
        if split is None:
            split = next((s for s in ("validation", "train") if s in splits), splits[0])
        rows = builder.as_dataset(split=split)
    except Exception as error:  # network, cache, name, config, split: all of `datasets`' errors
        raise InputError(
            f"there is no file {source}, and the hub's data set {name} can't be read: "
            f"{_first_line(error)}. Without a network, name a local file (json, jsonl, csv or "
            "parquet); with one, check the name owner/name:config@split."
        ) from error
    origin = {
        "hub": name,
        "config": builder.config.name,
        "split": split,
        "revision": str(builder.base_path or "").rpartition("@")[2] or None,
        "fingerprint": getattr(rows, "_fingerprint", None),
        "licence": builder.info.license or _hub_licence(name),
    }
    return Source(source, frozenset(rows.column_names), rows, origin)


def _hub_licence(name: str) -> str | None:
    """What the head of the data set's README says, if the hub answers."""
    try:
        from huggingface_hub import DatasetCard

        licence = DatasetCard.load(name).data.license
    except Exception:  # the licence is worth a look, not a failure
        return None
    return ", ".join(licence) if isinstance(licence, list) else licence


def sha256_of(path: Path) -> str:
    """The file's SHA-256; raises InputError if it can't be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}.") from error


def _is_nested(path: Path, expected: str) -> bool:
    """Whether the rows are in a field `data`; raises InputError if the file can't hold any."""
    try:
        if path.suffix == ".jsonl":
            _check_lines(path, expected)
            return False
        text = path.read_text(encoding="utf-8-sig").strip()
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text. {expected}") from error
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}.") from error
    except json.JSONDecodeError as error:
        if text.startswith("{") and error.msg == "Extra data":
            _check_lines(path, expected)
            return False
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{path} is not JSON: {error.msg} ({where}). {expected}") from error
    nested = isinstance(value, dict) and "data" in value
    rows = value["data"] if nested else value
    if nested or isinstance(rows, list):
        objects(rows, "`data`" if nested else "its value", str(path), expected)
        if not rows:
            raise InputError(f"{path} holds no article. {expected}")
    elif not (isinstance(rows, dict) and "question" in rows):
        found = f"an object with {', '.join(rows)}" if isinstance(rows, dict) else text
        raise InputError(f"{path} holds {found[:200]}. {expected}")
    return nested


def _check_lines(path: Path, expected: str) -> None:
    value: Any = None
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            try:
                value = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                where = f"line {number}, column {error.colno}"
                raise InputError(f"{path} is not JSON: {error.msg} ({where}). {expected}") from (
                    error
                )
            if not isinstance(value, dict):
                raise InputError(f"{path}: line {number} is not an object. {expected}")
    if value is None:
        raise InputError(f"{path} is empty. {expected}")


def _all_text(path: Path, expected: str) -> Any:
    """Every column of a CSV as text: an id 007 and an answer 1066 stay what they are."""
    from datasets import Features, Value

    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file), [])
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text. {expected}") from error
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}.") from error
    if not header:
        raise InputError(f"{path} is empty. {expected}")
    return Features({name: Value("string") for name in header})


def objects(value: Any, name: str, where: str, expected: str) -> list[dict[str, Any]]:
    """`value` if it is a list of objects or absent; raises InputError otherwise."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise InputError(f"{where}: {name} is not a list of objects. {expected}")
    return value


def _first_line(error: Exception) -> str:
    text = str(error.__cause__ or error) or type(error).__name__
    return text.splitlines()[0].rstrip(".")


@contextmanager
def _quietly() -> Iterator[None]:
    """No progress bars, no log lines beside our own errors, and no count of loads sent out."""
    import datasets

    bars, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    counts = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()
