"""Every layout, by a row written for this test."""

import json
import re
from pathlib import Path

import pytest

from moescope.clients.questions import LAYOUTS, Question, expected, layout_of, read_questions
from moescope.clients.sources import open_source
from moescope.tracer.errors import InputError

BELL = "The bell of Vell was cast by Anna Sarn."
LAKE = "Lake Immer freezes in January."
FERRY = "The ferry runs twice a day."

SQUAD = {
    "data": [
        {
            "title": "Vell",
            "paragraphs": [
                {
                    "context": BELL,
                    "qas": [
                        {
                            "id": "s1",
                            "question": "Who cast the bell?",
                            "answers": [{"text": "Anna Sarn", "answer_start": 29}],
                        },
                        {"id": "s2", "question": "Who sold it?", "answers": []},
                    ],
                }
            ],
        }
    ]
}
SQUAD_FLAT = [
    {
        "id": "s1",
        "title": "Vell",
        "context": BELL,
        "question": "Who cast the bell?",
        "answers": {"text": ["Anna Sarn", "Sarn"], "answer_start": [29, 34]},
    }
]
HOTPOT = [
    {
        "id": "h1",
        "question": "Who cast the bell of the town on Lake Immer?",
        "answer": "Anna Sarn",
        "context": {
            "title": ["Bell", "Ferry", "Vell"],
            "sentences": [[BELL, " It is big."], [FERRY], ["Vell is on Lake Immer."]],
        },
        "supporting_facts": {"title": ["Bell", "Vell"], "sent_id": [0, 0]},
    },
    {
        "id": "h2",
        "question": "Are both big?",
        "answer": "yes",
        "context": {"title": ["Bell"], "sentences": [[BELL]]},
        "supporting_facts": {"title": ["Bell"], "sent_id": [0]},
    },
]
HOTPOT_OFFICIAL = [
    {
        "_id": "h1",
        "question": "Who cast the bell?",
        "answer": "Anna Sarn",
        "context": [["Bell", [BELL]], ["Ferry", [FERRY]]],
        "supporting_facts": [["Bell", 0]],
    }
]
NQ = [
    {
        "question": "who cast the bell",
        "answers": ["A. Sarn", "Anna Sarn"],
        "positive_ctxs": [
            {"title": "Lake", "text": LAKE, "passage_id": "1"},
            {"title": "Bell", "text": BELL, "passage_id": "2"},
        ],
        "hard_negative_ctxs": [{"title": "Ferry", "text": FERRY, "passage_id": "3"}],
    }
]
NQ_CTXS = [
    {
        "id": "n1",
        "question": "who cast the bell",
        "answers": ["Anna Sarn"],
        "ctxs": [
            {"id": "1", "title": "Ferry", "text": FERRY, "hasanswer": False},
            {"id": "2", "title": "Bell", "text": BELL, "hasanswer": True},
        ],
    }
]
TRIVIA = [
    {
        "question": "Who cast the bell of Vell?",
        "question_id": "t1",
        "answer": {"value": "Annie Sarn", "aliases": ["Annie Sarn", "Anna Sarn"]},
        "entity_pages": {"title": ["Lake"], "wiki_context": [LAKE]},
        "search_results": {"title": ["Bell"], "search_context": [BELL]},
    }
]
PLAIN = [
    {"question": "Who cast it?", "documents": [BELL, LAKE], "answer": "Anna Sarn"},
    {"id": "p2", "question": "When does it freeze?", "documents": LAKE, "answer": ["January"]},
    {
        "example_id": "p3",
        "question": "How often?",
        "documents": [{"title": "Ferry", "text": FERRY}],
        "answer": "twice a day",
        "distractors": [LAKE],
    },
]


def read(tmp_path, content: object, layout: str = "auto", name: str = "source.json"):
    path = tmp_path / name
    lines = "\n".join(json.dumps(row) for row in content) if name.endswith("l") else None
    path.write_text(lines or json.dumps(content))
    with open_source(path, expected(layout)) as source:
        found = layout_of(source, layout)
        return found, list(read_questions(source, found))


def test_squad(tmp_path):
    assert read(tmp_path, SQUAD) == (
        "squad",
        [Question("s1", "Who cast the bell?", "Anna Sarn", (BELL,)), "unanswerable"],
    )


def test_flat_squad(tmp_path):
    layout, [question] = read(tmp_path, SQUAD_FLAT)
    assert layout == "squad"
    assert (question.answer, question.aliases) == ("Anna Sarn", ("Sarn",))


def test_hotpotqa_has_gold_documents_and_distractors(tmp_path):
    layout, [question, yes] = read(tmp_path, HOTPOT)
    assert (layout, yes) == ("hotpotqa", "with a yes/no answer")
    assert question.documents == (f"Bell\n{BELL} It is big.", "Vell\nVell is on Lake Immer.")
    assert question.distractors == (f"Ferry\n{FERRY}",)


def test_hotpotqa_as_its_authors_publish_it(tmp_path):
    layout, [question] = read(tmp_path, HOTPOT_OFFICIAL)
    assert (layout, question.example_id) == ("hotpotqa", "h1")
    assert question.documents == (f"Bell\n{BELL}",)
    assert question.distractors == (f"Ferry\n{FERRY}",)


@pytest.mark.parametrize(("rows", "example_id"), [(NQ, "row-1"), (NQ_CTXS, "n1")])
def test_natural_questions_with_passages(tmp_path, rows, example_id):
    layout, [question] = read(tmp_path, rows)
    assert (layout, question.example_id, question.answer) == ("nq", example_id, "Anna Sarn")
    assert question.documents == (f"Bell\n{BELL}",)
    assert f"Ferry\n{FERRY}" in question.distractors


def test_natural_questions_with_one_context(tmp_path):
    rows = [{"question": "who cast it", "answers": ["Anna Sarn"], "context": BELL}]
    assert read(tmp_path, rows) == (
        "nq",
        [Question("row-1", "who cast it", "Anna Sarn", (BELL,))],
    )


def test_triviaqa_takes_the_alias_that_is_in_a_document(tmp_path):
    layout, [question] = read(tmp_path, TRIVIA)
    assert (layout, question.example_id, question.answer) == ("triviaqa", "t1", "Anna Sarn")
    assert question.aliases == ("Annie Sarn",)
    assert question.documents == (f"Bell\n{BELL}",)
    assert question.distractors == (f"Lake\n{LAKE}",)


def test_plain_lines(tmp_path):
    layout, questions = read(tmp_path, PLAIN, name="source.jsonl")
    assert layout == "jsonl"
    assert [q.example_id for q in questions] == ["row-1", "p2", "p3"]
    assert [q.documents for q in questions] == [(BELL, LAKE), (LAKE,), (f"Ferry\n{FERRY}",)]
    assert questions[2].distractors == (LAKE,)


def test_the_rows_in_the_documentation(tmp_path):
    page = (Path(__file__).parents[3] / "docs/data.md").read_text(encoding="utf-8")
    sources = page.split("### Sources")[1].split("### Counterfactual")[0]
    layouts = []
    for block in re.findall(r"```json\n(.*?)```", sources, re.DOTALL):
        layout, [question] = read(tmp_path, json.loads(block))
        assert (question.answer, len(question.documents)) == ("Anna Sarn", 1)
        layouts.append(layout)
    assert layouts == ["squad", "squad", "hotpotqa", "nq", "triviaqa", "jsonl"]


def test_csv_keeps_numbers_as_they_are_written(tmp_path):
    path = tmp_path / "source.csv"
    path.write_text("id,question,answer,document\n007,When?,0412,It was 0412.\n8,What?,,None.\n")
    with open_source(path, "") as source:
        assert list(read_questions(source, layout_of(source, "auto"))) == [
            Question("007", "When?", "0412", ("It was 0412.",)),
            "with an empty answer",
        ]


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "source.parquet"
    pq.write_table(pa.Table.from_pylist(TRIVIA), path)
    with open_source(path, "") as source:
        [question] = read_questions(source, layout_of(source, "auto"))
        assert question.answer == "Anna Sarn"
        assert len(source.origin["sha256"]) == 64


def test_a_layout_that_does_not_fit_is_refused_with_what_is_there(tmp_path):
    with pytest.raises(InputError, match=r"fields: a, b\. Expected one of the layouts hotpotqa"):
        read(tmp_path, [{"a": 1, "b": 2}])
    for layout in LAYOUTS:
        with pytest.raises(InputError, match=r"fields: a\. Expected "):
            read(tmp_path, [{"a": 1}], layout)
    with pytest.raises(InputError, match=r"answer, documents, question\. Expected HotpotQA"):
        read(tmp_path, PLAIN[:1], "hotpotqa")
