import json
import re
import tracemalloc
from pathlib import Path

import pytest

from moescope.clients.job import Generate, JobLine, Message, Part, read_job
from moescope.tracer.errors import InputError

ROOT = Path(__file__).parents[3]
NAMES = {"example_id": "x", "condition": "c"}
CHAT = {
    **NAMES,
    "messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "He."}],
}


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "job.jsonl"

    def write(*lines: object) -> Path:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        return path

    return write


def reason(path: Path) -> str:
    """What is said of the only bad line."""
    with pytest.raises(InputError) as caught:
        read_job(path)
    first, line, last = str(caught.value).splitlines()
    assert first == f"{path}: 1 line is unusable."
    assert last == "docs/job-format.md describes the format."
    return line.strip()


def test_the_three_bodies(job):
    lines = read_job(
        job(
            CHAT,
            NAMES | {"condition": "raw", "prompt": "Who? ", "response": "He."},
            NAMES
            | {
                "condition": "free",
                "messages": [{"role": "system", "content": "Be brief."}],
                "generate": {"max_tokens": 3, "stop": "\n", "temperature": 0},
            },
        )
    )
    assert [line.line for line in lines] == [1, 2, 3]
    assert lines[0].messages == (
        Message("user", (Part("question", "Who?"),)),
        Message("assistant", (Part("response", "He."),)),
    )
    assert lines[0].target == (Part("response", "He."),)
    assert lines[1].prompt == (Part("prompt", "Who? "),)
    assert lines[1].target == (Part("response", "He."),)
    assert lines[2].messages == (Message("system", (Part("system", "Be brief."),)),)
    assert lines[2].target == ()
    sampling = lines[2].generate.sampling()
    assert sampling == {"max_tokens": 3, "stop": ["\n"], "temperature": 0.0}


def test_parts_keep_their_segments(job):
    parts = [{"segment": "document", "text": "D"}, {"segment": "my_notes", "text": ""}]
    (line,) = read_job(job(NAMES | {"prompt": parts, "response": parts}))
    assert line.prompt == line.response == (Part("document", "D"), Part("my_notes", ""))


def test_blank_lines_byte_order_mark_and_line_ends(tmp_path):
    path = tmp_path / "job.jsonl"
    first = NAMES | {"prompt": "a\u2028b", "response": "é"}
    texts = [json.dumps(first, ensure_ascii=False), "", "  ", json.dumps(CHAT | {"condition": "d"})]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(texts).encode())
    lines = read_job(path)
    assert [line.line for line in lines] == [1, 4]
    assert lines[0].prompt == (Part("prompt", "a\u2028b"),)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"example_id": None}, "`example_id`: input should be a valid string"),
        ({"example_id": 7}, "`example_id`: input should be a valid string"),
        ({"condition": " "}, "`condition` is blank"),
        ({"run": "r"}, "`run` is no field of the format"),
        ({"line": 3}, "`line` is no field of the format"),
        ({"messages": None}, "give one of `messages` and `prompt`"),
        ({"prompt": "x"}, "give one of `messages` and `prompt`"),
        ({"response": "x"}, "`response` goes with `prompt`; in a chat, end with its message"),
        ({"messages": []}, "`messages` is empty"),
        ({"messages": "Who?"}, "`messages` must be a list"),
        ({"messages": ["Who?"]}, "`messages[0]` must be a JSON object"),
        ({"messages": CHAT["messages"][:1]}, "the last message is not the assistant's: add"),
        ({"generate": {"max_tokens": 1}}, "`generate` goes with messages that end before the"),
        ({"messages": None, "prompt": "x"}, "with `prompt`, give one of `response` and `generate`"),
        ({"messages": None, "prompt": "x", "response": ""}, "the response is empty"),
        ({"messages": [{"role": "assistant", "content": []}]}, "the response is empty"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "`messages[0].role`: input should be"),
        ({"messages": [{"role": "user"}]}, "`messages[0].content` is missing"),
        (
            {"messages": [{"role": "user", "content": 4}]},
            '`messages[0].content`: must be a text or a list of {"segment": …, "text": …}',
        ),
        (
            {"messages": [{"role": "user", "content": [{"segment": "template", "text": ""}]}]},
            "`messages[0].content[0].segment`: the segment 'template' is reserved",
        ),
        (
            {"messages": [{"role": "user", "content": [{"segment": "a b", "text": ""}]}]},
            "`messages[0].content[0].segment`: the segment 'a b' must be a name",
        ),
        (
            {"messages": [{"role": "user", "content": [{"segment": "document"}]}]},
            "`messages[0].content[0].text` is missing",
        ),
    ],
)
def test_what_is_wrong_with_a_line(job, change, said):
    assert reason(job(CHAT | change)).startswith(f"line 1: {said}")


@pytest.mark.parametrize(
    ("generate", "said"),
    [
        ({}, "`generate.max_tokens` is missing"),
        ({"max_tokens": 0}, "`generate.max_tokens`: input should be greater than or equal to 1"),
        ({"max_tokens": "5"}, "`generate.max_tokens`: input should be a valid integer"),
        ({"max_tokens": 5, "top_p": 0}, "`generate.top_p`: input should be greater than 0"),
        ({"max_tokens": 5, "seed": True}, "`generate.seed`: input should be a valid integer"),
        ({"max_tokens": 5, "seed": -1}, "`generate.seed`: input should be greater than or equal"),
        ({"max_tokens": 5, "stop": ["a", ""]}, "`generate.stop[1]`: string should have at least"),
        ({"max_tokens": 5, "min_tokens": 6}, "`generate`: `min_tokens` is above `max_tokens` (5)"),
        ({"max_tokens": 5, "n": 2, "temperature": 0}, "`generate`: `n` above 1 with `temperature`"),
        ({"max_tokens": 5, "top_n": 1}, "`generate.top_n` is no field of the format"),
    ],
)
def test_what_is_wrong_with_generate(job, generate, said):
    assert reason(job(NAMES | {"prompt": "x", "generate": generate})).startswith(f"line 1: {said}")


def test_lines_that_are_no_objects(job):
    assert (
        reason(job('{"example_id": "x",')) == "line 1: not JSON: EOF while parsing a value at "
        "column 19"
    )
    assert reason(job("[1]")) == "line 1: not a JSON object"
    assert reason(job('{"example_id": "\\ud800"}')).startswith("line 1: not JSON: ")
    assert reason(job('{"example_id": NaN}')).startswith("line 1: ")


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "job.jsonl"
    path.write_bytes(json.dumps(CHAT).encode() + b'\n{"example_id": "\xe9"}\n')
    assert reason(path) == "line 2: not UTF-8 (byte 17 of the line); save the file as UTF-8"


def test_a_pair_that_came_before_is_named_with_both_lines(job):
    path = job(CHAT, CHAT | {"condition": "d"}, "", CHAT)
    assert reason(path) == "line 4: example_id 'x' with condition 'c' is on line 1 already"


def test_ten_bad_lines_are_explained_and_the_rest_counted(job):
    path = job(*[{**CHAT, "condition": str(i), "bad": i} for i in range(14)], CHAT)
    with pytest.raises(InputError) as caught:
        read_job(path)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("14 lines are unusable.")
    assert [line.split(":")[0] for line in lines[1:11]] == [f"  line {i}" for i in range(1, 11)]
    assert lines[11] == "  and 4 more bad lines"


def test_a_line_with_many_faults_names_three(job):
    parts = [{"segment": "a b", "text": ""} for _ in range(5)]
    assert reason(job(NAMES | {"prompt": parts, "response": "x"})).endswith("; and 2 more")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file(tmp_path, content):
    path = tmp_path / "job.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match="holds no request"):
        read_job(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"can't read the job .*No such file"):
        read_job(tmp_path / "job.jsonl")
    with pytest.raises(InputError, match=r"can't read the job .*directory"):
        read_job(tmp_path)


def test_many_lines_stay_small(job):
    """Beside its texts a line may take about a kilobyte: 100,000 lines then fit anywhere."""
    content = [{"segment": "document", "text": "D"}, {"segment": "question", "text": "Q"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "He."}]
    path = job(*[NAMES | {"example_id": str(i), "messages": messages} for i in range(2000)])
    tracemalloc.start()
    lines = read_job(path)
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(lines) == 2000
    assert size < 2000 * 1500
    assert peak < 2 * size


def test_every_sample_of_the_documentation_is_valid(tmp_path):
    text = (ROOT / "docs/job-format.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```json\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 3
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(block, encoding="utf-8")
        read_job(path)


def test_every_field_is_documented():
    text = (ROOT / "docs/job-format.md").read_text(encoding="utf-8")
    rows = "\n".join(line for line in text.splitlines() if line.startswith("| `"))
    fields = {*Generate.__slots__, *JobLine.__slots__} - {"line"}
    assert {field for field in fields if f"`{field}`" not in rows} == set()


def test_the_example_job():
    lines = read_job(ROOT / "examples/job.jsonl")
    assert {line.generate is None for line in lines} == {True, False}
    assert {line.messages is None for line in lines} == {True, False}
