"""Documents that say something else than the truth: the answer swapped for another of its kind.

    question   Who founded Vell?       answer   Anna Sarn                    Otto Brack
    document   Anna Sarn founded it.            ─────────▶ Otto Brack founded it.

The other answer comes from another example and is of the same kind and about the same length, so
that the document stays a text that one could believe.
"""

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from moescope.clients.questions import Question

IN_LONGER_WORDS = "whose answer is in the document within longer words"
NO_OTHER = "without another answer of its kind"
ANYTHING = ""

_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_DATE = re.compile(
    rf"\b(?:{_MONTHS})\b.*\d|\d.*\b(?:{_MONTHS})\b|^(?:{_MONTHS})$|\bcentur(?:y|ies)\b"
)
_YEAR = re.compile(r"(?:1\d{3}|20\d{2})s?|(?:AD|CE)\s+\d+|\d+\s+(?:AD|BC|BCE|CE)")
_MONEY = re.compile(r"[$€£¥]|\b(?:dollars?|euros?|pounds?|yen|francs?)\b")
_PERCENT = re.compile(r"%|\bper ?cent\b")
_BEFORE_NUMBER = (
    r"(?:\W|\b(?:about|almost|around|approximately|at least|at most|nearly|only|over|under|up to"
    r"|(?:more|less|fewer) than|the)\b)*"
)
_DIGITS = re.compile(_BEFORE_NUMBER + r"\d", re.IGNORECASE)
_NUMBER_WORDS = re.compile(
    _BEFORE_NUMBER + r"(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen"
    r"|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|hundreds?|thousands?|millions?|billions?"
    r"|dozens?|half|twice)\b",
    re.IGNORECASE,
)
_ASKED = re.compile(r"\b(?:who|whom|whose|when|where|why|how many|how much|how)\b", re.IGNORECASE)
_SMALL_WORD = re.compile("a|and|at|da|de|der|di|du|for|in|la|le|of|on|or|the|to|van|von")


@dataclass(frozen=True, slots=True)
class _Candidate:
    """An answer of one example: as its data set gives it, and as its document spells it."""

    example_id: str
    answer: str
    spelt: str


@dataclass(frozen=True, slots=True)
class Swapped:
    """A question with the other answer, in its documents too; the rest says what was done."""

    question: Question
    true_answer: str
    kind: str
    taken_from: str


class Answers:
    """The answers of all examples, by kind, number of words and what is asked for."""

    def __init__(self, questions: Sequence[Question], seed: int) -> None:
        self._seed = seed
        self._pools: dict[tuple[str, int, str], list[_Candidate]] = defaultdict(list)
        for question in questions:
            spelt = spelling(question)
            if spelt is not None:
                candidate = _Candidate(question.example_id, question.answer, spelt)
                for asked in {_asked(question.question), ANYTHING}:
                    self._pools[kind_of(spelt), len(spelt.split()), asked].append(candidate)

    def swap(self, question: Question) -> Swapped | str:
        """The question with another answer, drawn by the seed; or why there is none.

        First among the answers to the same question word (who, when), then among all.
        """
        spelt = spelling(question)
        if spelt is None:
            return IN_LONGER_WORDS
        kind, length = kind_of(spelt), len(spelt.split())
        draw = random.Random(f"{self._seed}:{question.example_id}")
        for asked in (_asked(question.question), ANYTHING):
            for near in (0, *draw.sample((-1, 1), 2)):
                pool = self._pools.get((kind, length + near, asked), [])
                start = draw.randrange(len(pool)) if pool else 0
                for i in range(len(pool)):
                    other = pool[(start + i) % len(pool)]
                    if _can_stand_for(other, question):
                        return _swapped(question, other, kind)
        return NO_OTHER


def spelling(question: Question) -> str | None:
    """The answer as the documents spell it: in lower case if they do so anywhere."""
    pattern = _pattern(question.answer)
    found = [m.group() for document in question.documents for m in pattern.finditer(document)]
    return next((text for text in found if text[0].islower()), found[0] if found else None)


def occurs(answer: str, text: str) -> bool:
    """Whether the answer stands in the text as whole words, in whatever case."""
    return _pattern(answer).search(text) is not None


def place_of(answer: str, text: str) -> tuple[int, int] | None:
    """The first characters that are the answer: whole words if it can be, or within a word."""
    found = _pattern(answer).search(text) or re.search(re.escape(answer), text, re.IGNORECASE)
    return found.span() if found else None


def kind_of(answer: str) -> str:
    """The kind; a name is what has a capital in every word that counts."""
    for kind, pattern in (("date", _DATE), ("percentage", _PERCENT), ("sum of money", _MONEY)):
        if pattern.search(answer):
            return kind
    if _YEAR.fullmatch(answer):
        return "year"
    if _DIGITS.match(answer):
        return "number"
    if _NUMBER_WORDS.match(answer):
        return "number in words"
    words = [word for word in re.findall(r"\w+", answer) if not _SMALL_WORD.fullmatch(word)]
    return "name" if words and all(not word[0].islower() for word in words) else "other"


def _asked(question: str) -> str:
    """The question word if it says what kind of answer is wanted; "what" and "which" do not."""
    found = _ASKED.search(question)
    return found.group().casefold() if found else ANYTHING


@lru_cache(maxsize=4096)
def _pattern(answer: str, flags: int = re.IGNORECASE) -> re.Pattern[str]:
    """The answer as whole words; "5" is not in "3.5" or "5,000"."""
    words = r"\s+".join(re.escape(word) for word in answer.split())
    return re.compile(rf"(?<!\w)(?<!\d[.,]){words}(?!\w)(?![.,]\d)", flags)


def _can_stand_for(other: _Candidate, question: Question) -> bool:
    """Whether the other answer is wrong here, and nowhere in the text yet."""
    wrong = other.spelt.casefold()
    right = [text.casefold() for text in (question.answer, *question.aliases)]
    if other.example_id == question.example_id or any(wrong in r or r in wrong for r in right):
        return False
    texts = (question.question, *question.documents, *question.distractors)
    return not any(wrong in text.casefold() for text in texts)


def _swapped(question: Question, other: _Candidate, kind: str) -> Swapped | str:
    """The other answer in place of the true one, and of what else counts as right.

    An alias is replaced as it is written: with "US" in "us" most texts would be spoilt. What is
    left within longer words ("Norman" in "Normans") would still tell the truth: no such document.
    """
    answer = question.answer
    rest = sorted(question.aliases, key=len, reverse=True)
    right = [(answer, _pattern(answer)), *((alias, _pattern(alias, 0)) for alias in rest)]
    documents = []
    for document in question.documents:
        text = document
        for true, pattern in right:
            text = pattern.sub(partial(_in_its_place, true=true, other=other.spelt), text)
        if answer.casefold() in text.casefold():
            return IN_LONGER_WORDS
        documents.append(text)
    swapped = replace(question, answer=other.answer, documents=tuple(documents), aliases=())
    return Swapped(swapped, answer, kind, other.example_id)


def _in_its_place(found: re.Match[str], true: str, other: str) -> str:
    """The other text, in capitals or with a capital where what it replaces has them."""
    if found.group().isupper() and not true.isupper():
        return other.upper()
    return other[0].upper() + other[1:] if found.group()[0].isupper() else other
