"""Pairs of requests that differ in their documents only, from questions with gold documents.

    with_doc      instruction, documents, question  ──▶ the gold answer
    without_doc   instruction,            question  ──▶ the gold answer

The model is forced through the same answer both times, so that what differs between the two
traces is what the documents did.

    source ──▶ questions ──▶ distractors ──▶ counterfactual ──▶ cut, ordered ──▶ job, data card
"""

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from moescope.clients.counterfactual import Answers, Swapped, place_of
from moescope.clients.data_card import card_path, write_card, write_whole
from moescope.clients.documents import (
    TOO_FEW,
    TOO_LONG,
    Cutter,
    Distractors,
    Document,
    Order,
    ordered,
)
from moescope.clients.job import DOCUMENT, INSTRUCTION, QUESTION
from moescope.clients.questions import Question, expected, layout_of, read_questions
from moescope.clients.sources import open_source
from moescope.tracer.errors import InputError

WITH_DOC, WITHOUT_DOC = "with_doc", "without_doc"
DISTRACTOR = "distractor"
DEFAULT_INSTRUCTION = "Answer the question in as few words as possible."
INSTRUCTIONS = {
    "open": DEFAULT_INSTRUCTION,
    "closed": "Answer the question from the document only, in as few words as possible. If the "
    "document does not hold the answer, say so.",
}

Format = Literal["auto", "squad", "hotpotqa", "nq", "triviaqa", "jsonl"]


@dataclass(frozen=True, slots=True)
class Options:
    """How pairs are made; the data card holds them all."""

    file_format: Format = "auto"
    instruction: str = "open"  # or "closed", or a text
    limit: int | None = None
    seed: int = 0
    distractors: int = 0
    document_order: Order = "gold-first"
    counterfactual: bool = False
    max_doc_tokens: int | None = None
    tokenizer: str | None = None
    with_doc: str = WITH_DOC
    without_doc: str = WITHOUT_DOC

    def check(self) -> None:
        """Raise InputError if a value is unusable."""
        for name, least in (("limit", 1), ("distractors", 0), ("max_doc_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"the {_option(name)} must be {least} or more, not {value}.")
        for name, kind in (("file_format", Format), ("document_order", Order)):
            if getattr(self, name) not in get_args(kind):
                raise InputError(
                    f"the {_option(name)} is one of {', '.join(get_args(kind))}, not "
                    f"{getattr(self, name)!r}."
                )
        names = (self.with_doc, self.without_doc)
        if names[0] == names[1] or not all(name.strip() for name in names):
            raise InputError("the two conditions need two names that differ and are not blank.")
        if (self.max_doc_tokens is None) != (self.tokenizer is None):
            raise InputError(
                "--max-doc-tokens and --tokenizer go together: how many tokens, and of which "
                "model (a folder or a hub name)."
            )


@dataclass(frozen=True, slots=True)
class Statistics:
    """What became of the questions: `questions` = kept + skipped + left out by `limit`.

    Of the kept, `kinds` counts the counterfactual answers; `documents_cut` were too long.
    """

    questions: int
    kept: int
    lines: int
    skipped: dict[str, int]
    beyond_limit: int
    kinds: dict[str, int]
    documents_cut: int

    def __str__(self) -> str:
        text = f"{self.kept} of {self.questions} questions kept, {self.lines} lines written."
        if self.beyond_limit:
            text += f"\nLeft out by the limit: {self.beyond_limit}."
        if self.skipped:
            text += f"\nSkipped: {_counts(self.skipped)}."
        if self.kinds:
            text += f"\nAnswers swapped: {_counts(self.kinds)}."
        if self.documents_cut:
            text += f"\nDocuments cut: {self.documents_cut}."
        return text


@dataclass(frozen=True, slots=True)
class _Example:
    """A question with all of its documents; `swapped` if its answer is not the true one."""

    question: Question
    documents: list[Document]
    swapped: Swapped | None
    num_cut: int


def make_faithfulness(
    source: Path | str, out: Path, options: Options | None = None, *, licence: str | None = None
) -> Statistics:
    """Write the job `out` and its data card from the questions in `source`; existing are replaced.

    `source` is a file or a name on the hub. Unanswerable questions and the like are skipped and
    counted. `limit` keeps that many questions, drawn at random by the seed, in the source's order.
    Counterfactual answers stand beside the true ones in `OUT.truth.jsonl`. Raises InputError if
    the source has another layout or holds no usable question, or if `out` can't be written.
    """
    options = options or Options()
    options.check()
    files = {out, truth_path(out), card_path(out)}
    if Path(source).resolve() in {path.resolve() for path in files}:
        raise InputError(f"the job would overwrite its source {source}; name another file.")
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent} to write {out.name} into.")
    skipped: Counter[str] = Counter()
    with open_source(source, expected(options.file_format)) as opened:
        layout = layout_of(opened, options.file_format)
        questions = list(_usable(read_questions(opened, layout), skipped))
        origin = {"format": layout, **opened.origin}
    kept = list(_examples(questions, options, skipped))
    if not kept:
        raise InputError(
            f"{source} holds no question to use ({_counts(skipped) or 'it is empty'})."
        )
    chosen = kept
    if options.limit is not None and options.limit < len(kept):
        draw = random.Random(options.seed)
        chosen = [kept[i] for i in sorted(draw.sample(range(len(kept)), options.limit))]
    statistics = Statistics(
        questions=len(kept) + skipped.total(),
        kept=len(chosen),
        lines=2 * len(chosen),
        skipped=dict(skipped.most_common()),
        beyond_limit=len(kept) - len(chosen),
        kinds=dict(Counter(e.swapped.kind for e in chosen if e.swapped).most_common()),
        documents_cut=sum(e.num_cut for e in chosen),
    )
    hashes = {out.name: write_whole(out, (_lines(example, options) for example in chosen))}
    if options.counterfactual:
        truth = truth_path(out)
        hashes[truth.name] = write_whole(truth, (_truth(e.swapped) for e in chosen if e.swapped))
    else:
        truth_path(out).unlink(missing_ok=True)  # it would tell of another job
    write_card(
        out,
        made_for="faithfulness",
        source=origin,
        licence=licence or origin.get("licence") or "not known; say it with --licence",
        options=asdict(options) | {"instruction": _instruction(options)},
        counts=asdict(statistics),
        sha256=hashes,
    )
    return statistics


def truth_path(out: Path) -> Path:
    """Where the true answers of a counterfactual job `out` are."""
    return out.with_name(f"{out.name}.truth.jsonl")


def _usable(found: Iterator[Question | str], skipped: Counter[str]) -> Iterator[Question]:
    ids: set[str] = set()
    for question in found:
        if isinstance(question, str):
            skipped[question] += 1
        elif question.example_id in ids:
            skipped["with an id seen before"] += 1
        else:
            ids.add(question.example_id)
            yield question


def _examples(
    questions: list[Question], options: Options, skipped: Counter[str]
) -> Iterator[_Example]:
    """Every question with its documents, as the options say; those that can't be are counted."""
    distractors = Distractors(questions, options.distractors, options.seed)
    answers = Answers(questions, options.seed) if options.counterfactual else None
    cutter = None
    if options.tokenizer is not None and options.max_doc_tokens is not None:
        cutter = Cutter(options.tokenizer, options.max_doc_tokens)
    for original in questions:
        others = distractors.of(original)
        if others is None:
            skipped[TOO_FEW] += 1
            continue
        question, swapped = replace(original, distractors=tuple(others)), None
        if answers is not None:
            swap = answers.swap(question)
            if isinstance(swap, str):
                skipped[swap] += 1
                continue
            question, swapped = swap.question, swap
        cut = _cut(question, cutter)
        if cut is None:
            skipped[TOO_LONG] += 1
            continue
        gold, others, num_cut = cut
        draw = random.Random(f"{options.seed}:{question.example_id}")
        documents = ordered(gold, others, options.document_order, draw)
        yield _Example(question, documents, swapped, num_cut)


def _cut(question: Question, cutter: Cutter | None) -> tuple[list[str], list[str], int] | None:
    """Gold documents, distractors, and how many were cut; None if the answer is too long."""
    gold, others = list(question.documents), list(question.distractors)
    if cutter is None:
        return gold, others, 0
    cut_gold = [text for d in gold if (text := cutter.cut(d, question.answer))]
    cut_others = [text for d in others if (text := cutter.cut(d))]
    if (len(cut_gold), len(cut_others)) != (len(gold), len(others)):
        return None
    if not any(place_of(question.answer, text) for text in cut_gold):
        return None
    pairs = zip((*gold, *others), (*cut_gold, *cut_others), strict=True)
    return cut_gold, cut_others, sum(whole != cut for whole, cut in pairs)


def _lines(example: _Example, options: Options) -> str:
    """The two job lines of one question."""
    question, instruction = example.question, _instruction(options)
    asked = [
        {"segment": INSTRUCTION, "text": f"{instruction}\n\nQuestion: "},
        {"segment": QUESTION, "text": question.question},
    ]
    shown = []
    before = f"{instruction}\n\n"
    for number, document in enumerate(example.documents, start=1):
        name = "Document" if len(example.documents) == 1 else f"Document {number}"
        shown += [
            {"segment": INSTRUCTION, "text": f"{before}{name}: "},
            {"segment": DOCUMENT if document.gold else DISTRACTOR, "text": document.text},
        ]
        before = "\n\n"
    shown += [{"segment": INSTRUCTION, "text": "\n\nQuestion: "}, asked[-1]]
    text = ""
    for condition, content in ((options.with_doc, shown), (options.without_doc, asked)):
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


def _truth(swapped: Swapped) -> str:
    """A line of the file that says what the true answer is."""
    line = {
        "example_id": swapped.question.example_id,
        "answer": swapped.question.answer,
        "true_answer": swapped.true_answer,
        "kind": swapped.kind,
        "taken_from": swapped.taken_from,
    }
    return json.dumps(line, ensure_ascii=False) + "\n"


def _instruction(options: Options) -> str:
    return INSTRUCTIONS.get(options.instruction, options.instruction)


def _option(name: str) -> str:
    return "format" if name == "file_format" else name.replace("_", " ")


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())
