import hashlib
import json
import socket
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.clients.faithfulness import INSTRUCTIONS, Options, make_faithfulness, truth_path
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
        options = {"file_format": "squad"} | options
        statistics = make_faithfulness(source, out, Options(**options))
        files = {"job.jsonl", "job.jsonl.card.json", "squad.json"}
        truth = {"job.jsonl.truth.jsonl"} if options.get("counterfactual") else set()
        assert {p.name for p in tmp_path.iterdir()} == files | truth
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
    with pytest.raises(InputError, match="distractors must be 0 or more, not -1"):
        make(nested(question(1)), distractors=-1)
    with pytest.raises(InputError, match=r"document order is one of gold-first, .*, not 'x'"):
        make(nested(question(1)), document_order="x")
    with pytest.raises(InputError, match="--max-doc-tokens and --tokenizer go together"):
        make(nested(question(1)), max_doc_tokens=10)
    with pytest.raises(InputError, match="can't load the tokenizer of --tokenizer /none"):
        make(nested(question(1)), max_doc_tokens=10, tokenizer="/none")
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


WORLD = [
    ("Who cast the bell of Vell?", "Anna Sarn", "In 1412 Anna Sarn cast a bell. ANNA SARN sang."),
    ("Who built the mill?", "Otto Brack", "The mill is by Otto Brack, and Otto Brack's sons."),
    ("Who tends the lamps?", "Mira Tolle", "Mira Tolle tends the lamps of the harbour."),
    ("When did the port open?", "1577", "The port opened in 1577, after the flood."),
    ("When did the port close?", "1633", "It closed in 1633."),
    ("How many boats are there?", "thirty", "Thirty boats lie there, thirty in all."),
    ("How many geese are there?", "ninety", "There are ninety geese on the lake."),
]


def world() -> list[dict]:
    return [
        {"id": f"w{i}", "question": question, "documents": document, "answer": answer}
        for i, (question, answer, document) in enumerate(WORLD)
    ]


def truths(tmp_path) -> dict[str, dict]:
    lines = truth_path(tmp_path / "job.jsonl").read_text().splitlines()
    return {line["example_id"]: line for line in map(json.loads, lines)}


def test_a_counterfactual_document_says_something_else(make, tmp_path):
    statistics, lines = make(world(), file_format="jsonl", counterfactual=True)
    truth = truths(tmp_path)
    assert (statistics.kept, statistics.skipped, len(truth)) == (7, {}, 7)
    assert statistics.kinds == {"name": 3, "year": 2, "number in words": 2}
    for with_doc, without_doc in zip(lines[::2], lines[1::2], strict=True):
        true = truth[with_doc.example_id]
        [document], [answer] = texts(with_doc, "document"), texts(with_doc, "response")
        assert texts(without_doc, "response") == [answer] == [true["answer"]]
        assert true["true_answer"].casefold() not in document.casefold()
        assert answer.casefold() in document.casefold()
        assert true["taken_from"] != true["example_id"]
    documents = [texts(line, "document")[0] for line in lines[::2]]
    assert documents[0] in (
        "In 1412 Otto Brack cast a bell. OTTO BRACK sang.",
        "In 1412 Mira Tolle cast a bell. MIRA TOLLE sang.",
    )
    assert documents[3:6] == [
        "The port opened in 1633, after the flood.",
        "It closed in 1577.",
        "Ninety boats lie there, ninety in all.",
    ]


def test_counterfactuals_follow_the_seed_and_leave_with_the_option(make, tmp_path):
    first, again, other = (
        [texts(line, "response") for line in make(world(), counterfactual=True, **more)[1]]
        for more in (
            {"file_format": "jsonl"},
            {"file_format": "auto"},
            {"file_format": "jsonl", "seed": 3},
        )
    )
    assert first == again != other
    make(world(), file_format="jsonl")  # which also checks that no truth file is left
    assert not truth_path(tmp_path / "job.jsonl").exists()


def test_what_cannot_be_swapped_is_counted(make):
    rows = [
        *world()[:3],
        {"id": "a", "question": "Who?", "answer": "Norman", "documents": "Normans, a Norman."},
        {"id": "b", "question": "How far?", "answer": "5%", "documents": "A slope of 5%."},
    ]
    statistics, _ = make(rows, file_format="jsonl", counterfactual=True)
    assert statistics.skipped == {
        "whose answer is in the document within longer words": 1,
        "without another answer of its kind": 1,
    }
    assert statistics.questions == 5 == statistics.kept + sum(statistics.skipped.values())
    assert "Answers swapped: 3 name." in str(statistics)


@pytest.mark.parametrize(
    ("order", "segments"),
    [
        ("gold-first", ["document", "distractor", "distractor"]),
        ("gold-last", ["distractor", "distractor", "document"]),
    ],
)
def test_distractors_and_their_order(make, order, segments):
    options = {"file_format": "jsonl", "distractors": 2, "document_order": order}
    rows = world()
    rows[0]["distractors"] = ["The ferry runs.", "Not Anna Sarn, they say.", "Fog is rare."]
    _, lines = make(rows, **options)
    assert texts(lines[0], "distractor") == ["The ferry runs.", "Fog is rare."]
    for with_doc, without_doc in zip(lines[::2], lines[1::2], strict=True):
        parts = with_doc.messages[0].content
        assert [p.segment for p in parts if p.segment in segments] == segments
        answer = texts(with_doc, "response")[0].casefold()
        assert all(answer not in text.casefold() for text in texts(with_doc, "distractor"))
        assert texts(without_doc, "document", "distractor") == []
    assert "\n\nDocument 2: " in texts(lines[0], "instruction")


def test_documents_in_random_order_by_the_seed(make):
    def places(seed: int) -> list[int]:
        options = {"distractors": 3, "document_order": "random", "seed": seed}
        _, lines = make(world(), file_format="jsonl", **options)
        shown = [
            [p.segment for p in line.messages[0].content if p.segment in ("document", "distractor")]
            for line in lines[::2]
        ]
        return [segments.index("document") for segments in shown]

    assert places(0) == places(0) != places(1)
    assert len(set(places(0))) > 1


def test_too_few_distractors(make):
    statistics, lines = make([*world()[3:5]], file_format="jsonl", distractors=1)
    assert (statistics.kept, len(lines)) == (2, 4)
    with pytest.raises(InputError, match="2 with too few documents to distract"):
        make([*world()[3:5]], file_format="jsonl", distractors=2)


def test_instructions(make):
    for named, said in (*INSTRUCTIONS.items(), ("Speak.", "Speak.")):
        for line in make(nested(question(1)), instruction=named)[1]:
            assert texts(line, "instruction")[0].startswith(f"{said}\n\n")


@pytest.fixture(scope="module")
def word_tokenizer(tmp_path_factory):
    """A tokenizer whose tokens are words and marks."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("words")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
    return str(folder)


def test_documents_are_cut_around_the_answer(make, word_tokenizer):
    text = " ".join(f"w{i}" for i in range(50)) + " Anna Sarn " + "x " * 50
    rows = [
        {"id": "mid", "question": "Who?", "documents": text, "answer": "anna sarn"},
        {"id": "end", "question": "Who?", "documents": "a b c d e f Otto Brack", "answer": "Brack"},
        {"id": "short", "question": "Who?", "documents": "By Mira.", "answer": "Mira"},
        {"id": "two", "question": "?", "documents": [f"Mira {text}", "Mira."], "answer": text[:-1]},
        {"id": "long", "question": "Say?", "documents": f"{text} y", "answer": text.strip()},
    ]
    options = {"file_format": "jsonl", "max_doc_tokens": 6, "tokenizer": word_tokenizer}
    statistics, lines = make(rows, **options)
    documents = [texts(line, "document")[0] for line in lines[::2]]
    assert documents == ["w48 w49 Anna Sarn x x", "c d e f Otto Brack", "By Mira."]
    assert statistics.skipped == {"whose answer is longer than a document may be": 2}
    assert statistics.documents_cut == 2
    assert "Documents cut: 2." in str(statistics)
    _, lines = make(rows[:3], distractors=1, **options)
    for line in lines[::2]:
        assert all(len(t.split()) <= 6 for t in texts(line, "document", "distractor"))


def test_the_card_tells_how_the_job_was_made(make, tmp_path):
    statistics, _ = make(nested(question(1), question(2, None)), limit=1, instruction="closed")
    card = json.loads((tmp_path / "job.jsonl.card.json").read_text(encoding="utf-8"))
    sha256 = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()
    }
    assert card["source"] == {
        "format": "squad",
        "file": "squad.json",
        "sha256": sha256["squad.json"],
    }
    assert card["sha256"] == {"job.jsonl": sha256["job.jsonl"]}
    assert card["licence"] == "not known; say it with --licence"
    assert card["options"]["instruction"] == INSTRUCTIONS["closed"]
    assert card["counts"]["kept"] == statistics.kept == 1
    assert card["counts"]["skipped"] == {"unanswerable": 1}


_words = st.lists(
    st.sampled_from(["Vell", "Sarn", "lamp", "1412", "seven", "Anna", "the", "in", "bell"]),
    min_size=1,
).map(" ".join)
_row = st.fixed_dictionaries(
    {"question": _words, "answer": _words, "documents": st.lists(_words, max_size=3)}
)


@given(
    rows=st.lists(_row, min_size=1, max_size=12),
    counterfactual=st.booleans(),
    distractors=st.integers(0, 2),
    limit=st.none() | st.integers(1, 5),
    seed=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_pairs_agree_and_statistics_add_up(rows, **options):
    with TemporaryDirectory() as folder:
        source, out = Path(folder, "source.jsonl"), Path(folder, "job.jsonl")
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        try:
            statistics = make_faithfulness(source, out, Options(**options))
        except InputError as error:
            if "no question to use" not in str(error):
                raise
            return
        lines = read_job(out)
        true = truths(Path(folder)) if options["counterfactual"] else {}
    assert statistics.questions == len(rows)
    assert len(rows) == (
        statistics.kept + sum(statistics.skipped.values()) + statistics.beyond_limit
    )
    assert statistics.lines == len(lines) == 2 * statistics.kept
    assert sum(statistics.kinds.values()) == (statistics.kept if true else 0)
    for with_doc, without_doc in zip(lines[::2], lines[1::2], strict=True):
        assert with_doc.example_id == without_doc.example_id
        for segment in ("question", "response"):
            assert texts(with_doc, segment) == texts(without_doc, segment) != []
        answer = texts(with_doc, "response")[0].casefold()
        documents = texts(with_doc, "document")
        assert any(answer in document.casefold() for document in documents)
        assert len(texts(with_doc, "distractor")) == options["distractors"]
        if true:
            truth = true[with_doc.example_id]["true_answer"].casefold()
            assert all(truth not in document.casefold() for document in documents)


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


@pytest.mark.parametrize(
    ("name", "at_least"),
    [("xquad_en/xquad.en.json", 1150), ("squad_v2_subset/data/squad_v2.0.json", 1900)],
)
def test_real_counterfactuals(tmp_path, name, at_least):
    out = tmp_path / "job.jsonl"
    options = Options(counterfactual=True, distractors=1, document_order="random")
    statistics = make_faithfulness(_real(name), out, options)
    assert statistics.kept >= at_least
    assert statistics.questions == statistics.kept + sum(statistics.skipped.values())
    true = truths(tmp_path)
    for line in read_job(out)[::2]:
        [document], answer = texts(line, "document"), true[line.example_id]
        assert answer["true_answer"].casefold() not in document.casefold()
        assert answer["answer"].casefold() in document.casefold()
