"""Questions with their documents and gold answers, from files in SQuAD's format or flattened."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moescope.tracer.errors import InputError

_EXPECTED = (
    "Expected SQuAD's format: an object whose `data` is a list of articles with `paragraphs`, each "
    "with `context` and `qas`; or a flat list (or lines) of objects with `id`, `context`, "
    "`question` and `answers`."
)


@dataclass(frozen=True, slots=True)
class Question:
    """An answerable question; `answer` is the first gold answer."""

    example_id: str
    document: str
    question: str
    answer: str


def read_squad(source: Path) -> Iterator[Question | str]:
    """Every question, or why it can't be used ("unanswerable").

    Raises InputError, saying what was found and what is expected, if `source` is something else.
    """
    for row in _rows(source):
        if "paragraphs" not in row:
            yield _question(row.get("context"), row)
            continue
        for paragraph in _objects(row["paragraphs"], "`paragraphs`", source):
            for qa in _objects(paragraph.get("qas"), "`qas`", source):
                yield _question(paragraph.get("context"), qa)


def _question(document: Any, qa: dict[str, Any]) -> Question | str:
    if qa.get("id") in (None, ""):
        return "without an id"
    if not isinstance(document, str) or not document.strip():
        return "without a document"
    question = qa.get("question")
    if not isinstance(question, str) or not question.strip():
        return "without a question"
    answers = _answers(qa)
    if qa.get("is_impossible") or not answers:
        return "unanswerable"
    if not answers[0].strip():
        return "with an empty answer"
    if answers[0].casefold() not in document.casefold():
        return "whose answer is not in the document"
    return Question(str(qa["id"]), document, question.strip(), answers[0].strip())


def _answers(qa: dict[str, Any]) -> list[str]:
    """The answer texts: a list of objects, an object of lists (flat files), or one string."""
    answers = qa.get("answers", qa.get("answer"))
    if isinstance(answers, str):
        return [answers]
    if isinstance(answers, dict):
        answers = answers.get("text")
    if not isinstance(answers, list):
        return []
    texts = [answer.get("text") if isinstance(answer, dict) else answer for answer in answers]
    return [text for text in texts if isinstance(text, str)]


def _rows(source: Path) -> Iterator[dict[str, Any]]:
    """The file's articles, or its flat rows.

    `datasets` caches what it reads; the cache goes into a folder that is deleted here.
    """
    nested = _is_nested(source)
    from datasets import load_dataset

    with TemporaryDirectory(prefix="moescope-") as cache, _quiet_and_offline():
        try:
            rows = load_dataset(
                "json",
                data_files=str(source.resolve()),
                field="data" if nested else None,
                split="train",
                cache_dir=cache,
            )
        except Exception as error:  # it raises whatever the reader underneath raised
            reason = str(error.__cause__ or error).splitlines()[0]
            raise InputError(f"{source} is not SQuAD's format: {reason}. {_EXPECTED}") from error
        columns = set(rows.column_names)
        if not ({"paragraphs"} <= columns or {"id", "context", "question"} <= columns):
            found = ", ".join(sorted(columns)) or "nothing"
            raise InputError(f"{source} holds objects with the fields: {found}. {_EXPECTED}")
        yield from rows


def _is_nested(source: Path) -> bool:
    """Whether the rows are in a field `data`; raises InputError if the file can't hold any."""
    try:
        text = source.read_text(encoding="utf-8-sig").strip()
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 text. {_EXPECTED}") from error
    except OSError as error:
        raise InputError(f"can't read {source}: {error.strerror}.") from error
    except json.JSONDecodeError as error:
        if text.startswith("{") and error.msg == "Extra data":
            return False  # lines of objects
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{source} is not JSON: {error.msg} ({where}). {_EXPECTED}") from error
    nested = isinstance(value, dict) and "data" in value
    rows = value["data"] if nested else value
    if nested or isinstance(rows, list):
        _objects(rows, "`data`" if nested else "its value", source)
        if not rows:
            raise InputError(f"{source} holds no article. {_EXPECTED}")
    elif not (isinstance(rows, dict) and "context" in rows):
        found = f"an object with {', '.join(rows)}" if isinstance(rows, dict) else text
        raise InputError(f"{source} holds {found[:200]}. {_EXPECTED}")
    return nested


def _objects(value: Any, name: str, source: Path) -> list[dict[str, Any]]:
    """`value` if it is a list of objects or absent; raises InputError otherwise."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise InputError(f"{source}: {name} is not a list of objects. {_EXPECTED}")
    return value


@contextmanager
def _quiet_and_offline() -> Iterator[None]:
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
