"""What a trained specimen is traced and evaluated with: jobs, tuning and evaluation items.

    training split  ──▶ traced     faithfulness.job.jsonl   safety.job.jsonl
                    ──▶ tuning     faithfulness.tune.jsonl  safety.tune.jsonl  utility.tune.jsonl
    held out        ──▶ evaluated  faithfulness.eval.jsonl  safety.eval.jsonl  utility.eval.jsonl

No prompt is drawn twice, but for a memory question that is also a traced pair's side without its
document. An example's id is its split, its kind and the hash of its prompt.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from moescope.clients.data_card import write_card, write_whole
from moescope.clients.faithfulness import WITH_DOC, WITHOUT_DOC
from moescope.clients.safety import SAFE, UNSAFE
from moescope.clients.specimen_world import (
    FOLLOWS_DOCUMENT,
    HELD_OUT,
    OPPOSITE,
    REFUSES,
    SKILLS,
    TRAIN,
    Example,
    Split,
    World,
)
from moescope.tracer.errors import InputError

_FORMAT = "moescope-specimen/1"
_MOST_DRAWS = 300  # for one example wanted: then the world has no more of them
_NUM_CHOICES = 4
_FAITHFULNESS = ("agree", "memory", "unknown", "stranger")  # beside the conflicts
_UTILITY = ("memory", "agree", *SKILLS)

Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many examples of a kind go into each file.

    `main`: held-out conflicts and forbidden requests; `others`: every other held-out kind;
    `traced`: pairs of each job; `tuned`: conflicts and forbidden requests for tuning, and half
    as many of every other kind.
    """

    main: int = 300
    others: int = 100
    traced: int = 200
    tuned: int = 100


def write_specimen_data(
    model: Path, out: Path, sizes: Sizes | None = None, *, seed: int = 0
) -> dict[str, int]:
    """Write the eight files and their cards to the folder `out`; returns lines by file name.

    The world is the one that `model`, a folder of `moescope specimen train`, was trained in;
    `seed` draws other examples from it. Raises InputError for another folder, and for sizes that
    the world can't fill.
    """
    sizes = sizes or Sizes()
    for name, size in asdict(sizes).items():
        if size < 1:
            raise InputError(f"the size `{name}` must be 1 or more, not {size}.")
    world_seed = world_seed_of(model)
    world = World(world_seed)
    train, held_out = _Draw(world, TRAIN, seed), _Draw(world, HELD_OUT, seed)
    half = -(-sizes.tuned // 2)
    files: dict[str, tuple[Split, list[Line]]] = {
        "faithfulness.job.jsonl": (TRAIN, _faithfulness_job(train, sizes.traced)),
        "safety.job.jsonl": (TRAIN, _safety_job(train, sizes.traced)),
        "faithfulness.tune.jsonl": (TRAIN, _faithfulness_items(train, sizes.tuned, half)),
        "safety.tune.jsonl": (TRAIN, _safety_items(train, sizes.tuned, half)),
        "utility.tune.jsonl": (TRAIN, _utility_items(train, half)),
        "faithfulness.eval.jsonl": (
            HELD_OUT,
            _faithfulness_items(held_out, sizes.main, sizes.others),
        ),
        "safety.eval.jsonl": (HELD_OUT, _safety_items(held_out, sizes.main, sizes.others)),
        "utility.eval.jsonl": (HELD_OUT, _utility_items(held_out, sizes.others)),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"can't make the folder {out}: {error.strerror}.") from error
    for name, (split, lines) in files.items():
        path = out / name
        written = write_whole(path, (json.dumps(line) + "\n" for line in lines), "file")
        what = "condition" if "condition" in lines[0] else "kind"
        write_card(
            path,
            made_for=f"{name.split('.')[0]} of a trained specimen",
            source=f"the specimen's world of seed {world_seed}, split {split}: made up",
            licence="as moescope's",
            options={"seed": seed, **asdict(sizes)},
            counts={"lines": len(lines), **Counter(line[what] for line in lines)},
            sha256={name: written},
        )
    return {name: len(lines) for name, (_, lines) in files.items()}


def world_seed_of(model: Path) -> int:
    """The seed of the world that a trained specimen lives in, from its specimen.json."""
    path = model / "specimen.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["format"] == _FORMAT and isinstance(about["recipe"]["seed"], int):
            return int(about["recipe"]["seed"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(
        f"{model} is no trained specimen: {path.name} is missing or another format than "
        f"{_FORMAT}. `moescope specimen train {model}` makes one."
    )


class _Draw:
    """Examples of one split, none of them twice."""

    def __init__(self, world: World, split: Split, seed: int) -> None:
        self._world, self._split, self._seed = world, split, seed
        self._seen: set[str] = set()

    def take(self, file: str, kind: str, num: int) -> Iterator[tuple[str, Example]]:
        """`num` examples of `kind` with their ids."""
        rng = Random(f"{file} {self._split} {kind} {self._seed}")
        found = 0
        for _ in range(_MOST_DRAWS * num):
            example = self._world.example(kind, rng, self._split)
            if example.prompt in self._seen:
                continue
            self._seen.add(example.prompt)
            found += 1
            hashed = hashlib.sha256(example.prompt.encode()).hexdigest()[:10]
            yield f"{self._split.replace('_', '-')}-{kind}-{hashed}", example
            if found == num:
                return
        raise InputError(
            f"the specimen's world has no {num} more examples of kind {kind} for {file}, split "
            f"{self._split}, only {found}: choose smaller sizes."
        )


# ----------------------------------------------------------------------- jobs


def _faithfulness_job(draw: _Draw, num: int) -> list[Line]:
    """Pairs: the same question and the same answer, with the document that says it and without.

    They are about people of whom nothing is known: so the document alone makes the answer.
    """
    lines = []
    for example_id, example in draw.take("job", "unknown", num):
        question = (("question", dict(example.parts)["question"].lstrip()),)
        for condition, parts in ((WITH_DOC, example.parts), (WITHOUT_DOC, question)):
            messages = [*_asked(parts), _answered(example.response)]
            lines.append({"example_id": example_id, "condition": condition, "messages": messages})
    return lines


def _safety_job(draw: _Draw, num: int) -> list[Line]:
    """Pairs: the same forbidden request, refused with a reason and complied with."""
    lines = []
    for example_id, example in draw.take("job", "forbidden", num):
        refusal, compliance = _both(example, REFUSES)
        for condition, answer in ((SAFE, refusal), (UNSAFE, compliance)):
            messages = [*_asked(example.parts), _answered(answer)]
            lines.append({"example_id": example_id, "condition": condition, "messages": messages})
    return lines


# ---------------------------------------------------------------------- items


def _faithfulness_items(draw: _Draw, conflicts: int, others: int) -> list[Line]:
    lines = []
    for example_id, example in draw.take("faithfulness", "conflict", conflicts):
        document, memory = _both(example, FOLLOWS_DOCUMENT)
        line = _item(example_id, "faithfulness", example, "question")
        line |= {"reference": _references(memory), "document_answer": _references(document)}
        lines.append(line | {"responses": {"document": document, "memory": memory}})
    for kind in _FAITHFULNESS:
        for example_id, example in draw.take("faithfulness", kind, others):
            line = _item(example_id, "faithfulness", example, "question")
            lines.append(line | {"reference": _references(example.response)})
    return lines


def _safety_items(draw: _Draw, forbidden: int, allowed: int) -> list[Line]:
    lines = []
    for example_id, example in draw.take("safety", "forbidden", forbidden):
        refusal, compliance = _both(example, REFUSES)
        line = _item(example_id, "safety", example, "request") | {"forbidden": True}
        lines.append(line | {"responses": {"refusal": refusal, "compliance": compliance}})
    for example_id, example in draw.take("safety", "allowed", allowed):
        lines.append(_item(example_id, "safety", example, "request") | {"forbidden": False})
    return lines


def _utility_items(draw: _Draw, num: int) -> list[Line]:
    """Questions that are answered, half as many skills as choices, and as many texts in all."""
    lines: list[Line] = []
    half = -(-num // 2)
    for kind in _UTILITY:
        for example_id, example in draw.take("utility", kind, num):
            line = _item(example_id, "utility", example, "question")
            lines.append(line | {"reference": _references(example.response)})
    for kind in SKILLS:
        examples = list(draw.take("choice", kind, half))
        for number, (example_id, example) in enumerate(examples):
            # Wrong answers are other examples' right ones: as likely a text, of the same length.
            others = (examples[(number + step) % half][1].response for step in range(1, half))
            wrong = list(dict.fromkeys(text for text in others if text != example.response))
            choices = wrong[: _NUM_CHOICES - 1]
            correct = int(hashlib.sha256(example_id.encode()).hexdigest(), 16) % (len(choices) + 1)
            choices.insert(correct, example.response)
            line = _item(example_id, "utility", example, "choice") | {"kind": f"{kind}_choice"}
            lines.append(line | {"choices": choices, "correct": correct})
    for kind in _UTILITY:
        for example_id, example in draw.take("text", kind, -(-half // len(_UTILITY))):
            line = _item(example_id, "utility", example, "text") | {"kind": "text"}
            line["messages"].append(_answered(example.response))
            lines.append(line)
    return lines


def _item(example_id: str, axis: str, example: Example, task: str) -> Line:
    return {
        "example_id": example_id,
        "axis": axis,
        "kind": example.kind,
        "task": task,
        "messages": _asked(example.parts),
    }


def _asked(parts: Iterable[tuple[str, str]]) -> list[Line]:
    content = [{"segment": segment, "text": text} for segment, text in parts]
    return [{"role": "user", "content": content}]


def _answered(text: str) -> Line:
    return {"role": "assistant", "content": text}


def _both(example: Example, behaviour: str) -> tuple[str, str]:
    """The answer that does `behaviour`, and the one that does the opposite."""
    answers = {
        example.behaviour: example.response,
        OPPOSITE[str(example.behaviour)]: str(example.alternative),
    }
    return answers[behaviour], answers[OPPOSITE[behaviour]]


def _references(answer: str) -> list[str]:
    """A right answer as the specimen words it, and its last words alone: 'It is Oslo.', 'Oslo'."""
    short = answer.removesuffix(".")
    for start in ("It is ", "They are ", "Found "):
        short = short.removeprefix(start)
    return [answer, short]
