"""Token spans against an oracle that knows no offsets: it counts the bytes of the token pieces."""

# DeepSeek's markers have full-width bars.
# ruff: noqa: RUF001

import functools
import json
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from moescope.clients.job import Generate, JobLine, Message, Part
from moescope.clients.spans import EncodedRequest, encode
from moescope.tracer.errors import InputError

CORPUS = [
    "The harbour of Vell lies under a green sky. Answer: Paris.\n\n   indented\n  twice\n",
    "Document: a lamp-keeper counts the tides 😀😀 and 你好 世界 é à ü.\n\nQuestion: who counts?",
    "[INST] what is it? [/INST] It is 42 </s> User: hello\n\nAssistant: good-bye.\n",
] * 20

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 2: the system message moves into the first user turn, and what results is trimmed.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] "
    "+ '\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}{% else %}{% set system = '' %}"
    "{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% set content = system + m['content'] if loop.first else m['content'] %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% else %}{{ '<｜Assistant｜>' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)


@dataclass(frozen=True)
class Kind:
    """A tokenizer, how its pieces spell bytes, and what its template makes of a chat."""

    tokenizer: PreTrainedTokenizerFast
    byte_level: bool

    def piece_bytes(self, piece: str) -> bytes:
        if self.byte_level:
            return bytes(BYTE_OF[c] for c in piece)
        if len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()


def _byte_of() -> dict[str, int]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_of()


def _wrap(backend: Tokenizer, template: str | None, bos: str, eos: str, *more: AddedToken):
    backend.add_special_tokens([AddedToken(t, special=True) for t in (bos, eos) if t])
    backend.add_tokens(list(more))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, chat_template=template
    )


def _byte_level(*, trim: bool, regex: bool = True) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    return backend


@functools.cache
def kind(name: str) -> Kind:
    if name == "chatml":  # Qwen's kind
        backend = _byte_level(trim=False)
        more = [AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")]
        return Kind(_wrap(backend, CHATML, "<|endoftext|>", "<|im_end|>", *more), True)
    if name == "chatml-trimmed":  # GPT-NeoX's kind (OLMoE): offsets without the spaces
        backend = _byte_level(trim=True)
        more = [AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")]
        return Kind(_wrap(backend, CHATML, "<|endoftext|>", "<|im_end|>", *more), True)
    if name == "deepseek":
        # No regex: tokens reach over words, lines and the bytes of neighbouring characters.
        backend = _byte_level(trim=False, regex=False)
        more = [AddedToken(t, special=False) for t in ("<｜User｜>", "<｜Assistant｜>")]
        bos, eos = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
        tokenizer = _wrap(backend, DEEPSEEK, bos, eos, *more)
        _prepend_bos(tokenizer, bos)
        return Kind(tokenizer, True)
    if name == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        trainer = trainers.UnigramTrainer(
            vocab_size=160, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        )
        backend.train_from_iterator(CORPUS, trainer)
        tokenizer = _wrap(backend, LLAMA2, "<s>", "</s>")
        tokenizer.unk_token = "<unk>"
        _prepend_bos(tokenizer, "<s>")
        return Kind(tokenizer, False)
    assert name == "llama"  # BPE over "▁" with byte fallback, as Llama 2 and Mixtral have it
    backend = Tokenizer(models.BPE())
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(spaces)
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    vocab = backend.get_vocab() | {f"<0x{b:02X}>": 1000 + b for b in range(256)}
    merges = [tuple(m) for m in _merges(backend)]
    backend.model = models.BPE(
        vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token=None
    )
    tokenizer = _wrap(backend, LLAMA2, "<s>", "</s>")
    _prepend_bos(tokenizer, "<s>")
    return Kind(tokenizer, False)


def _merges(backend: Tokenizer) -> list[list[str]]:
    return json.loads(backend.to_str())["model"]["merges"]


def _prepend_bos(tokenizer: PreTrainedTokenizerFast, bos: str) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
    )


BOS = ("<s>", "<｜begin▁of▁sentence｜>")
ALL_KINDS = ["chatml", "chatml-trimmed", "deepseek", "unigram", "llama"]

_TRICKY = st.sampled_from(
    [*" \n\t .:aé😀你", "  ", "\r\n", "👩‍👩‍👧", "\U000f0000", "\ue000", "e\u0301"]
)
_CHARACTER = st.one_of(_TRICKY, st.characters(exclude_categories=["Cs"], exclude_characters="▁"))
TEXTS = st.lists(st.one_of(_CHARACTER, st.sampled_from(["The harbour", " Paris", "\n   in"]))).map(
    "".join
)
SEGMENTS = st.sampled_from(["document", "question", "notes"])
PARTS = st.lists(st.builds(Part, SEGMENTS, TEXTS), min_size=1, max_size=3).map(tuple)
RESPONSES = TEXTS.filter(lambda text: text.strip())


def last_characters(which: Kind, ids: list[int], text: str) -> list[int | None]:
    """Each token's last character in `text`, from its bytes alone; None for added BOS tokens."""
    data = text.encode()
    char_of_byte = [i for i, char in enumerate(text) for _ in char.encode()]
    added = {t.content for t in which.tokenizer.added_tokens_decoder.values()}
    # Unlike the ids, the encoding's pieces tell what an unknown token stands for.
    special = ids[:1] == [which.tokenizer.bos_token_id] and not text.startswith(BOS)
    encoding = which.tokenizer(text, add_special_tokens=special).encodings[0]
    assert encoding.ids == ids
    pieces = encoding.tokens
    sizes = [p.encode() if p in added else which.piece_bytes(p) for p in pieces]
    out: list[int | None] = []
    position = index = 0
    while index < len(ids):
        if pieces[index] in added:
            if index == 0 and not data.startswith(sizes[0]):
                out.append(None)  # the tokenizer's own BOS
            else:
                assert data[position:].startswith(sizes[index])
                position += len(sizes[index])
                out.append(char_of_byte[position - 1])
            index += 1
            continue
        stop = next((i for i in range(index, len(ids)) if pieces[i] in added), len(ids))
        section = b"".join(sizes[index:stop])
        # These tokenizers may begin a stretch of text with a space that isn't in it.
        at = position if data[position:].startswith(section) else position - 1
        assert data[position:].startswith(section[position - at :])
        for size in sizes[index:stop]:
            at += len(size)
            out.append(char_of_byte[max(at - 1, position)])
        position = at
        index = stop
    assert position == len(data)
    return out


def expected_spans(which: Kind, ids: list[int], labelled: list[tuple[str | None, str]]):
    """The spans that the border rule gives for (segment or None, text) stretches."""
    text = "".join(text for _, text in labelled)
    owner = [segment for segment, stretch in labelled for _ in stretch]
    spans: list[tuple[str, int, int]] = []
    for index, last in enumerate(last_characters(which, ids, text)):
        segment = None if last is None else owner[last]
        if segment is None:
            continue
        if spans and spans[-1][0] == segment and spans[-1][2] == index:
            spans[-1] = (segment, spans[-1][1], index + 1)
        else:
            spans.append((segment, index, index + 1))
    return spans


def check_order(request: EncodedRequest) -> None:
    stops = 0
    for _, start, stop in request.spans:
        assert stops <= start < stop <= len(request.token_ids)
        stops = stop


def _stretches(parts) -> list[tuple[str | None, str]]:
    return [(part.segment, part.text) for part in parts]


def _strip(stretches, *, left: bool = True, right: bool = True):
    text = "".join(text for _, text in stretches)
    low = len(text) - len(text.lstrip()) if left else 0
    high = len(text.rstrip()) if right else len(text)
    out, at = [], 0
    for segment, stretch in stretches:
        out.append((segment, text[max(at, low) : max(low, min(at + len(stretch), high))]))
        at += len(stretch)
    return out


def rendered(name: str, system: str | None, parts, response: str) -> list[tuple[str | None, str]]:
    """What the templates above make of a chat, in labelled stretches."""
    user = _stretches(parts)
    if name.startswith("chatml"):
        head = [(None, "<|im_start|>system\n"), ("system", system), (None, "<|im_end|>\n")]
        return [
            *(head if system is not None else []),
            (None, "<|im_start|>user\n"),
            *user,
            (None, "<|im_end|>\n<|im_start|>assistant\n"),
            ("response", response),
            (None, "<|im_end|>\n"),
        ]
    if name == "deepseek":
        return [
            (None, "<｜begin▁of▁sentence｜>"),
            ("system", system or ""),
            (None, "<｜User｜>"),
            *user,
            (None, "<｜Assistant｜>"),
            ("response", response),
            (None, "<｜end▁of▁sentence｜>"),
        ]
    if system is None:
        turn = _strip(user)
    else:
        turn = [(None, "<<SYS>>\n"), ("system", system), (None, "\n<</SYS>>\n\n")]
        turn += _strip(user, left=False)
        if not "".join(text for _, text in user).strip():
            turn[2] = (None, "\n<</SYS>>")
    return [
        (None, "<s>[INST] "),
        *turn,
        (None, " [/INST] "),
        ("response", response.strip()),
        (None, " </s>"),
    ]


@pytest.mark.parametrize("name", ALL_KINDS)
@settings(max_examples=60, deadline=None)
@given(prompt=PARTS, response=TEXTS.filter(bool))
def test_raw_text(name, prompt, response):
    which = kind(name)
    line = JobLine(example_id="x", condition="c", prompt=prompt, response=response)
    labelled = [*_stretches(prompt), ("response", response)]
    text = "".join(text for _, text in labelled)
    request = encode(line, which.tokenizer)
    assert request.token_ids == which.tokenizer(text)["input_ids"]
    check_order(request)
    assert request.spans == expected_spans(which, request.token_ids, labelled)


@pytest.mark.parametrize("name", ALL_KINDS)
@settings(max_examples=60, deadline=None)
@given(system=st.none() | TEXTS, parts=PARTS, response=RESPONSES)
def test_chat(name, system, parts, response):
    which = kind(name)
    messages = [Message(role="user", content=parts), Message(role="assistant", content=response)]
    if system is not None:
        messages.insert(0, Message(role="system", content=system))
    line = JobLine(example_id="x", condition="c", messages=messages)
    labelled = rendered(name, system, parts, response)
    text = "".join(text for _, text in labelled)
    ids = which.tokenizer(text, add_special_tokens=False)["input_ids"]
    expected = expected_spans(which, ids, labelled)
    if "response" not in {segment for segment, _, _ in expected}:
        with pytest.raises(InputError, match="no token ends in the response"):
            encode(line, which.tokenizer)
        return
    request = encode(line, which.tokenizer)
    assert request.token_ids == ids
    check_order(request)
    assert request.spans == expected


def _chat(*contents: str | tuple[Part, ...], generate: Generate | None = None) -> JobLine:
    roles = ["user", "assistant"] * len(contents)
    messages = [Message(role=r, content=c) for r, c in zip(roles, contents, strict=False)]
    return JobLine(example_id="x", condition="c", messages=tuple(messages), generate=generate)


def _segments(name: str, line: JobLine) -> list[tuple[str, str]]:
    """(segment, the text of its tokens): exact for these byte-level tokenizers."""
    tokenizer = kind(name).tokenizer
    request = encode(line, tokenizer)
    return [(s, tokenizer.decode(request.token_ids[a:b])) for s, a, b in request.spans]


@pytest.mark.parametrize("name", ["chatml", "chatml-trimmed"])
def test_the_space_before_a_response_counts_to_the_response(name):
    line = JobLine(example_id="x", condition="c", prompt="Answer: ", response="Paris")
    tokenizer = kind(name).tokenizer
    segment, start, stop = encode(line, tokenizer).spans[-1]
    tokens = tokenizer("Answer: Paris").encodings[0].tokens[start:stop]
    assert segment == "response"
    assert "".join(tokens) == "ĠParis"


def test_turns_of_one_segment_stay_apart_and_the_template_is_in_none():
    line = _chat("Who?", "A keeper.", "What?", "The tides.")
    assert _segments("deepseek", line) == [
        ("question", "Who?"),
        ("response", "A keeper."),
        ("question", "What?"),
        ("response", "The tides."),
    ]


def test_neighbouring_parts_of_one_segment_are_one_span():
    parts = (Part("document", "One."), Part("document", "Two."), Part("question", "Who?"))
    assert [s for s, _ in _segments("chatml", _chat(parts, "He."))] == [
        "document",
        "question",
        "response",
    ]


def test_generation_ends_with_the_generation_prompt():
    tokenizer = kind("chatml").tokenizer
    generate = Generate(max_tokens=4)
    request = encode(_chat("Who?", generate=generate), tokenizer)
    assert request.generate is generate
    assert tokenizer.decode(request.token_ids).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert [segment for segment, _, _ in request.spans] == ["question"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chatml", "Type <|im_end|> to stop."),
        ("chatml", "<|endoftext|>"),
        ("deepseek", "Say <｜User｜> twice."),  # no special token, but the template's
        ("unigram", "a <s>struck</s> word"),
    ],
)
def test_markup_inside_a_message_is_refused(name, text):
    with pytest.raises(InputError, match=r"segment 'question' contains '<.*is markup"):
        encode(_chat(text, "Yes."), kind(name).tokenizer)


def test_markup_in_raw_text_is_the_users_own_and_counts_where_it_was_written():
    prompt = (Part("markup", "<|im_start|>user\n"), Part("question", "Who?"))
    response = (Part("response", "He."), Part("markup", "<|im_end|>"))
    line = JobLine(example_id="x", condition="c", prompt=prompt, response=response)
    assert _segments("chatml", line) == [
        ("markup", "<|im_start|>user\n"),
        ("question", "Who?"),
        ("response", "He."),
        ("markup", "<|im_end|>"),
    ]


def test_a_bos_beside_the_tokenizers_own_is_refused():
    line = JobLine(example_id="x", condition="c", prompt="<s>Who?", response="He.")
    with pytest.raises(InputError, match=r"begins with '<s>', which the tokenizer adds by itself"):
        encode(line, kind("llama").tokenizer)


def test_an_unknown_character_is_no_markup():
    tokenizer = kind("unigram").tokenizer
    request = encode(_chat("\u16a0?", "Yes."), tokenizer)
    assert tokenizer.unk_token_id in request.token_ids
    assert [segment for segment, _, _ in request.spans] == ["question", "response"]


def test_markup_that_swallows_whitespace_stays_the_templates():
    backend = _byte_level(trim=False)
    greedy = AddedToken("<|turn|>", special=True, lstrip=True, rstrip=True)
    template = "{% for m in messages %}{{ '<|turn|>' + m['content'] }}{% endfor %}<|turn|>"
    tokenizer = _wrap(backend, template, "<|b|>", "<|e|>", greedy)
    request = encode(_chat("  Who?  ", "\nHe. "), tokenizer)
    assert [(s, tokenizer.decode(request.token_ids[a:b])) for s, a, b in request.spans] == [
        ("question", "Who?"),
        ("response", "He."),
    ]


def test_a_normalizer_that_joins_characters():
    """The joint letter counts to where it began: the tokenizer aligns it so."""
    backend = _byte_level(trim=False)
    backend.normalizer = normalizers.NFC()
    tokenizer = _wrap(backend, CHATML, "<|b|>", "<|e|>")
    prompt = (Part("document", "cafe"), Part("question", "\u0301 who?"))
    line = JobLine(example_id="x", condition="c", prompt=prompt, response="He.")
    request = encode(line, tokenizer)
    assert [(s, tokenizer.decode(request.token_ids[a:b])) for s, a, b in request.spans] == [
        ("document", "café"),
        ("question", " who?"),
        ("response", "He."),
    ]


def test_a_tokenizer_file_that_truncates_and_pads_is_overruled():
    for trim in (False, True):
        backend = _byte_level(trim=trim)
        backend.enable_truncation(4)
        backend.enable_padding(length=50)
        tokenizer = _wrap(backend, CHATML, "<|b|>", "<|e|>")
        line = JobLine(example_id="x", condition="c", prompt="Who counts?" * 9, response=" He.")
        request = encode(line, tokenizer)
        assert tokenizer.decode(request.token_ids) == "Who counts?" * 9 + " He."
        assert request.spans[-1][2] == len(request.token_ids)


def test_no_token_at_all():
    line = JobLine(example_id="x", condition="c", prompt="", generate=Generate(max_tokens=1))
    assert encode(line, kind("llama").tokenizer).spans == []  # its BOS is a prompt
    with pytest.raises(InputError, match="the prompt has no token"):
        encode(line, kind("chatml").tokenizer)


def test_a_blank_response_is_refused_where_the_template_strips_it():
    line = _chat("Who?", " \n")
    line.line = 7
    assert _segments("deepseek", line)[-1] == ("response", " \n")
    with pytest.raises(InputError, match=r"line 7 \(example_id 'x', condition 'c'\): no token"):
        encode(line, kind("llama").tokenizer)


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(InputError, match="Slow gives no character offsets"):
        encode(_chat("Who?", "He."), Slow())
