"""Evaluation items: what a model is asked under every arm, one JSON object a line.

    question    an answer is written, and compared with references     faithfulness, utility
    request     an answer is written, and judged: refused or not       safety
    choice      the likeliest of given answers is taken                utility
    text        how likely a given text is, and how far an arm's       utility
                predictions are from the base's

docs/evaluation.md describes the format for users. A file is read and checked as a whole before a
model is loaded; errors name lines and fields.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    TypeAdapter,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from moescope.clients.data_card import card_path
from moescope.clients.job import DOCUMENT, MAX_REPORTED_LINES, Message
from moescope.clients.job_reasons import reason
from moescope.tracer.errors import InputError

Axis = Literal["faithfulness", "safety", "utility"]
AXES = ("faithfulness", "safety")  # those that have rankings; utility goes with either
UTILITY: Axis = "utility"

_FORMAT = "docs/evaluation.md describes the format."
_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)
_Name = Annotated[str, Field(pattern=r"\S")]
_Text = Annotated[str, Field(pattern=r"\S")]
_TASKS = {"faithfulness": ("question",), "safety": ("request",)}


@dataclass(slots=True, kw_only=True, config=_CONFIG)
class _Item:
    """What every item has. `line` is its number in the file."""

    example_id: _Name
    axis: Axis
    kind: _Name
    messages: Annotated[tuple[Message, ...], Field(min_length=1)]
    line: int = field(default=0, init=False)

    @property
    def prompt(self) -> str:
        """What the model is asked, as people read it."""
        return _read(self.messages)

    @property
    def document(self) -> str | None:
        """The texts of the segment `document`, if there are any."""
        parts = [p.text for m in self.messages for p in m.content if p.segment == DOCUMENT]
        return "\n".join(parts) if parts else None

    def _check_asks(self) -> None:
        if self.messages[-1].role != "user":
            raise ValueError(
                f"the last of `messages` must be the user's, not the {self.messages[-1].role}'s"
            )


def _read(messages: tuple[Message, ...]) -> str:
    return "\n\n".join("".join(p.text for p in m.content) for m in messages)


@dataclass(slots=True, config=_CONFIG)
class Given:
    """Whole answers whose probability is measured; those of a question or those of a request."""

    document: _Text | None = None
    memory: _Text | None = None
    refusal: _Text | None = None
    compliance: _Text | None = None

    def named(self) -> dict[str, str]:
        """Those that are given, by name."""
        return {name: t for name in self.__slots__ if (t := getattr(self, name)) is not None}

    def check(self, *names: str) -> None:
        """ValueError unless there is something, and nothing but these."""
        if set(self.named()) - {*names}:
            odd = ", ".join(f"`{name}`" for name in self.named() if name not in names)
            raise ValueError(f"`responses` has {odd}: here it takes `{'` and `'.join(names)}`")
        if not self.named():
            raise ValueError(f"`responses` is empty: give `{'`, `'.join(names)}`, or leave it out")


def _texts(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


@dataclass(slots=True, kw_only=True, config=_CONFIG)
class Question(_Item):
    """The answer that is written is compared with `reference` and, in a conflict, the document's.

    `document_answer` is what the document says where that is not the reference.
    """

    task: Literal["question"]
    reference: Annotated[tuple[_Text, ...], Field(min_length=1)]
    document_answer: tuple[_Text, ...] = ()
    responses: Given | None = None

    _one_or_many = field_validator("reference", "document_answer", mode="before")(_texts)

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_asks()
        if self.responses is not None:
            self.responses.check("document", "memory")
        if self.document_answer and self.document is None:
            raise ValueError(
                "`document_answer` is given, but no part of `messages` has the segment `document`"
            )
        return self


@dataclass(slots=True, kw_only=True, config=_CONFIG)
class Request(_Item):
    """The answer that is written is judged: a forbidden request should be refused, others not."""

    task: Literal["request"]
    forbidden: StrictBool
    responses: Given | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_asks()
        if self.responses is not None:
            self.responses.check("refusal", "compliance")
        return self


@dataclass(slots=True, kw_only=True, config=_CONFIG)
class Choice(_Item):
    """The answer of largest log-likelihood among `choices` should be number `correct`, from 0."""

    task: Literal["choice"]
    choices: Annotated[tuple[_Text, ...], Field(min_length=2)]
    correct: Annotated[StrictInt, Field(ge=0)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_asks()
        if self.correct >= len(self.choices):
            raise ValueError(
                f"`correct` is {self.correct}, and the choices are 0 to {len(self.choices) - 1}"
            )
        if len(set(self.choices)) < len(self.choices):
            raise ValueError("two of `choices` are the same text")
        return self


@dataclass(slots=True, kw_only=True, config=_CONFIG)
class Text(_Item):
    """A text whose likelihood is measured: the last message, the assistant's, or a raw `text`."""

    task: Literal["text"]
    messages: tuple[Message, ...] = ()
    text: _Text | None = None

    @property
    def prompt(self) -> str:
        """The text itself, where it is raw."""
        return self.text if self.text is not None else _read(self.messages)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.messages) == (self.text is not None):
            raise ValueError("give one of `messages` and `text`")
        if self.messages and self.messages[-1].role != "assistant":
            raise ValueError("the last of `messages` must be the assistant's: the text to measure")
        return self


Item = Question | Request | Choice | Text
_ADAPTERS: dict[str, TypeAdapter[Any]] = {
    "question": TypeAdapter(Question),
    "request": TypeAdapter(Request),
    "choice": TypeAdapter(Choice),
    "text": TypeAdapter(Text),
}


@plain_dataclass(frozen=True, slots=True)
class ItemFile:
    """A file of items, and what identifies it."""

    path: Path
    sha256: str
    items: tuple[Item, ...]

    def about(self) -> dict[str, Any]:
        """For eval.json; also what the data card says of harm (clients/specimen_data.py)."""
        about = {"path": str(self.path), "sha256": self.sha256, "counts": counts(self.items)}
        try:
            card = json.loads(card_path(self.path).read_bytes())
            benign = card["benign_stand_ins"] and card["sha256"][self.path.name] == self.sha256
        except (OSError, ValueError, KeyError, TypeError):
            benign = False
        return about | ({"benign_stand_ins": True} if benign else {})


def counts(items: Iterable[Item]) -> dict[str, int]:
    """How many items there are of each axis and kind."""
    return dict(sorted(Counter(f"{item.axis}/{item.kind}" for item in items).items()))


def read_items(path: Path, axes: Sequence[str]) -> ItemFile:
    """Read and check a whole file of items, all of them of one of `axes`.

    Raises InputError that names every bad line (the first ten with their reasons).
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"can't read the items {path}: {error.strerror}.") from error
    items: list[Item] = []
    problems: list[str] = []
    first_seen: dict[str, int] = {}
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            item = _parse(line, axes)
            item.line = number
            seen = first_seen.setdefault(item.example_id, number)
            if seen != number:
                raise ValueError(f"example_id {item.example_id!r} is on line {seen} already")
            items.append(item)
        except ValueError as error:
            problems.append(f"  line {number}: {reason(error)}")
    if problems:
        count = "1 line is" if len(problems) == 1 else f"{len(problems)} lines are"
        more = len(problems) - MAX_REPORTED_LINES
        shown = problems[:MAX_REPORTED_LINES] + [f"  and {more} more bad lines"] * (more > 0)
        raise InputError("\n".join([f"{path}: {count} unusable.", *shown, _FORMAT]))
    if not items:
        raise InputError(f"{path} holds no item. {_FORMAT}")
    return ItemFile(path, hashlib.sha256(raw).hexdigest(), tuple(items))


def _parse(line: bytes, axes: Sequence[str]) -> Item:
    try:
        fields = json.loads(line.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    task, axis = fields.get("task"), fields.get("axis")
    if not isinstance(task, str) or task not in _ADAPTERS:
        said = "is missing" if task is None else f"is {task!r}"
        raise ValueError(f"`task` {said}: it must be {', '.join(_ADAPTERS)}")
    item: Item = _ADAPTERS[task].validate_json(line)
    if item.axis not in axes:
        raise ValueError(f"`axis` is {axis!r}: this file is for {' and '.join(axes)}")
    if task not in _TASKS.get(item.axis, (task,)):
        raise ValueError(
            f"`task` is {task!r}: items of the axis {item.axis} are "
            f"{' or '.join(_TASKS[item.axis])}s"
        )
    if item.axis == UTILITY and task == "request":
        raise ValueError("`task` is 'request': give the axis safety to what should be refused")
    return item


def refuse_shared(given: Mapping[str, Iterable[str]], why: str) -> None:
    """InputError if any two of these sets of example ids (by what they are called) meet."""
    owner: dict[str, str] = {}
    shared: dict[tuple[str, str], list[str]] = {}
    for name, ids in given.items():
        for example in sorted(set(ids)):
            if example in owner:
                shared.setdefault((owner[example], name), []).append(example)
            owner.setdefault(example, name)
    for (one, other), ids in shared.items():
        some = ", ".join(repr(example) for example in ids[:3]) + (", …" if len(ids) > 3 else "")
        raise InputError(f"{len(ids)} example ids are both in {one} and in {other} ({some}): {why}")
