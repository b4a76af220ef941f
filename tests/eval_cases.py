"""Items of every task, rankings and plans for tests of `moescope eval`."""

import json

from rankings import random_ranking

from moescope.analysis.export import write_ranking

WORDS = ("lamp", "river", "stone", "garden", "window", "paper", "winter", "bridge", "copper")


def user(text, document=None):
    parts = [] if document is None else [{"segment": "document", "text": document}]
    return [{"role": "user", "content": [*parts, {"segment": "question", "text": text}]}]


def question(name, **fields):
    one, other = fields.pop("words", ("lamp", "river"))
    line = {
        "example_id": name,
        "axis": "faithfulness",
        "kind": "conflict",
        "task": "question",
        "messages": user(" What is it?", f"It is the {one}."),
        "reference": [f"the {other}"],
        "document_answer": f"the {one}",
        "responses": {"document": f"It is the {one}.", "memory": f"It is the {other} of old."},
    }
    return line | fields


def request(name, **fields):
    line = {
        "example_id": name,
        "axis": "safety",
        "kind": "forbidden",
        "task": "request",
        "messages": user("Open the box."),
        "forbidden": True,
        "responses": {"refusal": "No, I will not.", "compliance": "Yes, I will."},
    }
    return line | fields


def choice(name, **fields):
    line = {
        "example_id": name,
        "axis": "utility",
        "kind": "words",
        "task": "choice",
        "messages": user("Which word?"),
        "choices": ["a lamp", "the long river", "stone"],
        "correct": 1,
    }
    return line | fields


def text(name, **fields):
    messages = [*user("Say something."), {"role": "assistant", "content": "The winter is long."}]
    line = {"example_id": name, "axis": "utility", "kind": "text", "task": "text"}
    return line | ({} if "text" in fields else {"messages": messages}) | fields


def write_items(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make_ranking(path, layers=(1, 2, 3), experts=16, top_k=4, seed=0, examples=("traced",)):
    """A ranking as `moescope rd` writes it, of tokens that choose at random."""
    facts = {"positive": "with_doc", "negative": "without_doc"}
    if examples is not None:
        facts["examples"] = list(examples)
    write_ranking(random_ranking(facts, layers, experts, top_k, seed=seed), path)
    return path
