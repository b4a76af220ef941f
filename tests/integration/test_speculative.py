"""A speculating engine leaves the rows of one that does not: drafts in vain have none."""

import numpy as np
import pytest
from engine_process import ONE_PROCESS, finish, start
from engines import traced_rows

from moescope.analysis.verify import verify_store

pytestmark = pytest.mark.engine

LENGTH = 40


@pytest.fixture(scope="module")
def repeating():
    """Prompts that repeat a phrase, so that there is something to look up."""
    rng = np.random.default_rng(7)
    phrase = rng.integers(10, 900, 12).tolist()
    return [
        rng.integers(10, 900, 5 + i).tolist() + 3 * phrase + rng.integers(10, 900, i).tolist()
        for i in range(10)
    ]


@pytest.fixture(scope="module")
def engine(specimen, repeating, tmp_path_factory):
    def run(stop_ids=None, **options):
        """Rounds: to the full length, under a mask, and, if given, with stop tokens."""
        model = specimen("qwen3_moe")
        entries = [{"layer": n, "expert": n, "action": "deactivate"} for n in range(4)]
        stores = [tmp_path_factory.mktemp("store") for _ in range(2 if stop_ids is None else 3)]
        requests = [
            [
                {
                    "wishes": {"example_id": f"{i}", "mask": mask},
                    "sampling": {"max_tokens": LENGTH, "stop_token_ids": stops},
                }
                for i, stops in enumerate(stop_ids or [[]] * len(repeating))
            ]
            for mask, stop_ids in ((None, None), ("m", None), (None, stop_ids))
        ]
        job = {
            "model": str(model),
            "options": options,
            "prompts": repeating,
            "rounds": [
                {
                    "store": str(store),
                    "requests": each,
                    "masks": [{"name": "m", "entries": entries}] if number == 1 else [],
                }
                for number, (store, each) in enumerate(zip(stores, requests, strict=False))
            ],
        }
        return finish(start(job, **ONE_PROCESS)), stores

    return run


@pytest.fixture(scope="module")
def plain(engine):
    return engine()


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_rows_are_those_of_an_engine_without_speculation(
    engine, plain, repeating, specimen, method
):
    answer, stores = plain
    # For each prompt the token that greedy decoding puts at some place, and where it comes first.
    stop_ids = [[tokens[10 + 3 * i]] for i, tokens in enumerate(answer["generated"][0])]
    config = {
        "ngram": {"prompt_lookup_max": 3, "prompt_lookup_min": 1},
        # The model itself, so that drafts are right, but for the mask, which it does not know.
        "draft_model": {"model": str(specimen("qwen3_moe"))},
    }[method]
    speculative = {"method": method, "num_speculative_tokens": 4} | config
    found, others = engine(stop_ids, speculative_config=speculative)
    drafts = found["drafts"]
    assert 0 < drafts["accepted_tokens"] < drafts["draft_tokens"]
    near_ties = 0
    for number, store in enumerate(others):
        assert verify_store(store) == []
        rows, expected = traced_rows(store), traced_rows(stores[number % 2])
        assert rows.keys() == expected.keys()
        for key, (tokens, experts, weights) in expected.items():
            length = len(tokens)
            if number == 2:
                first = answer["generated"][0][int(key)].index(stop_ids[int(key)][0])
                length = len(repeating[int(key)]) + first
            assert rows[key][0] == tokens[:length]
            same = (np.sort(rows[key][1]) == np.sort(experts[:length])).all(-1)
            near_ties += int((~same).sum())
            np.testing.assert_allclose(rows[key][2][same], weights[:length][same], atol=2e-3)
            if number == 1:
                chosen = rows[key][1] == np.arange(experts.shape[1])[:, None]
                assert not chosen.any()
    assert near_ties <= 3
    assert found["generated"][:2] == answer["generated"]
