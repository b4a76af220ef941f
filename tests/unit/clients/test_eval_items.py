"""Items of an evaluation: what is read, and what is refused in which words."""

import json

import pytest
from eval_cases import choice, question, request, text, user, write_items

from moescope.clients.eval_items import Choice, Question, Request, Text, read_items, refuse_shared
from moescope.tracer.errors import InputError

AXES = ("faithfulness", "safety", "utility")


def without(line, *names):
    return {name: value for name, value in line.items() if name not in names}


def test_items_of_every_task(tmp_path):
    lines = [question("q"), request("r"), choice("c"), text("t"), text("raw", text="All of it.")]
    lines.append(without(question("one", reference="Oslo"), "document_answer", "responses"))
    file = read_items(write_items(tmp_path / "items.jsonl", lines), AXES)
    assert [type(item) for item in file.items] == [Question, Request, Choice, Text, Text, Question]
    first, *_, raw, one = file.items
    assert first.document == "It is the lamp."
    assert first.prompt == "It is the lamp. What is it?"
    assert first.document_answer == ("the lamp",)
    assert first.responses.named() == {
        "document": "It is the lamp.",
        "memory": "It is the river of old.",
    }
    assert (one.reference, one.document_answer, one.responses) == (("Oslo",), (), None)
    assert (raw.prompt, raw.messages) == ("All of it.", ())
    assert file.about()["counts"] == {
        "faithfulness/conflict": 2,
        "safety/forbidden": 1,
        "utility/text": 2,
        "utility/words": 1,
    }


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (without(question("x"), "reference"), "`reference` is missing"),
        (without(question("x"), "axis"), "`axis` is missing"),
        (question("x", axis="truth"), "`axis`"),
        (question("x", colour="red"), "`colour` is no field"),
        (without(question("x"), "task"), "`task` is missing: it must be question, request"),
        (question("x", task="guess"), "`task` is 'guess'"),
        (question("x", kind=" "), "`kind` is blank"),
        (question("x", reference=[]), "`reference`"),
        (question("x", responses={}), "`responses` is empty"),
        (question("x", responses={"refusal": "No."}), "`responses` has `refusal`"),
        (request("x", responses={"document": "No."}), "`responses` has `document`"),
        (question("x", messages=user("What?")), "no part of `messages` has the segment"),
        (question("x", messages=text("t")["messages"]), "must be the user's, not the assistant's"),
        (request("x", forbidden="yes"), "`forbidden`"),
        (request("x", axis="faithfulness"), "`task` is 'request'"),
        (question("x", axis="safety"), "`task` is 'question'"),
        (request("x", axis="utility"), "give the axis safety"),
        (choice("x", correct=3), "the choices are 0 to 2"),
        (choice("x", correct=-1), "`correct`"),
        (choice("x", choices=["one", "one"], correct=0), "the same text"),
        (text("x", text="a", messages=user("b")), "give one of `messages` and `text`"),
        (text("x", messages=user("b")), "must be the assistant's"),
        ("[1]", "not a JSON object"),
        ("{", "not JSON"),
    ],
)
def test_a_bad_line_is_named_with_its_field(tmp_path, line, words):
    path = tmp_path / "items.jsonl"
    bad = line if isinstance(line, str) else json.dumps(line)
    path.write_text(json.dumps(question("good")) + "\n\n" + bad + "\n")
    with pytest.raises(InputError) as error:
        read_items(path, AXES)
    assert f"{path}: 1 line is unusable" in str(error.value)
    assert "line 3: " in str(error.value)
    assert words in str(error.value)


def test_ids_come_once_and_axes_are_those_asked_for(tmp_path):
    path = write_items(tmp_path / "items.jsonl", [question("a"), question("b"), question("a")])
    with pytest.raises(InputError, match="line 3: example_id 'a' is on line 1 already"):
        read_items(path, AXES)
    with pytest.raises(InputError, match="`axis` is 'faithfulness': this file is for utility"):
        read_items(path, ("utility",))
    with pytest.raises(InputError, match="holds no item"):
        read_items(write_items(tmp_path / "empty.jsonl", []), AXES)
    with pytest.raises(InputError, match="can't read the items"):
        read_items(tmp_path / "missing.jsonl", AXES)


def test_shared_examples_are_named():
    refuse_shared({"one": ["a", "b"], "two": ["c"]}, "why")
    with pytest.raises(InputError, match="2 example ids are both in one and in two") as error:
        refuse_shared({"one": ["a", "b", "c"], "two": ["b", "c"]}, "take them out")
    assert "'b', 'c'" in str(error.value)
    assert "take them out" in str(error.value)
