import numpy as np
import pytest

from moescope.tracer.assemble import Assembler, Traced
from moescope.tracer.format import requests_schema, tokens_schema


def traced(request, **more):
    given = {"request_id": f"r{request}", "run": "test", "prompt_tokens": 4} | more
    return Traced(request=request, **given)


@pytest.fixture
def assembler(shape):
    return Assembler(shape)


def test_only_finished_requests_leave_sorted_by_request_and_position(assembler, shape, make_rows):
    for request in (1, 2, 3):
        assembler.begin(traced(request))
    assembler.add(make_rows(2, range(4)))
    assembler.add(make_rows(1, range(2)))
    assembler.add(make_rows(3, range(4)))
    assembler.add(make_rows(1, [2, 3, 4]))
    assembler.add(make_rows(2, [4]))
    assembler.finish(2, 0)
    assembler.finish(1, 0)
    assert assembler.finished_rows == 10
    tokens, requests = assembler.take()
    assert tokens.schema == tokens_schema(shape)
    assert requests.schema == requests_schema()
    assert tokens["request_id"].to_pylist() == ["r1"] * 5 + ["r2"] * 5
    assert tokens["position"].to_pylist() == [0, 1, 2, 3, 4] * 2
    assert tokens["token_id"].to_pylist() == [1000 + i for i in range(5)] + [
        2000 + i for i in range(5)
    ]
    expected = np.concatenate([make_rows(r, range(5)).experts for r in (1, 2)])
    assert tokens["expert_ids"].to_pylist() == expected.tolist()
    assert tokens["segment"].to_pylist() == (["prompt"] * 4 + ["response"]) * 2
    assert requests["complete"].to_pylist() == [True, True]
    assert assembler.num_rows == 4  # request 3 goes on
    assert assembler.take() is None
    assembler.finish(3, 0)
    assert assembler.take()[0].num_rows == 4


def test_of_a_position_that_came_twice_the_last_row_stays(assembler, make_rows):
    assembler.begin(traced(1))
    assembler.add(make_rows(1, range(6)))
    assembler.add(make_rows(1, range(6), version=3))  # preempted, and computed again
    assembler.finish(1, 0)
    tokens, requests = assembler.take()
    assert tokens["expert_ids"].to_pylist() == make_rows(1, range(6), version=3).experts.tolist()
    assert requests["tokens"].to_pylist() == [6]


@pytest.mark.parametrize(
    ("positions", "lost", "complete"),
    [
        (range(4), 0, True),
        (range(9), 0, True),
        (range(3), 0, False),  # aborted in the middle of the prompt
        ([0, 1, 3, 4], 0, False),  # a gap
        (range(1, 6), 0, False),  # the first token came from a cache
        (range(5), 2, False),  # dropped rows at the end leave no gap to see
        ([], 0, False),
    ],
)
def test_complete_means_every_token_has_its_row(assembler, make_rows, positions, lost, complete):
    assembler.begin(traced(1))
    assembler.add(make_rows(1, positions))
    assembler.finish(1, lost)
    _, requests = assembler.take()
    assert requests["complete"].to_pylist() == [complete]
    assert requests["tokens"].to_pylist() == [len(positions)]


def test_spans_label_the_prompt_and_what_lies_outside_is_template(assembler, make_rows):
    spans = [("document", 1, 3), ("question", 3, 4), ("response", 5, 6)]
    assembler.begin(traced(1, prompt_tokens=7, spans=spans))
    assembler.add(make_rows(1, range(9)))
    assembler.finish(1, 0)
    tokens, requests = assembler.take()
    assert tokens["segment"].to_pylist() == [
        "template",
        "document",
        "document",
        "question",
        "template",
        "response",
        "template",
        "response",
        "response",
    ]
    assert requests["spans"].to_pylist()[0][0] == {"segment": "document", "start": 1, "stop": 3}


def test_the_row_of_a_sampled_stop_token_is_left_out(assembler, make_rows):
    # Asynchronous scheduling computes it or not, depending on timing.
    assembler.begin(traced(1, stop_ids=[1006]))
    assembler.begin(traced(2, stop_ids=[2003]))  # a stop token inside the prompt stays
    assembler.add(make_rows(1, range(7)))
    assembler.add(make_rows(2, range(4)))
    assembler.finish(1, 0)
    assembler.finish(2, 0)
    tokens, requests = assembler.take()
    assert requests["tokens"].to_pylist() == [6, 4]
    assert requests["complete"].to_pylist() == [True, True]
    assert 1006 not in tokens["token_id"].to_pylist()


def test_rows_beyond_the_memory_limit_go_to_a_file_that_has_no_name(shape, make_rows, tmp_path):
    assembler = Assembler(shape, memory_bytes=10_000, spill=tmp_path)
    assembler.begin(traced(1))
    for start in range(0, 9000, 100):
        assembler.add(make_rows(1, range(start, start + 100)))
    assert isinstance(assembler._pool.experts, np.memmap)
    assert list(tmp_path.iterdir()) == []
    assembler.finish(1, 0)
    tokens, _ = assembler.take()
    assert tokens["expert_ids"].to_pylist() == make_rows(1, range(9000)).experts.tolist()


def test_the_mask_of_a_token_is_its_own_or_the_global_one_in_force(assembler, make_rows):
    assembler.begin(traced(1))
    assembler.begin(traced(2, mask="own@1"))
    assembler.add(make_rows(1, range(2)))
    assembler.mask_changes("all@1")
    assembler.add(make_rows(1, range(2, 5)))
    assembler.add(make_rows(2, range(3)))
    assembler.mask_changes(None)
    assembler.add(make_rows(1, [5]))
    assembler.add(make_rows(2, [3]))
    assembler.finish(1, 0)
    tokens, _ = assembler.take()
    assert tokens["mask"].to_pylist() == [None] * 2 + ["all@1"] * 3 + [None]
    assembler.finish(2, 0)
    tokens, requests = assembler.take()
    assert tokens["mask"].to_pylist() == ["own@1"] * 4
    assert requests["mask"].to_pylist() == ["own@1"]


def test_where_masks_compose_a_token_has_both(assembler, make_rows):
    wishes = {1: "own@1", 2: "other@1", 3: "none", 4: None}
    for request, mask in wishes.items():
        assembler.begin(traced(request, mask=mask, composes=True))
    for position, key in enumerate((None, "all@1", "all@2", None)):
        assembler.mask_changes(key)
        for request in wishes:
            assembler.add(make_rows(request, [position]))
    for request in wishes:
        assembler.finish(request, 0)
    tokens, requests = assembler.take()
    assert tokens["mask"].to_pylist() == [
        *("own@1", "all@1+own@1", "all@2+own@1", "own@1"),
        *("other@1", "all@1+other@1", "all@2+other@1", "other@1"),
        *["none"] * 4,
        *(None, "all@1", "all@2", None),
    ]
    assert requests["mask"].to_pylist() == list(wishes.values())
