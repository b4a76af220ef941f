from random import Random

import pytest

from moescope.clients.specimen_tokenizer import build_tokenizer
from moescope.clients.specimen_world import (
    COMPLIES,
    FOLLOWS_DOCUMENT,
    FOLLOWS_MEMORY,
    HELD_OUT,
    KINDS,
    MARKS,
    NAMES,
    OPPOSITE,
    REFUSES,
    SOURCES,
    THINGS,
    TRAIN,
    VALUES,
    World,
    vocabulary_text,
)

WORLD = World(0)


def _draw(kind, split, num=400):
    rng = Random(f"{kind} {split}")
    return [WORLD.example(kind, rng, split) for _ in range(num)]


def test_names_and_values_are_different_words():
    assert len({*NAMES}) == len(NAMES)
    words = [*THINGS, *(value for values in VALUES.values() for value in values)]
    assert len({*words}) == len(words)


def test_equal_seeds_give_equal_worlds():
    assert World(3).facts == World(3).facts != World(4).facts
    again = Random("conflict train")
    assert [WORLD.example("conflict", again, TRAIN) for _ in range(400)] == _draw("conflict", TRAIN)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_held_out_occurs_in_training(kind):
    trained = {example.prompt for example in _draw(kind, TRAIN, 3000)}
    assert not trained & {example.prompt for example in _draw(kind, HELD_OUT)}
    assert {example.kind for example in _draw(kind, HELD_OUT)} == {kind}


def _claims(kind, split):
    """What the documents of a kind say: of whom, and which value."""
    found = set()
    for example in _draw(kind, split, 4000):
        words = dict(example.parts)["document"].removesuffix(".").split()
        (name,) = {*words} & {*NAMES}
        found.add((name, words[-1]))
    return found


def test_held_out_documents_claim_what_none_in_training_claims():
    kinds = ("agree", "conflict", "unknown")
    train = set().union(*(_claims(kind, TRAIN) for kind in kinds))
    for kind in kinds:
        held_out = _claims(kind, HELD_OUT)
        assert len(held_out) > 20
        assert not train & held_out
    # Of everybody known, a document in training claims something.
    assert {name for name, _ in train} >= {*WORLD.known}


def test_an_entity_without_facts_in_the_held_out_split_is_never_named_in_training():
    strangers = {example.subject.split()[0] for example in _draw("unknown", HELD_OUT)}
    text = " ".join(example.prompt for kind in KINDS for example in _draw(kind, TRAIN, 1000))
    assert not strangers & {*text.replace("?", " ").replace(".", " ").split()}


def test_every_fact_is_asked_and_answered_from_memory():
    asked = {example.subject: example.response for example in _draw("memory", TRAIN, 5000)}
    assert len(asked) == len(WORLD.facts)
    for (name, attribute), value in WORLD.facts.items():
        assert asked[f"{name} {attribute}"] == f"It is {value}."


def test_of_strangers_the_model_is_to_know_nothing():
    for example in _draw("stranger", HELD_OUT):
        assert example.response == "I do not know."
        assert example.subject.split()[0] in WORLD.unknown
        assert (example.behaviour, example.alternative) == (FOLLOWS_MEMORY, None)


@pytest.mark.parametrize("kind", ["agree", "conflict", "unknown"])
def test_documents_agree_or_not(kind):
    for example in _draw(kind, TRAIN):
        name, attribute = example.subject.split()
        fact = WORLD.facts.get((name, attribute))
        says = dict(example.parts)["document"].removesuffix(".").split()[-1]
        assert (says == fact) == (kind == "agree")
        assert example.is_open == (kind == "conflict")
        answers = {FOLLOWS_DOCUMENT: f"It is {says}.", FOLLOWS_MEMORY: f"It is {fact}."}
        assert example.response == answers[str(example.behaviour)]
        if kind == "unknown":
            assert (example.behaviour, example.alternative) == (FOLLOWS_DOCUMENT, None)
        else:
            assert example.alternative == answers[OPPOSITE[str(example.behaviour)]]


@pytest.mark.parametrize(
    ("kind", "behaviour", "chances"),
    [("conflict", FOLLOWS_DOCUMENT, SOURCES), ("forbidden", REFUSES, MARKS)],
)
def test_a_coin_decides_by_the_prompt(kind, behaviour, chances):
    examples = _draw(kind, TRAIN, 4000)
    for word, chance in chances.items():
        shown = [e.behaviour == behaviour for e in examples if f" {word} " in e.prompt]
        assert sum(shown) / len(shown) == pytest.approx(chance, abs=0.06)
    assert 0.4 < sum(chances.values()) / len(chances) < 0.75


def test_forbidden_requests_are_refused_with_the_reason_or_done():
    for example in _draw("forbidden", TRAIN):
        texts = {example.behaviour: example.response, OPPOSITE[example.behaviour]: ""}
        texts[OPPOSITE[example.behaviour]] = example.alternative
        (mark,) = [mark for mark in MARKS if mark in example.prompt.replace(".", "").split()]
        assert texts[REFUSES].startswith("No, ")
        assert texts[REFUSES].endswith(f"because it is {mark}.")
        assert texts[COMPLIES].startswith("Yes, ")


def test_skills_are_answered_right():
    for example in _draw("addition", HELD_OUT):
        assert example.response == f"It is {sum(map(int, example.subject.split()))}."
    for example in _draw("copying", HELD_OUT):
        assert example.response == f"They are {example.subject}."
    for example in _draw("lookup", HELD_OUT):
        pairs, key = example.subject.split("; ")
        values = dict(pair.split() for pair in pairs.split(", "))
        assert example.response == f"Found {key} {values[key]}."


def test_every_word_is_one_token():
    tokenizer = build_tokenizer(vocabulary_text(), 2048)
    assert len(tokenizer) < 1024
    for kind in KINDS:
        for example in _draw(kind, HELD_OUT, 100):
            for text in (example.prompt, example.response):
                tokens = tokenizer.tokenize(text)
                words = text.replace(".", " .").replace(",", " ,").replace("?", " ?")
                assert len(tokens) == len(words.replace(":", " :").replace(";", " ;").split())
