"""From a job line to token ids and the exact tokens of every segment.

    parts ──▶ rendered text + character spans ──▶ tokenise once ──▶ token spans

Segments are never found by searching for a sub-list of tokens: a text does not tokenise alike
alone and in its place. Their characters are known instead (chat templates: `chat_text`), and the
tokenizer's offset mapping carries them over to tokens.

A token that crosses a border counts to the segment of its LAST character. In "Answer: " +
"Paris" many tokenizers merge the space into " Paris", and the response's first word must count
to the response:

    text      A n s w e r : _ P a r i s
    segment   └──── prompt ─────┘└ resp. ┘
    tokens    └─ Answer ─┘└:┘└─ _Paris ─┘      " Paris" ends in the response
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moescope.clients.chat_text import PlacedText, Span, chat_text, describe, raw_text
from moescope.clients.job import Generate, JobLine
from moescope.tracer.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_NO_OWNER = -1


@dataclass(frozen=True, slots=True)
class EncodedRequest:
    """A request as the engine takes it.

    `spans` are (segment, start, stop) with [start, stop) in tokens, ascending and disjoint; a
    token in none of them was written by the template. `generate` is None for teacher forcing.
    """

    token_ids: list[int]
    spans: list[Span]
    generate: Generate | None


def encode(line: JobLine, tokenizer: "PreTrainedTokenizerBase") -> EncodedRequest:
    """The token ids and spans of one line.

    Raises InputError, naming the line, where segments can't be exact: a tokenizer without
    offsets, a chat template that rewrites a message, special tokens written inside a chat
    message, a response or a prompt without a token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"the tokenizer {type(tokenizer).__name__} gives no character offsets, so segments "
            "can't be found in its tokens; use a model with a fast tokenizer (tokenizer.json)."
        )
    is_chat = line.messages is not None
    placed = chat_text(line, tokenizer) if is_chat else raw_text(line)
    tokens = _tokenize(placed.text, tokenizer, add_special_tokens=not is_chat)
    owners = _owners(tokens.last_chars, placed.spans)
    if is_chat:
        _refuse_markup(line, tokens, owners, placed)
    else:
        _refuse_second_bos(line, tokens, tokenizer)
    if not tokens.ids:
        raise InputError(f"{describe(line)}: the prompt has no token; write something in it.")
    in_target = (owners != _NO_OWNER) & (tokens.last_chars >= placed.target_start)
    if line.generate is None and not in_target.any():
        raise InputError(
            f"{describe(line)}: no token ends in the response: it is blank, or all of it merges "
            "with the text that the chat template writes after it."
        )
    return EncodedRequest(tokens.ids, _runs(owners, placed.spans), line.generate)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """`last_chars` [tokens] holds each token's last character, -1 for a token without any.

    `added` holds (index, token text, whether special) of the vocabulary's added tokens.
    """

    ids: list[int]
    last_chars: npt.NDArray[np.int64]
    added: list[tuple[int, str, bool]]


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """What is asked of a tokenizer once: its added tokens, id to (text, whether special)."""

    added: dict[int, tuple[str, bool]]
    untrimmed: "Tokenizer | None"


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: "PreTrainedTokenizerBase") -> _Vocabulary:
    # Runs of spaces are added tokens in some vocabularies; they are text, not markup.
    added = {
        token_id: (token.content, bool(token.special))
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.content.strip(" \t\r\n▁")
    }
    return _Vocabulary(added, _untrimmed(tokenizer.backend_tokenizer))


def _untrimmed(backend: Any) -> "Tokenizer | None":
    """A copy of `backend` whose offsets include whitespace, or None if its own do.

    GPT-NeoX's and RoBERTa's kind of tokenizers (OLMoE's is one) leave the spaces out of the
    offsets: "\\n  " then seems to end with its line feed, and a lone space to have no character.
    """
    from tokenizers import Tokenizer

    processor = backend.post_processor
    if processor is None or b'"trim_offsets":true' not in processor.__getstate__():
        return None
    copy = Tokenizer.from_str(backend.to_str())
    copy.post_processor = None
    copy.no_truncation()
    copy.no_padding()
    return copy


def _tokenize(
    text: str, tokenizer: "PreTrainedTokenizerBase", *, add_special_tokens: bool
) -> _Tokens:
    vocabulary = _vocabulary(tokenizer)
    encoding = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        truncation=False,
        padding=False,
        verbose=False,
    ).encodings[0]
    ids: list[int] = encoding.ids
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    # Tokens that the post-processor put around the text have no sequence, nor characters.
    from_text = np.array([sequence is not None for sequence in encoding.sequence_ids], dtype=bool)
    if vocabulary.untrimmed is not None:
        plain = vocabulary.untrimmed.encode(text, add_special_tokens=False)
        offsets[from_text] = np.array(plain.offsets, dtype=np.int64).reshape(-1, 2)
    starts, stops = offsets[:, 0], offsets[:, 1]
    last_chars = np.where(from_text & (stops > starts), stops - 1, -1)
    added = []
    for index, token_id in enumerate(ids):
        if token_id not in vocabulary.added or last_chars[index] < 0:
            continue
        content, special = vocabulary.added[token_id]
        start, stop = offsets[index].tolist()
        covered = text[start:stop]
        if covered.strip() != content.strip():
            continue  # the unknown token, standing for a character that it is not
        # Some markup tokens swallow the whitespace beside them, which may be a message's: such a
        # token is where its own text is.
        last_chars[index] = start + len(covered.rstrip()) - 1
        added.append((index, content, special))
    return _Tokens(ids, last_chars, added)


def _owners(last_chars: npt.NDArray[np.int64], spans: list[Span]) -> npt.NDArray[np.int64]:
    """The index in `spans` (of characters) that each token counts to, or -1: [tokens]."""
    if not spans:
        return np.full(len(last_chars), _NO_OWNER)
    starts = np.array([start for _, start, _ in spans])
    stops = np.array([stop for _, _, stop in spans])
    owners = np.searchsorted(starts, last_chars, side="right") - 1
    inside = (owners >= 0) & (last_chars < stops[owners])
    return np.where(inside, owners, _NO_OWNER)


def _runs(owners: npt.NDArray[np.int64], spans: list[Span]) -> list[Span]:
    """Character spans as token spans; neighbours of one segment become one span."""
    runs: list[Span] = []
    edges = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(owners)]
    for start, stop in pairwise(edges):
        if start == stop or owners[start] == _NO_OWNER:
            continue
        segment = spans[owners[start]][0]
        if runs and runs[-1][0] == segment and runs[-1][2] == start:
            start = runs.pop()[1]
        runs.append((segment, start, stop))
    return runs


def _refuse_markup(
    line: JobLine, tokens: _Tokens, owners: npt.NDArray[np.int64], placed: PlacedText
) -> None:
    """Refuse special tokens, and whatever token the template itself uses, inside a message.

    The tokenizer can't tell them from the template's own, and neither could the model: a
    document with "<|im_end|>" in it would end its turn there.
    """
    of_template = {tokens.ids[index] for index, _, _ in tokens.added if owners[index] == _NO_OWNER}
    for index, content, special in tokens.added:
        if owners[index] != _NO_OWNER and (special or tokens.ids[index] in of_template):
            segment = placed.spans[owners[index]][0]
            raise InputError(
                f"{describe(line)}: the text of segment {segment!r} contains {content!r}, which "
                "is markup to this tokenizer. Take it out of the text; or, if you mean the "
                "markup, write the whole sequence yourself as `prompt` + `response`."
            )


def _refuse_second_bos(
    line: JobLine, tokens: _Tokens, tokenizer: "PreTrainedTokenizerBase"
) -> None:
    bos = tokenizer.bos_token_id
    if bos is not None and tokens.ids[:2] == [bos, bos] and tokens.last_chars[0] < 0:
        raise InputError(
            f"{describe(line)}: the prompt begins with {tokenizer.bos_token!r}, which the "
            "tokenizer adds by itself; leave it out of the prompt."
        )
