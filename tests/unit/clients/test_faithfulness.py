import json
import socket
from pathlib import Path

import pytest

from moescope.clients.faithfulness import make_faithfulness
from moescope.clients.job import read_job
from moescope.tracer.errors import InputError

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples/questions.json"
DATA = ROOT.parent / "shared/data"

CONTEXT = "The harbour of Vell has forty-two lamps and 😀 one bell."


def question(number: int, answer: str | None = "forty-two", **more) -> dict:
    answers = [] if answer is None else [{"text": answer, "answer_start": CONTEXT.find(answer)}]
    return {"id": f"q{number}", "question": f"Question {number}?", "answers": answers, **more}


@pytest.fixture
def make(tmp_path):
    source, out = tmp_path / "squad.json", tmp_path / "job.jsonl"

    def run(content: object, **options):
        text = content if isinstance(content, str) else json.dumps(content, indent=1)
        source.write_text(text, encoding="utf-8")
        statistics = make_faithfulness(source, out, **options)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["job.jsonl", "squad.json"]
        return statistics, read_job(out)

    return run


def nested(*questions: dict) -> dict:
    return {"version": "1.1", "data": [{"paragraphs": [{"context": CONTEXT, "qas": questions}]}]}


def texts(line, *segments: str) -> list[str]:
    return [
        part.text
        for message in line.messages
        for part in message.content
        if part.segment in segments
    ]


def test_a_pair_differs_in_its_document_only(make):
    statistics, (with_doc, without_doc) = make(nested(question(1)), instruction="Be brief.")
    assert (statistics.questions, statistics.kept, statistics.lines) == (1, 1, 2)
    assert (with_doc.example_id, with_doc.condition) == ("q1", "with_doc")
    assert (without_doc.example_id, without_doc.condition) == ("q1", "without_doc")
    assert texts(with_doc, "document") == [CONTEXT]
    assert texts(without_doc, "document") == []
    for line in (with_doc, without_doc):
        assert texts(line, "question") == ["Question 1?"]
        assert texts(line, "response") == ["forty-two"]
    spoken = [
        "".join(texts(line, "instruction", "document", "question"))
        for line in (with_doc, without_doc)
    ]
    assert spoken[0] == f"Be brief.\n\nDocument: {CONTEXT}\n\nQuestion: Question 1?"
    assert spoken[1] == "Be brief.\n\nQuestion: Question 1?"


def test_what_is_skipped_is_counted(make):
    statistics, lines = make(
        nested(
            question(1),
            question(1),
            question(2, None),
            question(3, is_impossible=True),
            question(4, "fifty"),
            question(5, "  "),
            question(6, "FORTY-TWO"),
            {"id": "", "question": "x", "answers": []},
            {"id": "q8", "question": " ", "answers": []},
        )
    )
    assert statistics.skipped == {
        "with an id seen before": 1,
        "unanswerable": 2,
        "whose answer is not in the document": 1,
        "with an empty answer": 1,
        "without an id": 1,
        "without a question": 1,
    }
    assert statistics.questions == statistics.kept + sum(statistics.skipped.values()) == 9
    assert [line.example_id for line in lines] == ["q1", "q1", "q6", "q6"]
    assert str(statistics).startswith("2 of 9 questions kept, 4 lines written.\nSkipped: 2 unansw")


def test_limit_draws_by_seed_and_keeps_the_order(make):
    content = nested(*(question(i) for i in range(100, 160)))
    statistics, lines = make(content, limit=5, seed=1)
    ids = [line.example_id for line in lines[::2]]
    assert ids == sorted(ids)
    assert len(ids) == 5
    assert statistics.beyond_limit == 55
    assert "Left out by the limit: 55." in str(statistics)
    assert [line.example_id for line in make(content, limit=5, seed=1)[1][::2]] == ids
    assert [line.example_id for line in make(content, limit=5, seed=2)[1][::2]] != ids
    assert make(content, limit=500)[0].kept == 60


def test_names_of_the_conditions(make):
    _, lines = make(nested(question(1)), with_doc="doc", without_doc="no_doc")
    assert [line.condition for line in lines] == ["doc", "no_doc"]


FLAT = {"id": "q1", "context": CONTEXT, "question": "How many?"}


@pytest.mark.parametrize(
    "content",
    [
        [FLAT | {"answer": "forty-two"}],
        [FLAT | {"answers": {"text": ["forty-two", "42"], "answer_start": [23, 0]}}],
        FLAT | {"answers": [{"text": "forty-two"}]},
        "\n".join(json.dumps(FLAT | {"id": i, "answer": "forty-two"}) for i in ("q1", "007")),
        {"data": [FLAT | {"answer": "forty-two"}]},
    ],
)
def test_flat_files(make, content):
    _, lines = make(content)
    assert texts(lines[0], "document", "question", "response") == [
        CONTEXT,
        "How many?",
        "forty-two",
    ]
    assert {line.example_id for line in lines} <= {"q1", "007"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is not JSON: Expecting value"),
        ("{'a': 1}", r"is not JSON: .*line 1, column 2"),
        ("[1, 2", "is not JSON"),
        ('"hello"', 'holds "hello"'),
        ({"questions": []}, "holds an object with questions"),
        ([], "holds no article"),
        ({"data": []}, "holds no article"),
        ({"data": 3}, "`data` is not a list of objects"),
        ({"data": [1]}, "`data` is not a list of objects"),
        ([1, 2], "is not a list of objects"),
        ([{"text": "x"}], "holds objects with the fields: text"),
        ({"data": [{"paragraphs": 3}]}, "`paragraphs` is not a list of objects"),
        ({"data": [{"paragraphs": [{"qas": "x"}]}]}, "`qas` is not a list of objects"),
    ],
)
def test_files_that_are_not_squad(make, content, said):
    with pytest.raises(InputError, match=said) as caught:
        make(content)
    assert "Expected SQuAD's format" in str(caught.value)


def test_nothing_to_use(make):
    with pytest.raises(InputError, match=r"no question to use \(1 unanswerable\)"):
        make(nested(question(1, None)))


def test_bad_arguments(make, tmp_path):
    with pytest.raises(InputError, match="limit must be 1 or more"):
        make(nested(question(1)), limit=0)
    with pytest.raises(InputError, match="two names that differ"):
        make(nested(question(1)), with_doc="a", without_doc="a")
    with pytest.raises(InputError, match="would overwrite its source"):
        make_faithfulness(EXAMPLE, EXAMPLE)
    with pytest.raises(InputError, match="there is no folder"):
        make_faithfulness(EXAMPLE, tmp_path / "none" / "job.jsonl")
    with pytest.raises(InputError, match="can't write the job"):
        make_faithfulness(EXAMPLE, tmp_path)
    with pytest.raises(InputError, match=r"can't read .*No such file"):
        make_faithfulness(tmp_path / "none.json", tmp_path / "job.jsonl")
    (tmp_path / "latin.json").write_bytes(b'{"data": "\xe9"}')
    with pytest.raises(InputError, match="is not UTF-8"):
        make_faithfulness(tmp_path / "latin.json", tmp_path / "job.jsonl")


def test_no_trace_is_left_on_disk_screen_or_network(make, tmp_path, monkeypatch, capfd):
    import datasets

    tried = []  # errors would be swallowed

    def connect(*_):
        tried.append(1)
        raise OSError

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(datasets.load, "get_session", connect)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bars = datasets.are_progress_bars_disabled()
    make(nested(question(1)))
    assert tried == []
    assert capfd.readouterr() == ("", "")
    assert datasets.are_progress_bars_disabled() == bars


def test_the_sample_questions(tmp_path):
    articles = json.loads(EXAMPLE.read_text(encoding="utf-8"))["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    questions = [(p["context"], qa) for p in paragraphs for qa in p["qas"]]
    assert len(paragraphs) == 12
    assert len({qa["id"] for _, qa in questions}) == len(questions) == 60
    assert len({qa["question"] for _, qa in questions}) == 60
    for context, qa in questions:
        assert 40 <= len(context.split()) <= 80
        for answer in qa["answers"]:
            start = answer["answer_start"]
            assert context[start : start + len(answer["text"])] == answer["text"] != ""
    statistics = make_faithfulness(EXAMPLE, tmp_path / "job.jsonl")
    assert (statistics.kept, statistics.skipped) == (60, {})


def _real(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no real data here ({name})")
    return path


def test_real_squad_1_1(tmp_path):
    out = tmp_path / "job.jsonl"
    statistics = make_faithfulness(_real("xquad_en/xquad.en.json"), out)
    assert (statistics.kept, statistics.lines, statistics.skipped) == (1190, 2380, {})
    lines = read_job(out)
    for with_doc, without_doc in zip(lines[::2], lines[1::2], strict=True):
        assert with_doc.example_id == without_doc.example_id
        assert texts(with_doc, "question", "response") == texts(without_doc, "question", "response")
        assert texts(with_doc, "response")[0] in texts(with_doc, "document")[0]


def test_real_flat_squad_2(tmp_path):
    source = _real("squad_v2_subset/data/squad_v2.0.json")
    statistics = make_faithfulness(source, tmp_path / "job.jsonl")
    assert (statistics.kept, statistics.skipped) == (1978, {})
