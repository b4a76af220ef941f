import random

import pytest

from moescope.clients.documents import Cutter, Distractors, Document, ordered
from moescope.clients.questions import Question

GEESE = Question("1", "How many geese?", "ninety", ("Ninety geese.",), (), ("90",))


def test_no_drawn_distractor_holds_a_right_answer():
    others = [
        Question(str(i), "?", "x", (text,))
        for i, text in enumerate(["ninety x", "about 90 x", "x is 190", "nothing x"])
    ]
    for seed in range(8):
        found = Distractors([GEESE, *others], 2, seed).of(GEESE)
        assert sorted(found) == ["nothing x", "x is 190"]
    assert Distractors([GEESE, *others], 3, 0).of(GEESE) is None
    assert Distractors([GEESE, *others], 0, 0).of(GEESE) == []


@pytest.mark.parametrize(
    ("order", "texts"), [("gold-first", "ABxy"), ("gold-last", "xyAB"), ("random", None)]
)
def test_orders(order, texts):
    documents = ordered(["A", "B"], ["x", "y"], order, random.Random(1))
    assert texts is None or "".join(d.text for d in documents) == texts
    assert set(documents) == {Document(t, gold=t in "AB") for t in "ABxy"}


@pytest.mark.parametrize("max_tokens", [4, 7, 12])
def test_words_are_not_cut_in_two(max_tokens):
    cutter = object.__new__(Cutter)
    cutter._max_tokens = max_tokens
    cutter._offsets = lambda text: [(i, min(i + 3, len(text))) for i in range(0, len(text), 3)]
    text = "Every morning the keeper Anna Sarn lights lamps along harbours."
    for answer in ("Anna Sarn", "Every", "harbours", None):
        cut = cutter.cut(text, answer)
        assert len(cutter._offsets(cut)) <= max_tokens
        assert answer is None or answer in cut
        assert all(word in (text + " harbours").split() for word in cut.split())
