"""Pairs of requests that differ in their document only, from questions in SQuAD's format.

    with_doc      instruction, document, question  ──▶ the gold answer
    without_doc   instruction,           question  ──▶ the gold answer

The model is forced through the same answer both times, so that what differs between the two
traces is what the document did.
"""

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moescope.clients.job import DOCUMENT, INSTRUCTION, QUESTION
from moescope.clients.squad import Question, read_squad
from moescope.tracer.errors import InputError

WITH_DOC, WITHOUT_DOC = "with_doc", "without_doc"
DEFAULT_INSTRUCTION = "Answer the question in as few words as possible."


@dataclass(frozen=True, slots=True)
class Statistics:
    """What became of the questions: `questions` = kept + skipped + left out by `limit`."""

    questions: int
    kept: int
    lines: int
    skipped: dict[str, int]
    beyond_limit: int

    def __str__(self) -> str:
        text = f"{self.kept} of {self.questions} questions kept, {self.lines} lines written."
        if self.beyond_limit:
            text += f"\nLeft out by the limit: {self.beyond_limit}."
        if self.skipped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
            text += f"\nSkipped: {reasons}."
        return text


def make_faithfulness(
    source: Path,
    out: Path,
    *,
    limit: int | None = None,
    instruction: str = DEFAULT_INSTRUCTION,
    seed: int = 0,
    with_doc: str = WITH_DOC,
    without_doc: str = WITHOUT_DOC,
) -> Statistics:
    """Write the job `out` from the questions in `source`; an existing `out` is replaced.

    Unanswerable questions and the like are skipped and counted. `limit` keeps that many
    questions, drawn at random by `seed`, in the file's order. Raises InputError if `source`
    isn't SQuAD's format or holds no usable question, or if `out` can't be written.
    """
    if limit is not None and limit < 1:
        raise InputError(f"the limit must be 1 or more, not {limit}.")
    if with_doc == without_doc or not with_doc.strip() or not without_doc.strip():
        raise InputError("the two conditions need two names that differ and are not blank.")
    if out.resolve() == source.resolve():
        raise InputError(f"the job would overwrite its source {source}; name another file.")
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent} to write {out.name} into.")
    kept: list[Question] = []
    skipped: Counter[str] = Counter()
    ids: set[str] = set()
    for found in read_squad(source):
        if isinstance(found, str):
            skipped[found] += 1
        elif found.example_id in ids:
            skipped["with an id seen before"] += 1
        else:
            ids.add(found.example_id)
            kept.append(found)
    if not kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise InputError(f"{source} holds no question to use ({reasons or 'it is empty'}).")
    chosen = kept
    if limit is not None and limit < len(kept):
        chosen = [kept[i] for i in sorted(random.Random(seed).sample(range(len(kept)), limit))]
    _write(out, (_lines(q, instruction, with_doc, without_doc) for q in chosen))
    return Statistics(
        questions=len(kept) + skipped.total(),
        kept=len(chosen),
        lines=2 * len(chosen),
        skipped=dict(skipped.most_common()),
        beyond_limit=len(kept) - len(chosen),
    )


def _lines(question: Question, instruction: str, with_doc: str, without_doc: str) -> str:
    """The two job lines of one question."""
    asked = {"segment": QUESTION, "text": question.question}
    contents = {
        with_doc: [
            {"segment": INSTRUCTION, "text": f"{instruction}\n\nDocument: "},
            {"segment": DOCUMENT, "text": question.document},
            {"segment": INSTRUCTION, "text": "\n\nQuestion: "},
            asked,
        ],
        without_doc: [{"segment": INSTRUCTION, "text": f"{instruction}\n\nQuestion: "}, asked],
    }
    text = ""
    for condition, content in contents.items():
        line = {
            "example_id": question.example_id,
            "condition": condition,
            "messages": [
                {"role": "user", "content": content},
                {"role": "assistant", "content": question.answer},
            ],
        }
        text += json.dumps(line, ensure_ascii=False) + "\n"
    return text


def _write(out: Path, texts: Iterator[str]) -> None:
    """Write aside, then rename: `out` is never seen half written."""
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        try:
            with aside.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(texts)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(out)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"can't write the job {out}: {error.strerror}.") from error
