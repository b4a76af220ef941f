"""What single requests ask for, in an engine that also serves others."""

import dataclasses

import pytest
from engines import as_prompts, open_engine, traced_rows

from moescope.analysis import open_store
from moescope.tracer import TraceRequest, trace
from moescope.tracer.errors import InputError, StoreError, TracerError
from moescope.tracer.session import settle
from moescope.tracer.store import StoreWriter, read_manifest

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def llm(specimen):
    with open_engine(
        specimen("qwen3_moe"), enable_prefix_caching=True, block_size=32, max_num_seqs=8
    ) as llm:
        yield llm


def sampling(wishes=None, **more):
    from vllm import SamplingParams

    extra_args = wishes.extra_args() if isinstance(wishes, TraceRequest) else wishes
    given = {"max_tokens": 6, "temperature": 0, "ignore_eos": True} | more
    return SamplingParams(extra_args=extra_args, **given)


def requests_of(store):
    return open_store(store).execute("SELECT * FROM requests ORDER BY request_id").fetchall()


def test_untraced_requests_in_the_same_batch_leave_no_rows(llm, prompts, tmp_path):
    params = [
        sampling(TraceRequest(trace=i % 3 == 0, example_id=f"{i}", run="mine", condition="c"))
        for i in range(30)
    ]
    with trace(llm, store=tmp_path, default=False):
        llm.generate(as_prompts(prompts[:30]), params, use_tqdm=False)
        llm.generate(as_prompts(prompts[:4]), sampling(), use_tqdm=False)
    rows = traced_rows(tmp_path, "mine")
    assert rows.keys() == {f"{i}" for i in range(0, 30, 3)}
    for key, (tokens, _, _) in rows.items():
        assert tokens[: len(prompts[int(key)])] == prompts[int(key)]
    assert len(requests_of(tmp_path)) == 10


def test_spans_and_names_are_stored_with_the_request(llm, prompts, tmp_path):
    spans = [("document", 0, 10), ("question", 12, 20)]
    wishes = TraceRequest(run="r", example_id="e", condition="with_doc", spans=spans)
    with trace(llm, store=tmp_path):
        llm.generate(as_prompts(prompts[20:21]), sampling(wishes), use_tqdm=False)
    connection = open_store(tmp_path)
    counts = connection.execute(
        "SELECT segment, count(*), min(position), max(position) FROM tokens GROUP BY 1 ORDER BY 3"
    ).fetchall()
    length = len(prompts[20])
    assert counts == [
        ("document", 10, 0, 9),
        ("template", length - 18, 10, length - 1),
        ("question", 8, 12, 19),
        ("response", 5, length, length + 4),
    ]
    assert connection.execute("SELECT run, example_id, condition FROM requests").fetchall() == [
        ("r", "e", "with_doc")
    ]


def test_parallel_sampling_traces_every_sample(llm, prompts, tmp_path):
    with trace(llm, store=tmp_path):
        [output] = llm.generate(
            as_prompts(prompts[1:2]), sampling(n=3, temperature=1.0, seed=3), use_tqdm=False
        )
    traced = sorted(tokens for tokens, _, _ in traced_rows(tmp_path).values())
    expected = sorted(prompts[1] + list(each.token_ids)[:-1] for each in output.outputs)
    assert traced == expected
    assert len({tuple(each.token_ids) for each in output.outputs}) > 1


def test_an_aborted_request_keeps_its_rows_and_ends(llm, prompts, tmp_path):
    with trace(llm, store=tmp_path):
        [aborted] = llm.enqueue(as_prompts([prompts[2]]), sampling(max_tokens=200), use_tqdm=False)
        llm.enqueue(as_prompts([prompts[3]]), sampling(), use_tqdm=False)
        for _ in range(4):
            llm.llm_engine.step()
        llm.llm_engine.abort_request([aborted], internal=True)
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
    rows = {tuple(tokens[:8]): len(tokens) for tokens, _, _ in traced_rows(tmp_path).values()}
    assert rows[tuple(prompts[3][:8])] == len(prompts[3]) + 5
    assert len(prompts[2]) <= rows[tuple(prompts[2][:8])] < len(prompts[2]) + 10


def test_a_traced_request_does_not_read_the_prefix_cache_and_others_do(llm, prompts, tmp_path):
    prompt = as_prompts([prompts[0] + prompts[61]])
    llm.generate(prompt, sampling(), use_tqdm=False)
    with trace(llm, store=tmp_path, default=False):
        [traced] = llm.generate(prompt, sampling(TraceRequest()), use_tqdm=False)
        [plain] = llm.generate(prompt, sampling(), use_tqdm=False)
    assert traced.num_cached_tokens == 0
    assert plain.num_cached_tokens > 0
    assert plain.outputs[0].token_ids == traced.outputs[0].token_ids
    [(tokens, _, _)] = traced_rows(tmp_path).values()
    assert len(tokens) == len(prompts[0] + prompts[61]) + 5


def test_end_of_sequence_leaves_no_row_of_its_own(llm, prompts, tmp_path):
    # Stop where greedy decoding puts its third token, whatever that token is.
    [free] = llm.generate(as_prompts(prompts[5:6]), sampling(), use_tqdm=False)
    stop = free.outputs[0].token_ids[2]
    before = list(free.outputs[0].token_ids).index(stop)
    with trace(llm, store=tmp_path):
        llm.generate(as_prompts(prompts[5:6]), sampling(stop_token_ids=[stop]), use_tqdm=False)
    [(tokens, _, _)] = traced_rows(tmp_path).values()
    assert tokens == prompts[5] + list(free.outputs[0].token_ids)[:before]


def test_a_bad_wish_is_an_error_of_its_request_alone(llm, prompts, tmp_path):
    with trace(llm, store=tmp_path, default=False):
        for bad in (
            {"moescope_trace": "yes"},
            {"moescope_spans": [["question", 0, 10_000]]},
            {"moescope_rum": "typo"},
        ):
            with pytest.raises(InputError, match=next(iter(bad))):
                llm.generate(as_prompts(prompts[:1]), sampling(bad), use_tqdm=False)
        llm.generate(as_prompts(prompts[:1]), sampling(TraceRequest()), use_tqdm=False)
    assert len(traced_rows(tmp_path)) == 1


def test_asking_for_a_trace_where_there_is_no_store_is_an_error(llm, prompts):
    with pytest.raises(InputError, match="no trace store"):
        llm.generate(as_prompts(prompts[:1]), sampling(TraceRequest()), use_tqdm=False)
    llm.generate(as_prompts(prompts[:1]), sampling(), use_tqdm=False)


def test_rows_are_on_disk_while_the_block_goes_on(llm, prompts, tmp_path):
    with trace(llm, store=tmp_path):
        llm.generate(as_prompts(prompts[:3]), sampling(), use_tqdm=False)
        settle(llm)
        assert len(traced_rows(tmp_path)) == 3
        llm.generate(as_prompts(prompts[3:5]), sampling(), use_tqdm=False)
    assert len(traced_rows(tmp_path)) == 5


def test_leaving_the_block_before_a_traced_request_ends_is_an_error(llm, prompts, tmp_path):
    def leave_early():
        with trace(llm, store=tmp_path):
            llm.enqueue(as_prompts(prompts[:1]), sampling(), use_tqdm=False)
            llm.llm_engine.step()

    with pytest.raises(TracerError, match="1 traced requests had not finished"):
        leave_early()
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    assert requests_of(tmp_path) == []


def test_the_null_sink_writes_nothing(llm, prompts, tmp_path):
    with trace(llm, store=None):
        llm.generate(as_prompts(prompts[:3]), sampling(), use_tqdm=False)
    assert list(tmp_path.iterdir()) == []


def test_refusals_leave_the_engine_as_it_was(llm, prompts, tmp_path):
    with trace(llm, store=tmp_path / "a"):
        facts = read_manifest(tmp_path / "a")
        with (
            pytest.raises(InputError, match="tracing already"),
            trace(llm, store=tmp_path / "b"),
        ):
            pass
        llm.generate(as_prompts(prompts[:1]), sampling(), use_tqdm=False)
    assert len(traced_rows(tmp_path / "a")) == 1
    other = dataclasses.replace(facts, architecture="Other")
    StoreWriter(tmp_path / "other", other).close()
    with pytest.raises(StoreError, match="another model"), trace(llm, store=tmp_path / "other"):
        pass
    with pytest.raises(InputError, match="polizy"), trace(llm, store=tmp_path / "c", polizy="x"):
        pass
    with trace(llm, store=tmp_path / "d"):
        llm.generate(as_prompts(prompts[:1]), sampling(), use_tqdm=False)
    assert len(traced_rows(tmp_path / "d")) == 1
