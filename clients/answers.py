"""What an answer to a question is worth: right, supported by the document, or made up.

Texts are compared as SQuAD's official script v1.1 does: lower case, without ASCII punctuation and
English articles. So a word is one that this leaves. docs/evaluation-statistics.md says when the
rules are wrong.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

# An answer is supported by a document that has this share of its content words. A right answer in
# a sentence of its own brings a word or two along; measured in tests/unit/clients/test_answers.py.
GROUNDED_SHARE = 0.75

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Words that need no support.
_FUNCTION = frozenset(
    re.findall(
        r"\w+",
        "and are as at be been but by can could did do does for from had has have he her his how i "
        "if in into is it its my not of on or our she so than that their them then there these "
        "they this those to was we were what when where which who whom whose why will with would "
        "you your answer according document text passage",
    )
)
# An answer that says that it has none claims nothing.
_ABSTAINS = re.compile(
    r"\b(?:(?:dont|do not|does not|doesnt|cannot|cant) (?:know|say|mention|state|tell|contain|"
    r"answer|provide|specify|be (?:determined|answered|found))|not (?:mentioned|stated|given|"
    r"specified|provided|known|sure)|no (?:answer|information)|unanswerable|unknown)\b"
)


def question_metrics(
    answer: str,
    references: Sequence[str],
    document: str | None,
    document_answers: Sequence[str] = (),
    *,
    question: str = "",
) -> dict[str, float]:
    """Every metric that a generated answer can have, by name.

    exact_match, f1   the best over the references, as SQuAD's official script has them
    hallucinated      1 if the answer is neither supported by the document nor right (it holds a
                      reference, or a reference holds it) nor one of `document_answers`, and does
                      not say that it has none
    grounded          with a document: 1 if that supports the answer
    follows_document  with `document_answers`, what the document says against the references: 1 if
                      the answer holds one of them and no reference
    follows_memory    the other way round

    An empty answer is none of these. `question` helps `grounded`: its words need no support.
    """
    said = normalise(answer).split()
    supported = document is not None and is_grounded(answer, document, question=question)
    known = [normalise(text).split() for text in (*references, *document_answers)]
    right = any(_holds(said, words) or _holds(words, said) for words in known)
    metrics = {
        "exact_match": exact_match(answer, references),
        "f1": f1(answer, references),
        "hallucinated": float(bool(said) and not (supported or right or abstains(answer))),
    }
    if document is not None:
        metrics["grounded"] = float(supported)
    if document_answers:
        document_side, memory_side = _sides(said, document_answers, references)
        metrics["follows_document"] = float(document_side and not memory_side)
        metrics["follows_memory"] = float(memory_side and not document_side)
    return metrics


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and superfluous whitespace.

    `normalize_answer` of SQuAD's evaluate-v1.1.py (Rajpurkar et al., arXiv 1606.05250).
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is a reference, both normalised."""
    said = normalise(answer)
    return _best(references, lambda reference: float(said == normalise(reference)))


def f1(answer: str, references: Sequence[str]) -> float:
    """The F1 of the answer's words as a bag against the best reference's."""
    said = Counter(normalise(answer).split())

    def score(reference: str) -> float:
        right = Counter(normalise(reference).split())
        return 2 * (said & right).total() / max(1, said.total() + right.total())

    return _best(references, score)


def is_grounded(answer: str, document: str, *, question: str = "") -> bool:
    """Whether the document supports the answer.

    It does if it has the answer's words in a row, or at least GROUNDED_SHARE of its content words
    (those that are neither function words nor in the question) anywhere, as K-Precision counts
    them (Adlakha et al., arXiv 2307.16877).
    """
    said, there = normalise(answer).split(), normalise(document).split()
    if not said:
        return False
    asked = {*normalise(question).split()} | _FUNCTION
    content = [word for word in said if word not in asked]
    has = {*there}
    share = sum(word in has for word in content) / len(content) if content else 0.0
    return _holds(there, said) or share >= GROUNDED_SHARE


def abstains(answer: str) -> bool:
    """Whether the answer says that it has none."""
    return bool(_ABSTAINS.search(normalise(answer)))


def _best(references: Sequence[str], score: Callable[[str], float]) -> float:
    return max(map(score, references), default=0.0)


def _places(text: list[str], words: list[str]) -> list[tuple[int, int]]:
    """Where `words` stand in a row in `text`: [start, end)."""
    n = len(words)
    return [(i, i + n) for i in range(len(text) - n + 1) if n and text[i : i + n] == words]


def _holds(text: list[str], words: list[str]) -> bool:
    return bool(_places(text, words))


def _sides(said: list[str], one: Sequence[str], other: Sequence[str]) -> tuple[bool, bool]:
    """Whether the answer holds a text of the one and of the other.

    "New York" within "New York City" counts for the longer one alone.
    """
    places = [
        [place for text in texts for place in _places(said, normalise(text).split())]
        for texts in (one, other)
    ]

    def stands(mine: list[tuple[int, int]], others: list[tuple[int, int]]) -> bool:
        return any(
            not any(a <= start and end <= b and (a, b) != (start, end) for a, b in others)
            for start, end in mine
        )

    return stands(places[0], places[1]), stands(places[1], places[0])
