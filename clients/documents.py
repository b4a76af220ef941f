"""Which documents stand before a question, in which order, and how much of each.

gold documents ──▶ cut around the answer ──┐
distractors: the data set's own, then      ├──▶ in order ──▶ the documents of one prompt
other examples' documents ──▶ cut ─────────┘
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moescope.clients.counterfactual import occurs, place_of
from moescope.clients.questions import Question
from moescope.tracer.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Order = Literal["gold-first", "gold-last", "random"]

TOO_FEW = "with too few documents to distract"
TOO_LONG = "whose answer is longer than a document may be"


@dataclass(frozen=True, slots=True)
class Document:
    """A document of a prompt; `gold` if it is the question's own."""

    text: str
    gold: bool


class Distractors:
    """The documents of all examples, to draw from for each."""

    def __init__(self, questions: Sequence[Question], num: int, seed: int) -> None:
        self._num, self._seed = num, seed
        self._pool = list(dict.fromkeys(d for q in questions for d in q.documents)) if num else []

    def of(self, question: Question) -> list[str] | None:
        """As many as asked for, drawn by the seed; None if there are fewer.

        None of them holds an answer. The data set's own come first.
        """
        right = [text.casefold() for text in (question.answer, *question.aliases)]
        taken = dict.fromkeys(d for d in question.distractors if not _holds(d, right))
        found = list(taken)[: self._num]
        draw = random.Random(f"{self._seed}:{question.example_id}")
        # More than enough draws, and not the whole pool for every question of a large data set.
        num_draws = min(len(self._pool), 20 * (self._num + 1))
        for i in draw.sample(range(len(self._pool)), num_draws):
            if len(found) == self._num:
                break
            document = self._pool[i]
            if document not in {*question.documents, *found} and not _holds(document, right):
                found.append(document)
        return found if len(found) == self._num else None


def ordered(
    gold: Sequence[str], distractors: Sequence[str], order: Order, draw: random.Random
) -> list[Document]:
    """All documents in the wanted order."""
    first = [Document(text, gold=True) for text in gold]
    rest = [Document(text, gold=False) for text in distractors]
    if order == "gold-last":
        return rest + first
    documents = first + rest
    if order == "random":
        draw.shuffle(documents)
    return documents


class Cutter:
    """Cuts documents to a number of tokens."""

    def __init__(self, model: str, max_tokens: int) -> None:
        self._tokenizer, self._max_tokens = _load_tokenizer(model), max_tokens

    def cut(self, text: str, answer: str | None = None) -> str | None:
        """The text in at most so many tokens, with the answer in the middle as far as it goes.

        Without an answer in it, it is the text's beginning. None if the answer alone is longer.
        """
        first, stop = (answer is not None and place_of(answer, text)) or (0, 0)
        offsets = self._offsets(text)
        if len(offsets) <= self._max_tokens:
            return text
        covering = [i for i, (begin, end) in enumerate(offsets) if begin < stop and end > first]
        low, high = (covering[0], covering[-1] + 1) if covering else (0, 0)
        for size in range(self._max_tokens, max(high - low, 1) - 1, -1):
            begin = max(0, min(low - (size - (high - low)) // 2, len(offsets) - size))
            around = offsets[begin][0], offsets[begin + size - 1][1]
            cut = _whole_words(text, around, keep=(first, stop))
            # Cut out, the first word may be other tokens than it was in its place.
            if cut and len(self._offsets(cut)) <= self._max_tokens:
                return cut
        return None

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["offset_mapping"]


def _load_tokenizer(model: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"can't load the tokenizer of --tokenizer {model}: {reason}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"the tokenizer of --tokenizer {model} gives no character offsets; name a model with "
            "a fast one (tokenizer.json)."
        )
    # Long documents are what it is for: no warning that one is longer than the model takes.
    tokenizer.model_max_length = 10**9
    return tokenizer


def _whole_words(text: str, around: tuple[int, int], keep: tuple[int, int]) -> str:
    """The text between two places, without words cut in two at its ends; `keep` is kept."""
    begin, end = around
    if begin and not text[begin - 1].isspace():
        begin = next((i for i in range(begin, keep[0]) if text[i].isspace()), begin)
    if end < len(text) and not text[end].isspace():
        end = next((i for i in range(end, keep[1], -1) if text[i - 1].isspace()), end)
    return text[begin:end].strip()


def _holds(document: str, right: Sequence[str]) -> bool:
    text = document.casefold()
    return any(answer in text and occurs(answer, document) for answer in right)
