"""Character spans through chat templates that strip, move, repeat or rewrite messages."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from moescope.clients.chat_text import chat_text, raw_text
from moescope.clients.job import Generate, JobLine, Message, Part
from moescope.tracer.errors import InputError

PLAIN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)


def chat(*turns, generate=None) -> JobLine:
    messages = tuple(Message(role=role, content=content) for role, content in turns)
    return JobLine(example_id="x", condition="c", messages=messages, generate=generate)


def spelled(template: str, line: JobLine) -> list[tuple[str, str]]:
    placed = chat_text(line, tokenizer_with(template))
    starts = [start for _, start, _ in placed.spans]
    assert starts == sorted(starts)
    return [(segment, placed.text[start:stop]) for segment, start, stop in placed.spans]


def test_parts_and_turns():
    user = (Part("document", "Green sky. "), Part("question", "Which colour?"))
    line = chat(("system", "Be brief."), ("user", user), ("assistant", "Green."))
    placed = chat_text(line, tokenizer_with(PLAIN))
    assert placed.text == "<system>Be brief.<user>Green sky. Which colour?<assistant>Green."
    assert [placed.text[a:b] for _, a, b in placed.spans] == [
        "Be brief.",
        "Green sky. ",
        "Which colour?",
        "Green.",
    ]
    assert placed.text[placed.target_start :] == "Green."


def test_contents_that_repeat_each_other_or_look_like_sentinels():
    line = chat(("user", "user \U000f0000\U000f0001"), ("assistant", "user"))
    assert spelled(PLAIN, line) == [("question", "user \U000f0000\U000f0001"), ("response", "user")]


def test_empty_parts_and_messages_have_no_span():
    template = PLAIN.replace("{{ m['content'] }}", "{{ m['content'] if m['content'] else 'none' }}")
    user = (Part("document", ""), Part("question", "Who?"), Part("notes", ""))
    line = chat(("system", ""), ("user", user), ("assistant", "He."))
    assert spelled(template, line) == [("question", "Who?"), ("response", "He.")]


def test_stripping_spares_the_inner_whitespace():
    template = PLAIN.replace("m['content']", "m['content'].strip()")
    user = (Part("document", "\n Sky. \n"), Part("question", "  Who? \t"))
    line = chat(("user", user), ("assistant", "  He. "))
    assert spelled(template, line) == [
        ("document", "Sky. \n"),
        ("question", "  Who?"),
        ("response", "He."),
    ]


def test_a_part_that_is_stripped_away_has_no_span():
    template = PLAIN.replace("m['content']", "m['content'].strip()")
    user = (Part("document", " \n "), Part("question", "Who?"))
    line = chat(("user", user), ("assistant", "He."))
    assert spelled(template, line) == [("question", "Who?"), ("response", "He.")]


def test_whitespace_that_is_not_stripped_keeps_its_segment():
    # Only line feeds, only on the left, and only in the assistant's messages.
    template = (
        "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'].lstrip('\n') "
        "if m['role'] == 'assistant' else m['content'] }}\n{% endfor %}"
    )
    line = chat(("user", "\n\n Who?\n"), ("assistant", "\n\n \nHe. \n\n"))
    assert spelled(template, line) == [("question", "\n\n Who?\n"), ("response", " \nHe. \n\n")]


def test_blank_messages():
    template = PLAIN.replace(
        "m['content']", "m['content'].strip() if m['role'] == 'system' else m['content']"
    )
    line = chat(("system", " \n"), ("user", " \n"), ("assistant", "He."))
    assert spelled(template, line) == [("question", " \n"), ("response", "He.")]


def test_messages_that_move():
    """Some templates put the system message into a later turn."""
    template = (
        "{% for m in messages[1:] %}<{{ m['role'] }}>{{ m['content'] }}"
        "{% if loop.first %}|{{ messages[0]['content'] }}{% endif %}{% endfor %}"
    )
    line = chat(("system", "Be brief."), ("user", "Who?"), ("assistant", "He."))
    assert spelled(template, line) == [
        ("question", "Who?"),
        ("system", "Be brief."),
        ("response", "He."),
    ]


@pytest.mark.parametrize(
    "expression",
    [
        "m['content'] | upper",
        "m['content'].split('</think>')[-1]",
        "m['content'] ~ m['content']",
        "m['content'] | tojson",
        "m['content'][:3]",
        "m['content'] if m['content'].startswith('<think>') else 'x'",
    ],
)
def test_a_rewritten_message_is_refused_by_its_number(expression):
    template = PLAIN.replace("m['content']", f"({expression}) if loop.index == 2 else m['content']")
    line = chat(("user", "Who? "), ("assistant", '<think>"he"</think> He.'))
    with pytest.raises(InputError, match=r"rewrites message 2 \(assistant\).*`prompt`"):
        chat_text(line, tokenizer_with(template))


def test_a_template_that_refuses_the_messages():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=r"refuses these messages: roles must alternate"):
        chat_text(chat(("user", "Who?"), ("assistant", "He.")), tokenizer_with(template))


def test_a_tokenizer_without_a_template():
    with pytest.raises(InputError, match=r"no chat template.*use `prompt` \+ `response`"):
        chat_text(chat(("user", "Who?"), ("assistant", "He.")), tokenizer_with(None))


def test_generation_prompts_for_the_answer():
    template = PLAIN + "{% if add_generation_prompt %}<assistant>{% endif %}"
    line = chat(("user", "Who?"), generate=Generate(max_tokens=3))
    placed = chat_text(line, tokenizer_with(template))
    assert placed.text == "<user>Who?<assistant>"
    assert placed.spans == [("question", 6, 10)]


def test_raw_text():
    prompt = (Part("document", "Sky."), Part("notes", ""), Part("question", " Who? "))
    line = JobLine(example_id="x", condition="c", prompt=prompt, response="He.")
    placed = raw_text(line)
    assert placed.text == "Sky. Who? He."
    assert placed.spans == [("document", 0, 4), ("question", 4, 10), ("response", 10, 13)]
    assert placed.target_start == 10
