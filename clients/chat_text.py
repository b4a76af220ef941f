"""The text of a request and where its segments' characters are, exactly.

For a chat that means to look through the model's own template, a program that we don't know.
Every part is wrapped in sentinels, private characters that occur nowhere in the line:

    content        ⟨0⟩The sky is green.⟨1⟩What colour is it?⟨2⟩
    rendered       <|user|>⟨0⟩The sky is green.⟨1⟩What colour is it?⟨2⟩<|end|>
    without them   <|user|>The sky is green.What colour is it?<|end|>

If the last equals the template's rendering of the plain content, then the sentinels stood at
the parts' borders. If not, the template may strip messages, which the sentinels prevented: they
are moved inward, past the whitespace that the template strips. Any other rewriting is refused.
"""

import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from typing import TYPE_CHECKING

from moescope.clients.job import JobLine, Message
from moescope.tracer.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[str, int, int]

_PRIVATE_USE = range(0xF0000, 0xFFFFE)


@dataclass(frozen=True, slots=True)
class PlacedText:
    """`spans` are (segment, start, stop) in characters of `text`: ascending, disjoint, not empty.

    The given response's spans begin at `target_start` or later.
    """

    text: str
    spans: list[Span]
    target_start: int


def describe(line: JobLine) -> str:
    """How an error names a line."""
    where = f"line {line.line} " if line.line else ""
    return f"{where}(example_id {line.example_id!r}, condition {line.condition!r})"


def raw_text(line: JobLine) -> PlacedText:
    """The text of a line with `prompt`: its parts one after another."""
    prompt = line.prompt or ()
    parts = (*prompt, *line.target)
    stops = list(accumulate(len(part.text) for part in parts))
    spans = [
        (part.segment, stop - len(part.text), stop)
        for part, stop in zip(parts, stops, strict=True)
        if part.text
    ]
    return PlacedText(
        "".join(part.text for part in parts), spans, sum(len(part.text) for part in prompt)
    )


def chat_text(line: JobLine, tokenizer: "PreTrainedTokenizerBase") -> PlacedText:
    """The text that the tokenizer's chat template makes of a line with `messages`.

    A response to be generated is prompted for (`add_generation_prompt`). Raises InputError if
    there is no template, it refuses the messages, or it rewrites one.
    """
    messages = line.messages or ()
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{describe(line)}: this model's tokenizer has no chat template, so it can't take "
            "`messages`; use `prompt` + `response`, or the chat version of the model."
        )

    def render(contents: list[str]) -> str:
        chat = [{"role": m.role, "content": c} for m, c in zip(messages, contents, strict=True)]
        text: str = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=line.generate is not None
        )
        return text

    turns = [_Turn.of(message) for message in messages]
    try:
        plain = render([turn.text for turn in turns])
    except Exception as error:  # a template is anyone's program and may raise anything
        raise InputError(
            f"{describe(line)}: the model's chat template refuses these messages: {error}"
        ) from error
    _hand_out_marks(turns, plain)

    def find() -> list[list[Span]] | None:
        try:
            rendered = render([turn.marked_text() for turn in turns])
        except Exception:  # it took the plain messages, so it reads their contents
            return None
        return _read_marks(rendered, plain, turns)

    spans = find()
    if spans is None:
        spans = _find_stripped(turns, find)
    if spans is None:
        number = _rewritten(turns, find)
        raise InputError(
            f"{describe(line)}: the model's chat template rewrites message {number} "
            f"({turns[number - 1].role}), so its segments can't be found exactly. Write the "
            "sequence as the model should see it, as `prompt` + `response`."
        )
    flat = sorted((span for turn in spans for span in turn), key=lambda span: span[1])
    return PlacedText(plain, flat, min((start for _, start, _ in spans[-1]), default=len(plain)))


@dataclass(slots=True)
class _Turn:
    """A message and where its sentinels are put.

    `borders` are the offsets of its parts in `text`, one sentinel at each. `lead` and `trail`
    count the characters of outer whitespace to leave outside of the sentinels.
    """

    role: str
    text: str
    segments: list[str]
    borders: list[int]
    marks: list[str]
    marked: bool
    lead: int = 0
    trail: int = 0

    @classmethod
    def of(cls, message: Message) -> "_Turn":
        """A turn with no sentinels handed out yet."""
        text = "".join(part.text for part in message.content)
        borders = [0, *accumulate(len(part.text) for part in message.content)]
        segments = [part.segment for part in message.content]
        # A template may test for empty content, which a sentinel would fill.
        return cls(message.role, text, segments, borders, [], marked=bool(text))

    @property
    def outer_whitespace(self) -> tuple[int, int]:
        """How many characters could be stripped at the two ends."""
        size = len(self.text)
        return size - len(self.text.lstrip()), size - len(self.text.rstrip())

    def texts(self) -> list[str]:
        """The text before the first sentinel, between each two, and after the last."""
        low, high = self.lead, len(self.text) - self.trail
        cuts = [0, *(min(max(border, low), high) for border in self.borders), len(self.text)]
        return [self.text[start:stop] for start, stop in pairwise(cuts)]

    def marked_text(self) -> str:
        """The content with its sentinels."""
        if not self.marked:
            return self.text
        first, *others = self.texts()
        return first + "".join(m + text for m, text in zip(self.marks, others, strict=True))


_Find = Callable[[], list[list[Span]] | None]


def _hand_out_marks(turns: list[_Turn], plain: str) -> None:
    taken = set(plain).union(*(turn.text for turn in turns))
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in taken)
    for turn in turns:
        turn.marks = list(islice(free, len(turn.borders)))


def _read_marks(rendered: str, plain: str, turns: list[_Turn]) -> list[list[Span]] | None:
    """Each turn's character spans in `plain`, or None if sentinels changed what is rendered."""
    marks = {mark for turn in turns if turn.marked for mark in turn.marks}
    if not marks:
        return [[] for _ in turns] if rendered == plain else None
    pieces = re.split(f"([{''.join(marks)}])", rendered)
    if "".join(pieces[::2]) != plain or sorted(pieces[1::2]) != sorted(marks):
        return None
    ends = accumulate(len(piece) for piece in pieces[::2])
    position = dict(zip(pieces[1::2], ends, strict=False))
    spans = [_spans_of(turn, position, plain) for turn in turns]
    return None if None in spans else [turn for turn in spans if turn is not None]


def _spans_of(turn: _Turn, position: dict[str, int], plain: str) -> list[Span] | None:
    if not turn.marked:
        return []
    spans = []
    places = [position[mark] for mark in turn.marks]
    for segment, text, (start, stop) in zip(
        turn.segments, turn.texts()[1:-1], pairwise(places), strict=True
    ):
        if plain[start:stop] != text:
            return None
        if text:
            spans.append((segment, start, stop))
    return spans


def _find_stripped(turns: list[_Turn], find: _Find) -> list[list[Span]] | None:
    """The spans under a template that strips messages; None if it does more than that.

    First every sentinel stands inside of its message's outer whitespace, where stripping can't
    meet it. Then each is moved out as far as the rendering stays the same, so that whitespace
    which is not stripped keeps its segment.
    """
    for turn in turns:
        turn.lead, turn.trail = turn.outer_whitespace
        turn.marked = bool(turn.text.strip())
    if find() is None:
        return None
    for turn in turns:
        if not turn.text.strip():
            _mark_blank(turn, find)
        else:
            _shrink(turn, "lead", find)
            _shrink(turn, "trail", find)
    return find()


def _mark_blank(turn: _Turn, find: _Find) -> None:
    """A message of whitespace only: its sentinels stay if the template keeps it whole."""
    turn.lead = turn.trail = 0
    turn.marked = bool(turn.text)
    if turn.marked and find() is None:
        turn.marked = False


def _shrink(turn: _Turn, side: str, find: _Find) -> None:
    """Set `turn.lead` or `turn.trail` to as little as still gives the same rendering."""

    def works(count: int) -> bool:
        setattr(turn, side, count)
        return find() is not None

    setattr(turn, side, bisect_left(range(getattr(turn, side)), True, key=works))


def _rewritten(turns: list[_Turn], find: _Find) -> int:
    """The number, from 1, of a message that can't be found; called when they can't all be."""
    for turn in turns:
        turn.marked = False
    for number, turn in enumerate(turns, start=1):
        turn.marked = bool(turn.text.strip())
        if find() is None:
            return number
        turn.marked = False
    return len(turns)
