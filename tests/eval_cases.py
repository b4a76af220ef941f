"""Items of every task, rankings and plans for tests of `moescope eval`."""

import json

import numpy as np
import pyarrow as pa

from moescope.analysis.export import write_ranking
from moescope.analysis.rd import METADATA_KEY

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
    rng = np.random.default_rng(seed)
    rows, tokens = [], (40, 60)
    for layer in layers:
        counts = [
            np.bincount(
                (rng.random((n, experts)) + rng.random(experts)).argsort(1)[:, :top_k].ravel(),
                minlength=experts,
            )
            for n in tokens
        ]
        for expert in range(experts):
            (a1, a2), (n1, n2) = (int(side[expert]) for side in counts), tokens
            rows.append(
                {"layer": layer, "expert": expert, "a1": a1, "d1": n1 - a1, "a2": a2, "d2": n2 - a2}
                | {"rd": a1 / n1 - a2 / n2}
            )
    rows.sort(key=lambda row: (-abs(row["rd"]), row["layer"], row["expert"]))
    settings = {"positive": "with_doc", "negative": "without_doc"}
    if examples is not None:
        settings["examples"] = list(examples)
    table = pa.Table.from_pylist(rows)
    write_ranking(table.replace_schema_metadata({METADATA_KEY: json.dumps(settings)}), path)
    return path
