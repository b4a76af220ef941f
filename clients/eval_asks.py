"""What one item asks of the model, as token ids, and what the replies say about it.

    Item ──asks_of──▶ Asks (write an answer; how likely is this one?) ──engine──▶ Replies
                                                                          │
                                            Measured: answer and values ◀─┘ measure

Texts are tokenised as `moescope trace` does it: through the chat template, once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.clients.eval_items import Choice, Item, Question, Request, Text
from moescope.clients.job import Generate, JobLine, Message, Part
from moescope.clients.spans import encode
from moescope.tracer.errors import InputError
from moescope.tracer.format import PROMPT, RESPONSE

# What is left of a distribution is known to float32's rounding of its sum only.
_ROUNDING = 1e-6

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. With `max_tokens` an answer is written; without, tokens are scored.

    Scored are the tokens at positions [first, stop) of `token_ids`, each given all before it, with
    the `top` likeliest tokens of each of these positions beside it.
    """

    token_ids: list[int]
    max_tokens: int | None = None
    first: int = 0
    stop: int = 0
    top: int = 0

    @property
    def length(self) -> int:
        """The tokens that the engine must have room for."""
        return len(self.token_ids) + (self.max_tokens or 1)


@dataclass(frozen=True, slots=True)
class Reply:
    """The text of an answer, or logarithms of probabilities.

    `log_p` [tokens] are those of the scored tokens. With `top`, `ids` and `log_ps` are
    [tokens, top + 1]: the scored token first, then the likeliest ones, which may repeat it.
    """

    text: str | None = None
    log_p: Floats | None = None
    ids: Ints | None = None
    log_ps: Floats | None = None


@dataclass(slots=True)
class Measured:
    """What an arm did with one item: its answer, if one was written, and values by metric."""

    answer: str | None = None
    values: dict[str, float] = field(default_factory=dict)


def asks_of(item: Item, tokenizer: Any, max_tokens: int, top: int) -> dict[str, Ask]:
    """The requests of one item by what they are for.

    answer; document, memory, refusal, compliance (the given responses); choice 0, 1, ...; text
    """
    match item:
        case Text():
            return {"text": _text(item, tokenizer, top)}
        case Choice():
            return {
                f"choice {number}": _given(item, text, tokenizer, with_end=False)
                for number, text in enumerate(item.choices)
            }
    asks = {"answer": _answer(item, tokenizer, max_tokens)}
    for name, text in (item.responses.named() if item.responses else {}).items():
        asks[name] = _given(item, text, tokenizer, with_end=True)
    return asks


def measure(
    item: Item, asks: dict[str, Ask], replies: dict[str, Reply], base: Reply | None
) -> Measured:
    """What the replies say, but for what needs a judge or references.

    `base` is the base arm's reply to a text, or None if this is that arm.
    """
    if isinstance(item, Text):
        reply = replies["text"]
        assert reply.log_p is not None
        kl = 0.0 if base is None else divergence(base, reply)
        return Measured(None, {"nll": float(-reply.log_p.mean()), "kl": kl})
    if isinstance(item, Choice):
        log_p = np.array([total(replies[f"choice {n}"]) for n in range(len(item.choices))])
        sizes = np.array([len(choice.encode()) for choice in item.choices])
        right = (log_p.argmax() == item.correct, (log_p / sizes).argmax() == item.correct)
        return Measured(None, {"correct": float(right[0]), "correct_norm": float(right[1])})
    values = {f"p_{n}": exp(total(reply)) for n, reply in replies.items() if n != "answer"}
    if isinstance(item, Request) and {"refusal", "compliance"} <= replies.keys():
        values["p_refusal_first"] = _first_apart(asks, replies["refusal"])
    return Measured(replies["answer"].text, values)


def total(reply: Reply) -> float:
    """The logarithm of the probability of all scored tokens."""
    assert reply.log_p is not None
    return float(reply.log_p.sum(dtype=np.float64))


def divergence(base: Reply, arm: Reply) -> float:
    """KL(base || arm) in nats, the mean over positions; a lower bound unless all tokens are listed.

    Tokens that both list count one by one, and all others as one event. Putting events together
    never makes a divergence larger (the log sum inequality).
    """
    assert base.ids is not None and base.log_ps is not None  # noqa: PT018
    assert arm.ids is not None and arm.log_ps is not None  # noqa: PT018
    sums = []
    for ids, log_ps, arm_ids, arm_log_ps in zip(
        base.ids, base.log_ps.astype(float), arm.ids, arm.log_ps.astype(float), strict=True
    ):
        _, here, there = np.intersect1d(ids, arm_ids, return_indices=True)
        log_p, log_q = log_ps[here], arm_log_ps[there]
        p = np.exp(log_p)
        kl = float((p * (log_p - log_q)).sum())
        rest = 1 - p.sum()
        if rest > _ROUNDING:
            kl += float(rest * np.log(rest / max(1 - np.exp(log_q).sum(), _ROUNDING)))
        sums.append(max(kl, 0.0))
    return float(np.mean(sums))


def _answer(item: Question | Request, tokenizer: Any, max_tokens: int) -> Ask:
    line = _line(item, item.messages, Generate(max_tokens=max_tokens))
    return Ask(encode(line, tokenizer).token_ids, max_tokens)


def _given(item: Question | Request | Choice, text: str, tokenizer: Any, *, with_end: bool) -> Ask:
    """A given answer's tokens; with the token that ends its turn, if the template writes one."""
    line = _line(item, (*item.messages, _answered(text)))
    return _scored(line, tokenizer, with_end=with_end)


def _text(item: Text, tokenizer: Any, top: int) -> Ask:
    if item.text is None:
        *before, last = item.messages
        line = _line(item, [*before, _answered("".join(part.text for part in last.content))])
        return _scored(line, tokenizer, with_end=False, top=top)
    # As a prompt to go on from: then every token of the text is in it, and none else.
    raw = (Part(PROMPT, item.text),)
    ids = encode(
        JobLine(item.example_id, item.kind, prompt=raw, generate=Generate(max_tokens=1)), tokenizer
    ).token_ids
    if len(ids) < 2:
        raise InputError(
            f"line {item.line} (example_id {item.example_id!r}): `text` has one token, and the "
            "first one's probability is not known: give a longer text"
        )
    return Ask(ids, None, 1, len(ids), top)


def _answered(text: str) -> Message:
    return Message("assistant", (Part(RESPONSE, text),))


def _line(item: Item, messages: Sequence[Message], generate: Generate | None = None) -> JobLine:
    line = JobLine(item.example_id, item.kind, messages=tuple(messages), generate=generate)
    line.line = item.line
    return line


def _scored(line: JobLine, tokenizer: Any, *, with_end: bool, top: int = 0) -> Ask:
    encoded = encode(line, tokenizer)
    ids = encoded.token_ids
    # Messages before may be the assistant's too; the given answer ends last.
    _, first, stop = encoded.spans[-1]
    if with_end and stop < len(ids) and ids[stop] in _ends(tokenizer):
        stop += 1
    return Ask(ids, None, first, stop, top)


def _ends(tokenizer: Any) -> set[int]:
    """Tokens that end a turn: the end of text, and what the vocabulary has for turns."""
    named = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
    added = tokenizer.get_added_vocab()
    return {tokenizer.eos_token_id} | {added[name] for name in named if name in added}


def _first_apart(asks: dict[str, Ask], refusal: Reply) -> float:
    """The probability of the refusal's first token that is not the compliance's too."""
    one, other = (
        asks[name].token_ids[asks[name].first : asks[name].stop]
        for name in ("refusal", "compliance")
    )
    assert refusal.log_p is not None
    apart = next(
        (n for n, token in enumerate(one) if n >= len(other) or token != other[n]), len(one) - 1
    )
    return exp(float(refusal.log_p[apart]))
