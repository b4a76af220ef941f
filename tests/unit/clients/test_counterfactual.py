import pytest

from moescope.clients.counterfactual import Answers, kind_of, occurs, place_of
from moescope.clients.questions import Question


@pytest.mark.parametrize(
    ("kind", "answers"),
    [
        ("date", ["3 May 1577", "May 3", "October", "the 9th century"]),
        ("year", ["1577", "1570s", "412 BC", "AD 14"]),
        ("percentage", ["5%", "about 12 percent"]),
        ("sum of money", ["$5 million", "ten dollars", "€3"]),
        ("number", ["42", "more than 3,000", "the 12th", "-4.5"]),
        ("number in words", ["seven", "About forty", "two million"]),
        ("name", ["Anna Sarn", "Lake Immer", "the Mill of Vell", "Apollo 11"]),
        ("other", ["a bell", "salt traders", "onerous work", "Anna and her sons"]),
    ],
)
def test_kinds(kind, answers):
    assert {answer: kind_of(answer) for answer in answers} == dict.fromkeys(answers, kind)


def test_an_answer_is_found_as_whole_words():
    assert occurs("5", "It has 5, or 5.")
    assert not occurs("5", "3.5 of 5,000 or 1,5")
    assert not occurs("Norman", "Normans")
    assert occurs("norman", "Norman-French")
    assert occurs("Anna Sarn", "by Anna\n Sarn's")
    assert place_of("Norman", "Normans, a Norman") == (11, 17)
    assert place_of("norman", "The Normans") == (4, 10)
    assert place_of("x", "none") is None


def question(name: str, asked: str, answer: str, *documents: str, aliases=()) -> Question:
    return Question(name, asked, answer, documents, (), aliases)


def test_the_same_question_word_comes_first():
    mine = question("1", "Where is it?", "Vell", "It is in Vell.")
    others = [question(f"p{i}", "Who?", f"Ann{c}", f"Ann{c}.") for i, c in enumerate("abcdefgh")]
    town = question("2", "Where else?", "Tolle", "It is in Tolle.")
    for seed in range(5):
        swapped = Answers([mine, *others, town], seed).swap(mine)
        assert swapped.taken_from == "2"
        assert swapped.question.documents == ("It is in Tolle.",)
    assert Answers([mine, *others], 0).swap(mine).taken_from.startswith("p")


def test_every_document_and_every_right_answer_is_swapped():
    mine = question(
        "1", "Who?", "Anna Sarn", "Anna Sarn. A. S. is us.", "A. S.", aliases=("A. S", "US")
    )
    other = question("2", "Who?", "Otto Brack", "Otto Brack.")
    swapped = Answers([mine, other], 0).swap(mine)
    assert swapped.question.documents == ("Otto Brack. Otto Brack. is us.", "Otto Brack.")
    assert (swapped.true_answer, swapped.question.answer) == ("Anna Sarn", "Otto Brack")


@pytest.mark.parametrize("answer", ["Anna Sarn", "Sarn", "Anna Sarn Tolle", "Mira", "Vell"])
def test_what_is_right_or_in_the_text_already_is_not_taken(answer):
    mine = question("1", "Who is in Vell?", "Anna Sarn", "Anna Sarn, not Mira.")
    other = question("2", "Who?", answer, f"It was {answer}.")
    assert Answers([mine, other], 0).swap(mine) == "without another answer of its kind"


def test_the_answer_is_in_lower_case_where_its_document_has_it_so():
    mine = question("1", "What?", "Salt", "They sold salt. Salt was dear.")
    other = question("2", "What?", "Amber", "They sold amber.")
    assert Answers([mine, other], 0).swap(mine).question.documents == (
        "They sold amber. Amber was dear.",
    )
