"""Questions with gold documents and answers, from the layouts that such data sets come in.

Each reader takes one row and gives its questions, or why one can't be used ("unanswerable").
docs/data.md shows a row of each layout.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from moescope.clients.sources import Source, objects
from moescope.tracer.errors import InputError


@dataclass(frozen=True, slots=True)
class Question:
    """An answerable question; `answer` is in one of its `documents`.

    `aliases` are the other texts that count as right, `distractors` the documents that the data
    set itself gives beside the gold ones.
    """

    example_id: str
    question: str
    answer: str
    documents: tuple[str, ...]
    distractors: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


Found = Iterator[Question | str]


@dataclass(frozen=True, slots=True)
class _Layout:
    """How to read one layout, and the columns (one of several sets) that tell it."""

    read: Callable[[dict[str, Any], int, str], Found]
    columns: tuple[frozenset[str], ...]
    expected: str


def read_questions(source: Source, layout: str) -> Found:
    """Every question of the source in that layout (a name that `layout_of` gave)."""
    for number, row in enumerate(source.rows, start=1):
        yield from LAYOUTS[layout].read(row, number, f"{source.name}, row {number}")


def layout_of(source: Source, wanted: str) -> str:
    """The layout's name: `wanted`, or for "auto" the one whose columns are there.

    Raises InputError, saying what was found and what is expected, if the columns fit none.
    """
    names = list(LAYOUTS) if wanted == "auto" else [wanted]
    for name in names:
        if any(columns <= source.columns for columns in LAYOUTS[name].columns):
            return name
    found = ", ".join(sorted(source.columns)) or "nothing"
    raise InputError(f"{source.name} holds objects with the fields: {found}. {expected(wanted)}")


def expected(layout: str) -> str:
    """What a file of that layout (or "auto") should hold, for errors."""
    if layout == "auto":
        return (
            f"Expected one of the layouts {', '.join(LAYOUTS)}; docs/data.md shows a row of each."
        )
    return f"Expected {LAYOUTS[layout].expected}"


def _squad(row: dict[str, Any], number: int, where: str) -> Found:
    if "paragraphs" not in row:
        yield _squad_question(row.get("context"), row)
        return
    del number
    for paragraph in objects(row["paragraphs"], "`paragraphs`", where, expected("squad")):
        for qa in objects(paragraph.get("qas"), "`qas`", where, expected("squad")):
            yield _squad_question(paragraph.get("context"), qa)


def _squad_question(document: Any, qa: dict[str, Any]) -> Question | str:
    answers = [] if qa.get("is_impossible") else _answers(qa)
    return _question(_id(qa, None), qa, answers, _documents(document))


def _hotpotqa(row: dict[str, Any], number: int, where: str) -> Found:
    del where
    titles = {title for title, _ in _pairs(row["supporting_facts"], "title", "sent_id")}
    gold: list[str] = []
    others: list[str] = []
    for title, sentences in _pairs(row["context"], "title", "sentences"):
        text = " ".join(_text(sentence) for sentence in sentences or [])
        (gold if title in titles else others).append(_titled(title, text))
    if _text(row.get("answer")).casefold() in ("yes", "no"):
        yield "with a yes/no answer"
        return
    yield _question(_id(row, number), row, _answers(row), gold, others)


def _triviaqa(row: dict[str, Any], number: int, where: str) -> Found:
    del where
    pages = _documents(row.get("entity_pages"), "wiki_context")
    pages += _documents(row.get("search_results"), "search_context")
    yield _open_question(row, number, pages)


def _nq(row: dict[str, Any], number: int, where: str) -> Found:
    del where
    passages = _documents(row.get("positive_ctxs"))
    for name in ("ctxs", "hard_negative_ctxs", "negative_ctxs", "context"):
        passages += _documents(row.get(name))
    yield _open_question(row, number, passages)


def _jsonl(row: dict[str, Any], number: int, where: str) -> Found:
    del where
    documents = _documents(row.get("documents")) or _documents(row.get("document"))
    others = _documents(row.get("distractors"))
    yield _question(_id(row, number), row, _answers(row), documents, others)


# In this order: HotpotQA's columns hold SQuAD's, and SQuAD's hold the flat one of "nq".
LAYOUTS = {
    "hotpotqa": _Layout(
        _hotpotqa,
        (frozenset({"question", "answer", "context", "supporting_facts"}),),
        "HotpotQA's format: `question`, `answer`, `context` (titles and their sentences) and "
        "`supporting_facts` (the titles of the gold documents).",
    ),
    "triviaqa": _Layout(
        _triviaqa,
        (
            frozenset({"question", "answer", "entity_pages"}),
            frozenset({"question", "answer", "search_results"}),
        ),
        "TriviaQA as on the hub: `question`, `answer` (`value`, `aliases`) and `entity_pages` "
        "(`wiki_context`) or `search_results` (`search_context`).",
    ),
    "squad": _Layout(
        _squad,
        (frozenset({"paragraphs"}), frozenset({"id", "context", "question"})),
        "SQuAD's format: an object whose `data` is a list of articles with `paragraphs`, each "
        "with `context` and `qas`; or a flat list (or lines) of objects with `id`, `context`, "
        "`question` and `answers`.",
    ),
    "jsonl": _Layout(
        _jsonl,
        tuple(
            frozenset({"question", answer, documents})
            for answer in ("answer", "answers")
            for documents in ("documents", "document")
        ),
        "lines of objects with `question`, `documents` (texts, or objects with `title` and "
        "`text`) and `answer`.",
    ),
    "nq": _Layout(
        _nq,
        tuple(
            frozenset({"question", answer, passages})
            for answer in ("answers", "answer")
            for passages in ("positive_ctxs", "ctxs", "context")
        ),
        "Natural Questions as retrievers use it: `question`, `answers` and `positive_ctxs` or "
        "`ctxs` (passages with `title` and `text`), or a `context`.",
    ),
}


def _question(
    example_id: str,
    row: dict[str, Any],
    answers: list[str],
    documents: list[str],
    distractors: list[str] | None = None,
) -> Question | str:
    """The question if it can be used: its answer is the first that is in a document."""
    question = _text(row.get("question"))
    if not example_id:
        return "without an id"
    if not documents:
        return "without a document"
    if not question:
        return "without a question"
    if not answers:
        return "unanswerable"
    if not answers[0]:
        return "with an empty answer"
    texts = [text.casefold() for text in documents]
    in_document = (a for a in answers if a and any(a.casefold() in text for text in texts))
    answer = next(in_document, None)
    if answer is None:
        return "whose answer is not in the document"
    aliases = tuple(dict.fromkeys(a for a in answers if a and a != answer))
    return Question(
        example_id, question, answer, tuple(documents), tuple(distractors or ()), aliases
    )


def _open_question(row: dict[str, Any], number: int, passages: list[str]) -> Question | str:
    """A question of retrieved passages: gold is the first that holds an answer.

    Distractors are those that hold none.
    """
    answers = _answers(row)
    texts = [passage.casefold() for passage in passages]
    gold: list[str] = []
    for answer in filter(None, answers):
        gold = [p for p, text in zip(passages, texts, strict=True) if answer.casefold() in text]
        if gold:
            break
    others = [
        passage
        for passage, text in zip(passages, texts, strict=True)
        if not any(answer and answer.casefold() in text for answer in answers)
    ]
    return _question(_id(row, number), row, answers, gold[:1] or passages[:1], others)


def _id(row: dict[str, Any], number: int | None) -> str:
    """The row's own id; without one its number, where the layout has none."""
    names = ("id", "example_id", "_id", "question_id")
    found = next((row[name] for name in names if row.get(name) not in (None, "")), None)
    if found is None:
        return "" if number is None else f"row-{number}"
    return str(found)


def _answers(row: dict[str, Any]) -> list[str]:
    """The answer texts: a text or number, a list of them or of objects, or an object of lists."""
    value = row.get("answers", row.get("answer"))
    if value is None:
        value = row.get("answer")
    if isinstance(value, dict) and "value" in value:  # TriviaQA
        value = [value["value"], *(value.get("aliases") or [])]
    elif isinstance(value, dict):  # flat SQuAD
        value = value.get("text")
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    return [_text(item.get("text") if isinstance(item, dict) else item) for item in values]


def _documents(value: Any, field: str = "text") -> list[str]:
    """The texts in it that are not blank: a text, a list of them, or of objects with titles.

    `datasets` writes a list of objects as an object of lists too.
    """
    if isinstance(value, dict):
        names = [name for name in ("title", field) if isinstance(value.get(name), list)]
        columns = [value[name] for name in names]
        value = (
            [dict(zip(names, row, strict=False)) for row in zip(*columns, strict=False)]
            if names
            else [value]
        )
    if not isinstance(value, list):
        value = [value]
    texts = []
    for item in value:
        if isinstance(item, dict) and _text(item.get(field)):
            texts.append(_titled(item.get("title"), item[field]))
        elif isinstance(item, str) and item.strip():
            texts.append(item)
    return texts


def _pairs(value: Any, first: str, second: str) -> list[tuple[Any, Any]]:
    """Two fields of each element, from an object of lists, a list of objects or of pairs."""
    if isinstance(value, dict):
        return list(zip(value.get(first) or [], value.get(second) or [], strict=False))
    pairs = []
    for item in value or []:
        if isinstance(item, dict):
            pairs.append((item.get(first), item.get(second)))
        elif isinstance(item, list) and len(item) == 2:
            pairs.append((item[0], item[1]))
    return pairs


def _titled(title: Any, text: str) -> str:
    return f"{title.strip()}\n{text}" if isinstance(title, str) and title.strip() else text


def _text(value: Any) -> str:
    """A text without the whitespace around it; a number as it is written."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value.strip() if isinstance(value, str) else ""
