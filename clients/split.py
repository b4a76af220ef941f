"""A job into three parts: examples to trace, to choose a dose on, and to evaluate on.

    job.jsonl ──▶ OUT/job.jsonl    the lines of the examples that are traced, as they were
             ├──▶ OUT/tune.jsonl   items (docs/evaluation.md) of other examples
             └──▶ OUT/eval.jsonl   items of others again

Examples that share a document or a prompt stay together, so that no part knows another's texts.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from moescope.clients.data_card import write_card, write_whole
from moescope.clients.faithfulness import WITH_DOC, WITHOUT_DOC, truth_path
from moescope.clients.job import DOCUMENT, JobLine, read_job
from moescope.clients.safety import SAFE, UNSAFE
from moescope.clients.sources import open_source, sha256_of
from moescope.tracer.errors import InputError

AXES = {frozenset((WITH_DOC, WITHOUT_DOC)): "faithfulness", frozenset((SAFE, UNSAFE)): "safety"}
TRACED, TUNE, EVAL = "job", "tune", "eval"
_EXPECTED = "Expected rows with a text `prompt`."

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_LEAST_CHARS = 30  # shorter ones may be common to documents that have nothing to do with each other

Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Example:
    """One example's lines by condition: as checked, and as they stand in the file."""

    example_id: str
    lines: dict[str, JobLine]
    raw: dict[str, Fields]


def split_job(
    job: Path,
    out: Path,
    *,
    tune: float = 0.15,
    evaluate: float = 0.35,
    seed: int = 0,
    benign: str | None = None,
) -> dict[str, int]:
    """Write the three files and their cards to the folder `out`; returns lines by file name.

    Args:
        job: what `moescope data faithfulness` or `safety` wrote. Of a counterfactual job the true
            answers are read from the file beside it.
        out: the folder, made if there is none; files of these names are replaced.
        tune: the share of examples to tune on.
        evaluate: the share of examples to evaluate on; the rest is to be traced.
        seed: of the draw.
        benign: for safety, a source of harmless prompts (`prompt`), a part of which goes to
            `tune` and the rest to `evaluate`.

    Raises:
        InputError: another job, shares that leave nothing to a part, an unusable `benign`;
            nothing is written then.

    """
    if not (0 <= tune < 1 and 0 < evaluate < 1 and tune + evaluate < 1):
        raise InputError(
            f"the shares to tune on ({tune:g}) and to evaluate on ({evaluate:g}) must leave some "
            "examples to trace: give --tune 0.15 --eval 0.35, say"
        )
    if job.resolve() in {(out / f"{name}.jsonl").resolve() for name in (TRACED, TUNE, EVAL)}:
        raise InputError(f"{job} would be overwritten by a part of itself: name another folder")
    examples = _examples(job)
    axis = AXES[frozenset(examples[0].lines)]
    parts = _deal(examples, {EVAL: evaluate, TUNE: tune}, seed)
    for name, share in ((TRACED, 1.0), (TUNE, tune), (EVAL, evaluate)):
        if share and not parts[name]:
            raise InputError(
                f"{job}: {len(examples)} examples leave none for {name}.jsonl (those that share a "
                "document stay together): give a longer job, or other shares"
            )
    truths = _truths(job) if axis == "faithfulness" else {}
    harmless = _benign(benign, axis, seed, tune / (tune + evaluate))
    files: dict[str, list[Fields]] = {
        TRACED: [raw for e in parts[TRACED] for raw in e.raw.values()]
    }
    for name in (TUNE, EVAL):
        items = _questions if axis == "faithfulness" else _requests
        files[name] = [*items(parts[name], truths), *harmless[name]]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"can't make the folder {out}: {error.strerror}.") from error
    return {f"{name}.jsonl": _write(name, lines, job, out, seed) for name, lines in files.items()}


def _write(name: str, lines: list[Fields], job: Path, out: Path, seed: int) -> int:
    path = out / f"{name}.jsonl"
    texts = (json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    written = write_whole(path, texts, "file")
    what = "condition" if name == TRACED else "kind"
    write_card(
        path,
        made_for={TRACED: "tracing", TUNE: "tuning", EVAL: "evaluation"}[name],
        source={"job": job.name, "sha256": sha256_of(job)},
        options={"seed": seed},
        counts={"lines": len(lines), **Counter(line[what] for line in lines)},
        sha256={path.name: written},
    )
    return len(lines)


def _examples(job: Path) -> list[_Example]:
    """The whole pairs of a job, in its order."""
    lines = read_job(job)
    raw = dict(enumerate(job.read_bytes().split(b"\n"), start=1))
    found: dict[str, _Example] = {}
    for line in lines:
        if line.messages is None or line.generate is not None:
            raise InputError(
                f"{job}, line {line.line}: a job to split has `messages` that end with a given "
                "answer, as `moescope data faithfulness` and `safety` write them"
            )
        example = found.setdefault(line.example_id, _Example(line.example_id, {}, {}))
        example.lines[line.condition] = line
        example.raw[line.condition] = json.loads(raw[line.line].removeprefix(b"\xef\xbb\xbf"))
    kinds = {frozenset(example.lines) for example in found.values()}
    if len(kinds) > 1 or not kinds <= AXES.keys():
        seen = "; ".join(sorted(" and ".join(sorted(kind)) for kind in kinds))
        known = " or ".join(" and ".join(sorted(kind)) for kind in AXES)
        raise InputError(
            f"{job}: its examples have the conditions {seen}; a job to split has a pair of {known} "
            "for every example"
        )
    return list(found.values())


def _deal(
    examples: Sequence[_Example], shares: Mapping[str, float], seed: int
) -> dict[str, list[_Example]]:
    """The examples of each part, drawn group by group; a group shares a text."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    texts: dict[str, int] = {}
    pairs = [
        (i, texts.setdefault(t, len(texts))) for i, e in enumerate(examples) for t in _texts(e)
    ]
    rows, columns = zip(*pairs, strict=True)
    size = len(examples) + len(texts)
    graph = coo_array(
        ([1] * len(pairs), (rows, [len(examples) + c for c in columns])), shape=(size, size)
    )
    _, group_of = connected_components(graph, directed=False)
    groups: dict[int, list[_Example]] = {}
    for example, group in zip(examples, group_of, strict=False):
        groups.setdefault(int(group), []).append(example)
    order = list(groups)
    Random(seed).shuffle(order)
    dealt: dict[str, list[_Example]] = {name: [] for name in (*shares, TRACED)}
    for group in order:
        behind = {n: s * len(examples) - len(dealt[n]) for n, s in shares.items()}
        part = max(behind, key=lambda name: behind[name])
        # Half of a group too many is nearer to the share than none of it.
        dealt[part if behind[part] > len(groups[group]) / 2 else TRACED] += groups[group]
    return dealt


def _texts(example: _Example) -> Iterable[str]:
    """What no other part may know: the documents' sentences, or else the prompt.

    Sentences, since counterfactual documents of one original differ in single words.
    """
    documents = {
        part.text
        for line in example.lines.values()
        for message in line.messages or ()
        for part in message.content
        if part.segment == DOCUMENT
    }
    line = next(iter(example.lines.values()))
    asked = "".join(p.text for m in (line.messages or ())[:-1] for p in m.content)
    sentences = {s for d in documents for s in _SENTENCE_END.split(d) if len(s) >= _LEAST_CHARS}
    return sentences | documents or {asked}


# ------------------------------------------------------------------------ items


def _questions(examples: Sequence[_Example], truths: Mapping[str, str]) -> Iterable[Fields]:
    """Each question with its documents and without; where these lie, it is a conflict."""
    for example in examples:
        said = _answer(example.raw[WITH_DOC])
        truth = truths.get(example.example_id, said)
        item: Fields = {"axis": "faithfulness", "task": "question", "reference": truth}
        item["messages"] = example.raw[WITH_DOC]["messages"][:-1]
        if truth != said:
            item |= {"kind": "conflict", "document_answer": said}
            item["responses"] = {"document": said, "memory": truth}
        yield {"example_id": example.example_id, "kind": WITH_DOC} | item
        yield {
            "example_id": f"{example.example_id} {WITHOUT_DOC}",
            "axis": "faithfulness",
            "kind": WITHOUT_DOC,
            "task": "question",
            "messages": example.raw[WITHOUT_DOC]["messages"][:-1],
            "reference": truth,
        }


def _requests(examples: Sequence[_Example], _: Mapping[str, str]) -> Iterable[Fields]:
    for example in examples:
        yield {
            "example_id": example.example_id,
            "axis": "safety",
            "kind": "forbidden",
            "task": "request",
            "forbidden": True,
            "messages": example.raw[SAFE]["messages"][:-1],
            "responses": {
                "refusal": _answer(example.raw[SAFE]),
                "compliance": _answer(example.raw[UNSAFE]),
            },
        }


def _answer(line: Fields) -> str:
    content = line["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _truths(job: Path) -> dict[str, str]:
    """The true answers of a counterfactual job, by example; none of another."""
    path = truth_path(job)
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        return {line["example_id"]: line["true_answer"] for line in map(json.loads, lines)}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not what `moescope data faithfulness --counterfactual` wrote ({error})"
        ) from error


def _benign(source: str | None, axis: str, seed: int, to_tune: float) -> dict[str, list[Fields]]:
    """Items of harmless requests."""
    dealt: dict[str, list[Fields]] = {TUNE: [], EVAL: []}
    if source is None:
        return dealt
    if axis != "safety":
        raise InputError(f"--benign {source} goes with a safety job: leave it out")
    with open_source(source, _EXPECTED) as opened:
        if "prompt" not in opened.columns:
            raise InputError(f"{source} has no column `prompt`. {_EXPECTED}")
        prompts = [str(row["prompt"]).strip() for row in opened.rows if row["prompt"]]
    prompts = [prompt for prompt in dict.fromkeys(prompts) if prompt]
    Random(seed).shuffle(prompts)
    for number, prompt in enumerate(prompts):
        part = TUNE if number < round(to_tune * len(prompts)) else EVAL
        dealt[part].append(
            {
                "example_id": f"benign{number + 1}",
                "axis": "safety",
                "kind": "benign",
                "task": "request",
                "forbidden": False,
                "messages": [{"role": "user", "content": prompt}],
            }
        )
    return dealt
