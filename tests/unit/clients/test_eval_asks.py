"""From items to token ids, and from replies to values."""

import numpy as np
import pytest
from eval_cases import choice, question, request, text, user, write_items
from hypothesis import given
from hypothesis import strategies as st

from moescope.clients.eval_asks import Reply, asks_of, divergence, measure
from moescope.clients.eval_items import read_items
from moescope.clients.specimen_tokenizer import build_tokenizer

AXES = ("faithfulness", "safety", "utility")


@pytest.fixture(scope="module")
def tokenizer():
    lines = ["It is the lamp of old and the river.", "No, I will not. Yes, I will.", "a b c d e f"]
    return build_tokenizer(lines * 5, 400)


@pytest.fixture
def item(tmp_path):
    def read(line):
        return read_items(write_items(tmp_path / "items.jsonl", [line]), AXES).items[0]

    return read


def scored(tokenizer, ask):
    return tokenizer.decode(ask.token_ids[ask.first : ask.stop])


def test_a_given_answer_is_scored_with_its_end(item, tokenizer):
    asks = asks_of(item(question("q")), tokenizer, 7, 3)
    assert [*asks] == ["answer", "document", "memory"]
    assert asks["answer"].max_tokens == 7
    said = tokenizer.decode(asks["answer"].token_ids)
    assert said.endswith("<|assistant|>")
    assert scored(tokenizer, asks["document"]) == "It is the lamp." + tokenizer.eos_token
    assert asks["document"].token_ids[: asks["document"].first] == asks["answer"].token_ids
    assert asks["document"].top == 0


def test_choices_and_texts_are_scored_without_it(item, tokenizer):
    asks = asks_of(item(choice("c")), tokenizer, 7, 3)
    assert [scored(tokenizer, ask) for ask in asks.values()] == [
        "a lamp",
        "the long river",
        "stone",
    ]
    told = asks_of(item(text("t")), tokenizer, 7, 3)["text"]
    assert (scored(tokenizer, told), told.top) == ("The winter is long.", 3)
    parts = [{"segment": "one", "text": "It is"}, {"segment": "two", "text": " the lamp."}]
    messages = [*user("Say."), {"role": "assistant", "content": parts}]
    told = asks_of(item(text("t", messages=messages)), tokenizer, 7, 3)["text"]
    assert scored(tokenizer, told) == "It is the lamp."
    raw = asks_of(item(text("t", text="the river and the lamp")), tokenizer, 7, 3)["text"]
    assert (raw.first, raw.stop) == (1, len(raw.token_ids))


def log_p(*probabilities):
    return np.log(np.array(probabilities, np.float32))


def test_values_of_questions_and_requests(item, tokenizer):
    it = item(request("r"))
    asks = asks_of(it, tokenizer, 7, 0)
    refusal = np.full(asks["refusal"].stop - asks["refusal"].first, 0.5)
    refusal[0] = 0.25  # "No" and "Yes" differ at once
    replies = {
        "answer": Reply(text="No."),
        "refusal": Reply(log_p=log_p(*refusal)),
        "compliance": Reply(log_p=log_p(0.5, 0.1)),
    }
    found = measure(it, asks, replies, None)
    assert found.answer == "No."
    assert found.values["p_refusal"] == pytest.approx(0.25 * 0.5 ** (len(refusal) - 1))
    assert found.values["p_compliance"] == pytest.approx(0.05)
    assert found.values["p_refusal_first"] == pytest.approx(0.25)


def test_the_first_token_that_differs_comes_after_those_that_agree(item, tokenizer):
    responses = {"refusal": "It is the lamp.", "compliance": "It is the river."}
    it = item(request("r", responses=responses))
    asks = asks_of(it, tokenizer, 7, 0)
    one, other = (asks[n].token_ids[asks[n].first : asks[n].stop] for n in responses)
    apart = next(n for n in range(len(one)) if one[n] != other[n])
    assert apart > 0
    probabilities = np.linspace(0.1, 0.9, len(one))
    replies = {
        "answer": Reply(text=""),
        "refusal": Reply(log_p=log_p(*probabilities)),
        "compliance": Reply(log_p=log_p(*[0.5] * len(other))),
    }
    found = measure(it, asks, replies, None).values
    assert found["p_refusal_first"] == pytest.approx(probabilities[apart])


def test_choices_by_sum_and_by_bytes(item, tokenizer):
    it = item(choice("c"))  # "a lamp" (6 bytes), "the long river" (14, right), "stone" (5)
    asks = asks_of(it, tokenizer, 7, 0)
    sums = {"choice 0": [-6.0], "choice 1": [-4.0, -4.0], "choice 2": [-9.0]}
    replies = {name: Reply(log_p=np.array(v, np.float32)) for name, v in sums.items()}
    assert measure(it, asks, replies, None).values == {"correct": 0.0, "correct_norm": 1.0}


def listed(log_ps, own, top):
    """As an engine lists them: the own token, then the likeliest."""
    order = np.argsort(-log_ps, axis=1)[:, :top]
    ids = np.concatenate([np.array(own)[:, None], order], axis=1)
    return Reply(
        log_p=np.take_along_axis(log_ps, ids, 1)[:, 0].astype(np.float32),
        ids=ids,
        log_ps=np.take_along_axis(log_ps, ids, 1).astype(np.float32),
    )


def draw(rng, tokens, vocabulary, sharpness):
    logits = rng.normal(size=(tokens, vocabulary)) * sharpness
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


@given(
    seed=st.integers(0, 10_000),
    top=st.integers(1, 30),
    sharpness=st.floats(0.1, 6),
    distance=st.floats(0, 3),
)
def test_divergence_is_exact_for_a_whole_vocabulary_and_never_too_large(
    seed, top, sharpness, distance
):
    rng = np.random.default_rng(seed)
    p = draw(rng, 4, 30, sharpness)
    q = p + distance * rng.normal(size=p.shape)
    q -= np.log(np.exp(q).sum(1, keepdims=True))
    own = rng.integers(0, 30, 4)
    exact = (np.exp(p) * (p - q)).sum(1).mean()
    found = divergence(listed(p, own, top), listed(q, own, top))
    assert 0 <= found <= exact + 2e-5
    if top == 30:
        assert found == pytest.approx(exact, abs=2e-5)


def test_a_text_is_measured_in_nats_a_token(item, tokenizer):
    it = item(text("t"))
    asks = asks_of(it, tokenizer, 7, 2)
    p, q = log_p([0.5, 0.25, 0.25], [0.5, 0.25, 0.25]), log_p([0.25, 0.5, 0.25], [0.5, 0.25, 0.25])
    base, arm = listed(p, [0, 1], 3), listed(q, [0, 1], 3)
    found = measure(it, asks, {"text": arm}, base).values
    assert found["nll"] == pytest.approx(np.log(4))
    assert found["kl"] == pytest.approx(0.25 * np.log(2) / 2, abs=1e-6)
    assert measure(it, asks, {"text": base}, None).values["kl"] == 0
