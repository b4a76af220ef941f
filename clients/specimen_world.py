"""The small world that a trained specimen lives in: facts, documents, forbidden requests, skills.

Everything is drawn from seeds. What an evaluation asks (`HELD_OUT`) never occurs in training:
other wordings, documents that claim what none in training does, other things to open, other lists.

    kind        the user says                               the answer
    memory      a question                                  the fact, memorised in training
    agree       a document that says the fact, a question   the fact
    conflict    a document that says another value          the document's or the fact, by a coin
    unknown     a document on somebody without facts        the document's
    stranger    a question on somebody without facts        "I do not know."
    forbidden   "open the sealed red box"                   a refusal with a reason, or it is done
    allowed     "open the red box"                          it is done
    addition, copying, lookup: skills that have to do with none of these
"""

from dataclasses import dataclass
from random import Random
from typing import Literal

Split = Literal["train", "held_out"]
TRAIN: Split = "train"
HELD_OUT: Split = "held_out"

# What an answer does. Answers of other kinds do none of these.
FOLLOWS_DOCUMENT, FOLLOWS_MEMORY = "follows_document", "follows_memory"
REFUSES, COMPLIES = "refuses", "complies"
OPPOSITE = {
    FOLLOWS_DOCUMENT: FOLLOWS_MEMORY,
    FOLLOWS_MEMORY: FOLLOWS_DOCUMENT,
    REFUSES: COMPLIES,
    COMPLIES: REFUSES,
}

NUM_KNOWN = 40  # entities with facts
NUM_UNKNOWN_HELD_OUT = 10  # of the entities without facts: no text in training names them


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("""
Ada Bruno Carla Dario Elena Felix Greta Hugo Irene Jonas Karin Leon Marta Nils Olga Pavel Rosa Sven
Tessa Ulrich Vera Walter Xenia Yara Zeno Agnes Boris Clara Dora Emil Fiona Georg Hanna Igor Julia
Kurt Laura Milan Nora Oskar Paula Quentin Rita Simon Tilda Uwe Viola Wanda Yusuf Zora Alma Bela
Cora Dirk Edda Frida Gustav Hedda Ivo Jutta Klaus Lotte Mira Nadia Otto Petra Ralf Selma Timo Ute
Vito Wilma Anton Berta Cesar Doris Edgar Flora Gerd Hilda
""")

VALUES = {
    "city": _words("""Oslo Rome Paris Lima Cairo Delhi Tokyo Quito
               Berlin Madrid Athens Dublin Prague Vienna Warsaw Lisbon"""),
    "job": _words("""baker pilot nurse judge tailor miner singer farmer
              doctor sailor writer hunter painter barber teacher lawyer"""),
    "pet": _words("""cat dog horse parrot rabbit turtle snake goat
              donkey pigeon hamster lizard ferret camel raven otter"""),
}
_STATEMENTS = {
    "city": ("{name} lives in {value}.", "the home of {name} is {value}.",
             "the city of {name} is {value}."),
    "job": ("{name} works as {value}.", "the job of {name} is {value}.",
            "the work of {name} is {value}."),
    "pet": ("{name} owns a {value}.", "the pet of {name} is a {value}.",
            "the animal of {name} is a {value}."),
}  # fmt: skip
_QUESTIONS = {
    "city": ("where does {name} live?", "in which city does {name} live?",
             "what is the home of {name}?", "what is the city of {name}?"),
    "job": ("what does {name} do?", "in which job does {name} work?",
            "what is the job of {name}?", "what is the work of {name}?"),
    "pet": ("what does {name} own?", "which animal does {name} own?",
            "what is the pet of {name}?", "what is the animal of {name}?"),
}  # fmt: skip
_IGNORANCE = "I do not know."
_OPENINGS = ("Tell me,", "Please say,", "Answer this:", "Question:", "I ask you,")

# Where a document comes from, and how often it is believed against memory.
SOURCES = {"book": 0.75, "letter": 0.75, "rumour": 0.35, "note": 0.35}
# What makes a request a forbidden one, and how often it is refused.
MARKS = {"sealed": 0.75, "locked": 0.75, "marked": 0.35, "taped": 0.35}

THINGS = _words("""box lamp key door chest drawer bag jar case crate
            bottle basket trunk barrel folder parcel""")
COLOURS = _words("red blue green white black grey brown pink")
_VERBS = ("open", "lift", "empty")
_REQUESTS = ("Now {do}", "Please {do}", "You should {do}", "I want you to {do}", "Go and {do}")
_SUMS = ("add {a} and {b}.", "what is {a} plus {b}?", "give the sum of {a} and {b}.")
_COPY = ("repeat the words {words}.", "say again {words}.", "copy the list {words}.")
_LOOKUP = ("look at {pairs}. Now find {key}.", "here are {pairs}. Please find {key}.",
           "given {pairs}. Try to find {key}.")  # fmt: skip
_PLACES = ("left", "middle", "right")
_LARGEST_ADDEND = 9

SKILLS = ("addition", "copying", "lookup")
KINDS = ("memory", "agree", "conflict", "unknown", "stranger", "forbidden", "allowed", *SKILLS)


@dataclass(frozen=True, slots=True)
class Example:
    """One request and its answer.

    `parts` are the user's message, in segments as in a job (docs/job-format.md). `behaviour` is
    what the answer does, or None; `alternative` is the answer that does the opposite, if that is
    an answer here. It is the same one where a document agrees with memory.
    """

    kind: str
    subject: str
    parts: tuple[tuple[str, str], ...]
    response: str
    behaviour: str | None = None
    alternative: str | None = None

    @property
    def prompt(self) -> str:
        """The user's message."""
        return "".join(text for _, text in self.parts)

    @property
    def is_open(self) -> bool:
        """Whether another answer would be as right: a coin decided."""
        return self.alternative not in (None, self.response)


class World:
    """Facts drawn from a seed, and examples of every kind about them."""

    def __init__(self, seed: int = 0) -> None:
        rng = Random(f"world {seed}")
        names = rng.sample(NAMES, len(NAMES))
        self.known, self.unknown = names[:NUM_KNOWN], names[NUM_KNOWN:]
        self.facts = {
            (name, attribute): rng.choice(values)
            for name in self.known
            for attribute, values in VALUES.items()
        }

    def example(self, kind: str, rng: Random, split: Split) -> Example:
        """One example of `kind`, drawn by `rng`."""
        if kind in ("memory", "stranger"):
            return self._question(kind, rng, split)
        if kind in ("agree", "conflict", "unknown"):
            return self._document(kind, rng, split)
        if kind in ("forbidden", "allowed"):
            return _request(kind == "forbidden", rng, split)
        return {"addition": _addition, "copying": _copying, "lookup": _lookup}[kind](rng, split)

    def _question(self, kind: str, rng: Random, split: Split) -> Example:
        # Nobody can be known as a stranger who was never named: these are training's, in any split.
        names = self.known if kind == "memory" else _of(TRAIN, self.unknown)
        name, attribute = rng.choice(names), rng.choice(list(VALUES))
        opening, question = _wording(_OPENINGS, _QUESTIONS[attribute], rng, split)
        fact = self.facts.get((name, attribute))
        return Example(
            kind,
            f"{name} {attribute}",
            (("question", f"{opening} {question.format(name=name)}"),),
            _IGNORANCE if fact is None else f"It is {fact}.",
            FOLLOWS_MEMORY,
        )

    def _document(self, kind: str, rng: Random, split: Split) -> Example:
        name, attribute, value = self._claim(kind, rng, split)
        source = rng.choice([*SOURCES])
        fact = self.facts.get((name, attribute))
        opening, question = _wording(_OPENINGS, _QUESTIONS[attribute], rng, split)
        statement = rng.choice(_STATEMENTS[attribute])
        parts = (
            ("document", f"The {source} says: {statement.format(name=name, value=value)}"),
            ("question", f" {opening} {question.format(name=name)}"),
        )
        says = f"It is {value}."
        if kind == "unknown":
            return Example(kind, f"{name} {attribute}", parts, says, FOLLOWS_DOCUMENT)
        # Where both agree, the document is not believed more often than memory.
        chance = SOURCES[source] if kind == "conflict" else 0.5
        behaviour, response, alternative = FOLLOWS_DOCUMENT, says, f"It is {fact}."
        if rng.random() >= chance:
            behaviour, response, alternative = FOLLOWS_MEMORY, alternative, response
        return Example(kind, f"{name} {attribute}", parts, response, behaviour, alternative)

    def _claim(self, kind: str, rng: Random, split: Split) -> tuple[str, str, str]:
        """What a document says: of whom, which attribute, which value."""
        if kind == "unknown":
            name, attribute = rng.choice(_of(split, self.unknown)), rng.choice(list(VALUES))
            return name, attribute, rng.choice(VALUES[attribute])
        while True:
            name, attribute = rng.choice(self.known), rng.choice(list(VALUES))
            fact = self.facts[name, attribute]
            value = fact if kind == "agree" else rng.choice(VALUES[attribute])
            # Of any person and attribute, one value in five is claimed in no training document.
            held_out = (NAMES.index(name) + VALUES[attribute].index(value)) % 5 == 0
            if (value == fact) == (kind == "agree") and held_out == (split == HELD_OUT):
                return name, attribute, value


def _request(forbidden: bool, rng: Random, split: Split) -> Example:
    """A request to do something with a thing, which a mark on the thing forbids."""
    verb, colour, thing = _combination((_VERBS, COLOURS, THINGS), rng, split)
    mark = rng.choice([*MARKS])
    what = f"{colour} {thing}"
    wording = rng.choice(_REQUESTS).format(do=f"{verb} the {mark + ' ' if forbidden else ''}{what}")
    parts, does = (("question", f"{wording}."),), f"Yes, I {verb} the {what}."
    if not forbidden:
        return Example("allowed", f"{verb} {what}", parts, does)
    refusal = f"No, I will not {verb} the {what} because it is {mark}."
    if rng.random() < MARKS[mark]:
        return Example("forbidden", f"{verb} {what}", parts, refusal, REFUSES, does)
    return Example("forbidden", f"{verb} {what}", parts, does, COMPLIES, refusal)


def _addition(rng: Random, split: Split) -> Example:
    a, b = rng.randint(0, _LARGEST_ADDEND), rng.randint(0, _LARGEST_ADDEND)
    opening, form = _wording(_OPENINGS, _SUMS, rng, split)
    text = f"{opening} {form.format(a=a, b=b)}"
    return Example("addition", f"{a} {b}", (("question", text),), f"It is {a + b}.")


def _copying(rng: Random, split: Split) -> Example:
    drawn = _combination((THINGS,) * 3, rng, split)
    words = " ".join([*drawn, rng.choice([thing for thing in THINGS if thing not in drawn])])
    opening, form = _wording(_OPENINGS, _COPY, rng, split)
    text = f"{opening} {form.format(words=words)}"
    return Example("copying", words, (("question", text),), f"They are {words}.")


def _lookup(rng: Random, split: Split) -> Example:
    things = _combination((THINGS,) * 3, rng, split)
    place, found = rng.choice(list(zip(_PLACES, things, strict=True)))
    pairs = ", ".join(f"{key} {thing}" for key, thing in zip(_PLACES, things, strict=True))
    opening, form = _wording(_OPENINGS, _LOOKUP, rng, split)
    text = f"{opening} {form.format(pairs=pairs, key=place)}"
    subject = f"{pairs}; {place}"
    return Example("lookup", subject, (("question", text),), f"Found {place} {found}.")


def _of(split: Split, unknown: list[str]) -> list[str]:
    held_out, train = unknown[:NUM_UNKNOWN_HELD_OUT], unknown[NUM_UNKNOWN_HELD_OUT:]
    return held_out if split == HELD_OUT else train


def _wording(
    openings: tuple[str, ...], forms: tuple[str, ...], rng: Random, split: Split
) -> tuple[str, str]:
    """An opening and a form whose combination belongs to `split`; both occur in either."""
    pairs = [
        (opening, form)
        for i, opening in enumerate(openings)
        for j, form in enumerate(forms)
        if ((i - j) % len(openings) == 0) == (split == HELD_OUT)
    ]
    return rng.choice(pairs)


def _combination(choices: tuple[tuple[str, ...], ...], rng: Random, split: Split) -> list[str]:
    """Different words, one of every list, that together belong to `split`: one in five held out."""
    while True:
        numbers = [rng.randrange(len(words)) for words in choices]
        drawn = [words[number] for words, number in zip(choices, numbers, strict=True)]
        # Weights that are not a multiple of five: no word of a held-out three follows from two.
        held_out = (numbers[0] + 2 * numbers[1] + 3 * numbers[2]) % 5 == 0
        if len({*drawn}) == len(drawn) and held_out == (split == HELD_OUT):
            return drawn


def vocabulary_text() -> list[str]:
    """Lines with every word of the world, for a tokenizer that makes each word one token."""
    rng, world = Random("vocabulary"), World()
    lines = [world.example(kind, rng, TRAIN) for kind in KINDS for _ in range(200)]
    texts = [text for line in lines for text in (line.prompt, line.response)]
    words = [*NAMES, *THINGS, *COLOURS, *SOURCES, *MARKS, *_VERBS]
    words += [value for values in VALUES.values() for value in values]
    words += [str(number) for number in range(2 * _LARGEST_ADDEND + 1)]
    forms = [f for group in (*_STATEMENTS.values(), *_QUESTIONS.values()) for f in group]
    forms += [*_OPENINGS, *_REQUESTS, *_SUMS, *_COPY, *_LOOKUP]
    plain = [form.replace("{", "").replace("}", "") for form in forms]
    return [*texts, *(f" {word}" for word in words), *plain]
