"""The job file: one request a line, checked as a whole before any model is loaded.

docs/job-format.md describes the format for users. In short, a line is a JSON object with
`example_id`, `condition` and one of three bodies:

    messages, the last one the assistant's        teacher forcing with the chat template
    prompt + response                             teacher forcing of raw text
    messages or prompt, + generate                free generation

Every text is a list of *parts*, each with the segment that its tokens will count to; a plain
string is one part of the default segment.
"""

import re
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    TypeAdapter,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from moescope.clients.job_reasons import reason
from moescope.tracer.errors import InputError
from moescope.tracer.format import PROMPT, RESPONSE, TEMPLATE

SYSTEM, DOCUMENT, QUESTION, INSTRUCTION = "system", "document", "question", "instruction"
SEGMENT_OF_ROLE = {"system": SYSTEM, "user": QUESTION, "assistant": RESPONSE}

MAX_REPORTED_LINES = 10
_FORMAT = "docs/job-format.md describes the format."

# Slots instead of dicts: a job of 100,000 lines holds a million of these.
_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)

_SEGMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_Name = Annotated[str, Field(pattern=r"\S")]
_Count = Annotated[StrictInt, Field(ge=0)]
_Penalty = Annotated[StrictFloat, Field(ge=-2, le=2)]


@dataclass(slots=True, frozen=True, config=_CONFIG)
class Part:
    """A stretch of text and the segment that its tokens count to."""

    segment: str
    text: str

    @field_validator("segment")
    @classmethod
    def _check_segment(cls, name: str) -> str:
        if name == TEMPLATE:
            raise ValueError("the segment 'template' is reserved for what the chat template writes")
        if not _SEGMENT_NAME.fullmatch(name):
            raise ValueError(
                f"the segment {name!r} must be a name of up to 64 letters, digits and underscores "
                "that begins with no digit"
            )
        return name


def _parts(value: Any, default_segment: str) -> Any:
    """A plain string as one part; anything else is left to the validation of `tuple[Part, ...]`."""
    if isinstance(value, str):
        return (Part(default_segment, value),)
    if value is None or isinstance(value, list | tuple):
        return value
    raise ValueError('must be a text or a list of {"segment": …, "text": …}')


@dataclass(slots=True, frozen=True, config=_CONFIG)
class Message:
    """One turn of a chat; `content` is given as a string or as parts."""

    role: Literal["system", "user", "assistant"]
    content: tuple[Part, ...]

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, value: Any, info: Any) -> Any:
        return _parts(value, SEGMENT_OF_ROLE.get(info.data.get("role"), QUESTION))


@dataclass(slots=True, frozen=True, config=_CONFIG)
class Generate:
    """How to sample: a subset of vLLM's `SamplingParams`, with its names, ranges and defaults."""

    max_tokens: Annotated[StrictInt, Field(ge=1)]
    min_tokens: _Count | None = None
    n: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[StrictFloat, Field(ge=0, le=2)] | None = None
    top_p: Annotated[StrictFloat, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1)] | None = None
    min_p: Annotated[StrictFloat, Field(ge=0, le=1)] | None = None
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] | None = None
    stop: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    stop_token_ids: tuple[_Count, ...] | None = None
    ignore_eos: StrictBool | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[StrictFloat, Field(gt=0)] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.min_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"`min_tokens` is above `max_tokens` ({self.max_tokens})")
        if self.n is not None and self.n > 1 and self.temperature == 0:
            raise ValueError("`n` above 1 with `temperature` 0 gives the same answer n times")
        return self

    def sampling(self) -> dict[str, Any]:
        """The given fields as keyword arguments of `SamplingParams`."""
        given = {name: getattr(self, name) for name in self.__slots__}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in given.items()
            if value is not None
        }


@dataclass(slots=True, config=_CONFIG)
class JobLine:
    """One request of a job. Either `messages` or `prompt` is set; `line` is its number in the file.

    With `generate` None the response is given (teacher forcing): the last message, or `response`.
    """

    example_id: _Name
    condition: _Name
    messages: tuple[Message, ...] | None = None
    prompt: tuple[Part, ...] | None = None
    response: tuple[Part, ...] | None = None
    generate: Generate | None = None
    line: int = field(default=0, init=False)

    @field_validator("prompt", "response", mode="before")
    @classmethod
    def _as_parts(cls, value: Any, info: Any) -> Any:
        return _parts(value, PROMPT if info.field_name == "prompt" else RESPONSE)

    @model_validator(mode="after")
    def _check_body(self) -> Self:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give one of `messages` and `prompt`")
        if self.messages is not None:
            self._check_chat(self.messages)
        elif (self.response is None) == (self.generate is None):
            raise ValueError("with `prompt`, give one of `response` and `generate`")
        if self.generate is None and not any(part.text for part in self.target):
            raise ValueError("the response is empty, so there is nothing to trace in it")
        return self

    def _check_chat(self, messages: tuple[Message, ...]) -> None:
        if self.response is not None:
            raise ValueError("`response` goes with `prompt`; in a chat, end with its message")
        if not messages:
            raise ValueError("`messages` is empty")
        answered = messages[-1].role == "assistant"
        if answered and self.generate is not None:
            raise ValueError(
                "`generate` goes with messages that end before the assistant's answer: leave out "
                "the one or the other"
            )
        if not answered and self.generate is None:
            raise ValueError(
                "the last message is not the assistant's: add its answer (teacher forcing), or "
                "`generate` to let the model write one"
            )

    @property
    def target(self) -> tuple[Part, ...]:
        """The given response's parts; empty for free generation."""
        if self.generate is not None:
            return ()
        return self.messages[-1].content if self.messages else self.response or ()


_LINE = TypeAdapter(JobLine)


def read_job(path: Path) -> list[JobLine]:
    """Read and check a whole job file.

    Raises InputError that names every bad line (the first ten with their reasons): a line that
    is no JSON or breaks the format, or a pair of `example_id` and `condition` that came before.
    """
    lines: list[JobLine] = []
    problems: list[str] = []
    num_bad = 0
    first_seen: dict[tuple[str, str], int] = {}
    for number, raw in _raw_lines(path):
        try:
            line = _LINE.validate_json(raw.decode())
            line.line = number
            seen = first_seen.setdefault((line.example_id, line.condition), number)
            if seen != number:
                raise ValueError(
                    f"example_id {line.example_id!r} with condition {line.condition!r} is on "
                    f"line {seen} already"
                )
            lines.append(line)
        except ValueError as error:
            num_bad += 1
            if num_bad <= MAX_REPORTED_LINES:
                problems.append(f"  line {number}: {reason(error)}")
    if num_bad > MAX_REPORTED_LINES:
        problems.append(f"  and {num_bad - MAX_REPORTED_LINES} more bad lines")
    if num_bad:
        count = "1 line is" if num_bad == 1 else f"{num_bad} lines are"
        raise InputError("\n".join([f"{path}: {count} unusable.", *problems, _FORMAT]))
    if not lines:
        raise InputError(f"{path} holds no request. {_FORMAT}")
    return lines


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers; split at line feeds only."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                text = raw.rstrip(b"\r\n")
                text = text.removeprefix(b"\xef\xbb\xbf") if number == 1 else text
                if text.strip():
                    yield number, text
    except OSError as error:
        raise InputError(f"can't read the job {path}: {error.strerror}.") from error
