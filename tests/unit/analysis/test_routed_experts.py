"""Imports of what vLLM and SGLang return: every form, what is missing in them, what is wrong."""

import base64
import io
import json

import numpy as np
import pytest

from moescope.analysis import open_store, risk_difference
from moescope.analysis.aggregate import build_aggregate
from moescope.analysis.questions import Selection, expert_load, layer_load
from moescope.analysis.routed_experts import import_routed_experts
from moescope.analysis.routed_sources import Layout
from moescope.analysis.shift import compare
from moescope.analysis.verify import verify_store
from moescope.tracer.errors import InputError, StoreError

LAYOUT = Layout(num_experts=8)
FLAT = Layout(num_experts=8, hidden_layers=4, top_k=2)


def experts(tokens, seed=0, dense=(0,), fill=0, dtype=np.uint8):
    """[tokens, 4 layers, top-2 of 8], with `fill` in the dense layers."""
    ids = np.random.default_rng(seed).random((tokens, 4, 8)).argsort(axis=2)[..., :2]
    ids[:, list(dense)] = fill
    return ids.astype(dtype)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()


def raw(array):
    return base64.b64encode(array.astype(np.int32).tobytes()).decode()


def write(path, *items):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
    else:
        path.write_text(json.dumps(items[0] if len(items) == 1 else list(items)))
    return path


def completion(name="cmpl-1", tokens=6, **choice):
    return {
        "id": name,
        "choices": [
            {"index": 0, "prompt_token_ids": [1, 2, 3, 4], "token_ids": [7, 8, 9]}
            | {"routed_experts": npy(experts(tokens))}
            | choice
        ],
        "usage": {"prompt_tokens": 4, "completion_tokens": 3},
    }


def rows_of(store, columns="position, token_id, segment, expert_ids"):
    con = open_store(store)
    return con.execute(f"SELECT {columns} FROM tokens ORDER BY request_id, position").fetchall()


def expected(ids, tokens, prompt):
    return [
        (at, tokens[at], "prompt" if at < prompt else "response", ids[at, 1:].ravel().tolist())
        for at in range(len(ids))
    ]


def test_an_array_file(tmp_path):
    np.save(tmp_path / "q17.npy", experts(5))
    counts = import_routed_experts([tmp_path / "q17.npy"], tmp_path / "s", LAYOUT, run="mine")
    assert counts == (1, 5)
    assert rows_of(tmp_path / "s") == expected(experts(5), [-1] * 5, 5)
    con = open_store(tmp_path / "s")
    assert con.execute("FROM requests").fetchall() == [
        ("q17", "mine", None, None, None, 5, 5, True, None)
    ]
    assert con.execute("SELECT moe_layers, weights FROM model").fetchall() == [([1, 2, 3], False)]
    assert verify_store(tmp_path / "s") == []


OLD = {
    "id": "old",
    "prompt_token_ids": [1, 2, 3, 4],
    "prompt_routed_experts": experts(6)[:4].tolist(),
    "choices": [{"token_ids": [7, 8, 9], "routed_experts": experts(6)[4:].tolist()}],
}
GENERATE = {
    "output_ids": [7, 8, 9],
    "prompt_token_ids": [1, 2, 3, 4],
    "meta_info": {
        "id": "sg",
        "prompt_tokens": 4,
        "completion_tokens": 3,
        "routed_experts": raw(experts(6, fill=-1, dtype=np.int32)),
    },
}
SGLEXT = {
    "id": "chat",
    "prompt_token_ids": [1, 2, 3, 4],
    "choices": [{"token_ids": [7, 8, 9]}, {"token_ids": [7]}],
    "sglext": {"routed_experts": raw(experts(6))},
}
TOKENS_IN = {
    "request_id": "tito",
    "choices": [{"token_ids": [7, 8, 9], "routed_experts": npy(experts(6))}],
    "prompt_token_ids": [1, 2, 3, 4],
}


@pytest.mark.parametrize(
    "response", [completion(), OLD, GENERATE, SGLEXT, TOKENS_IN, {"response": completion()}]
)
def test_every_form_gives_the_same(tmp_path, response):
    source = write(tmp_path / "r.json", response)
    assert import_routed_experts([source], tmp_path / "s", FLAT) == (1, 6)
    assert rows_of(tmp_path / "s") == expected(experts(6), [1, 2, 3, 4, 7, 8], 4)
    con = open_store(tmp_path / "s")
    assert con.execute("SELECT prompt_tokens, complete FROM requests").fetchall() == [(4, True)]
    assert verify_store(tmp_path / "s") == []


def test_lengths_without_ids(tmp_path):
    response = completion()
    del response["choices"][0]["prompt_token_ids"], response["choices"][0]["token_ids"]
    import_routed_experts([write(tmp_path / "r.json", response)], tmp_path / "s", LAYOUT)
    assert rows_of(tmp_path / "s") == expected(experts(6), [-1] * 6, 4)


def test_several_choices_and_labels(tmp_path):
    response = completion() | {"usage": {"prompt_tokens": 4, "completion_tokens": 6}}
    response["choices"].append(response["choices"][0] | {"routed_experts": npy(experts(6, 1))})
    np.save(tmp_path / "one.npy", experts(5))
    source = write(
        tmp_path / "items.jsonl",
        {"response": response, "example_id": 5, "condition": "c", "run": "mine"},
        {"request_id": "named", "routed_experts": "one.npy"},
        {"routed_experts": experts(3).tolist()},
    )
    import_routed_experts([source], tmp_path / "s", LAYOUT, run="r", condition="d")
    con = open_store(tmp_path / "s")
    query = "SELECT request_id, run, example_id, condition, tokens FROM requests ORDER BY ALL"
    assert con.execute(query).fetchall() == [
        ("cmpl-1-0", "mine", "5", "c", 6),
        ("cmpl-1-1", "mine", "5", "c", 6),
        ("items-3", "r", None, "d", 3),
        ("named", "r", None, "d", 5),
    ]


def test_a_prompt_that_was_cut(tmp_path):
    response = completion(routed_experts=npy(experts(4)))
    source = write(tmp_path / "r.json", response)
    with pytest.raises(InputError, match=r"4 rows from position 0 on, but 7 tokens.*--start"):
        import_routed_experts([source], tmp_path / "s", LAYOUT)
    import_routed_experts([source], tmp_path / "s", LAYOUT, start=2)
    assert [row[:3] for row in rows_of(tmp_path / "s")] == [
        (2, 3, "prompt"), (3, 4, "prompt"), (4, 7, "response"), (5, 8, "response"),
    ]  # fmt: skip
    con = open_store(tmp_path / "s")
    assert con.execute("SELECT complete FROM requests").fetchall() == [(False,)]
    assert verify_store(tmp_path / "s") == []


def test_there_are_no_weights(tmp_path):
    """What needs none has answers; gate mass is NULL, never zero."""
    sources = []
    for number in range(8):
        np.save(tmp_path / f"{number}.npy", experts(5, number))
        sources.append(tmp_path / f"{number}.npy")
    store = tmp_path / "s"
    import_routed_experts(sources[:4], store, LAYOUT, run="a")
    import_routed_experts(sources[4:], store, LAYOUT, run="b")
    con = open_store(store)
    query = "SELECT count(*), count(gate_weight), count(expert) FROM routing"
    assert con.execute(query).fetchall() == [(8 * 5 * 6, 0, 8 * 5 * 6)]
    query = "SELECT count(gate_mass), sum(count)::INT FROM activation"
    assert con.execute(query).fetchall() == [(0, 240)]
    assert layer_load(store)["tokens"].to_pylist() == [40] * 3
    assert expert_load(store)["gate_mass"].null_count == 3 * 8
    found = compare(store, Selection(run="a"), Selection(run="b")).layers
    assert found["mass_moved"].null_count == 3
    assert found["total_variation"].null_count == found["by_chance"].null_count == 0


def test_a_store_has_weights_or_none(maker, tmp_path):
    layout = Layout(8, model="tiny", architecture="TinyMoe", scoring="softmax")
    ids = np.array([[[0, 0], [1, 2], [0, 0], [3, 1], [2, 3]]])
    np.save(tmp_path / "q.npy", ids)
    store = maker.write(tmp_path / "s", [maker.request("p", ["prompt"])])
    with pytest.raises(StoreError, match="weights True there, False here"):
        import_routed_experts([tmp_path / "q.npy"], store, layout)
    layers = maker.write(tmp_path / "t", [])
    assert json.loads((layers / "manifest.json").read_text())["model"].get("weights") is None


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (
            {"n_routed_experts": 64, "num_experts_per_tok": 6, "num_hidden_layers": 27}
            | {"architectures": ["DeepseekV2ForCausalLM"], "scoring_func": "softmax"},
            (64, 6, 27, "DeepseekV2ForCausalLM", "softmax"),
        ),
        (
            {"text_config": {"num_local_experts": 16, "num_experts_per_tok": 1}
             | {"num_hidden_layers": 48}},
            (16, 1, 48, "unknown", "unknown"),
        ),
    ],
)  # fmt: skip
def test_layout_of_a_config(tmp_path, config, layout):
    write(tmp_path / "config.json", config)
    found = Layout.of_config(tmp_path)
    names = ("num_experts", "top_k", "hidden_layers", "architecture", "scoring")
    assert tuple(getattr(found, name) for name in names) == layout


TWICE = experts(3)
TWICE[1, 2] = 5


@pytest.mark.parametrize(
    ("item", "layout", "message"),
    [
        ({"text": "no"}, LAYOUT, "line 1: holds no routed_experts"),
        ([1], LAYOUT, "no JSON object, but list"),
        ({"routed_experts": 5}, LAYOUT, "is int, not base64"),
        ({"routed_experts": "?"}, LAYOUT, "damaged"),
        ({"routed_experts": npy(experts(3))[:80]}, LAYOUT, "damaged"),
        ({"routed_experts": "none.npy"}, LAYOUT, "can't read none.npy"),
        ({"routed_experts": [[1, 2], [3]]}, LAYOUT, "no array"),
        ({"routed_experts": [[1, 2]]}, LAYOUT, r"\[tokens, layers, top-k\], and is int64 \[1, 2\]"),
        ({"routed_experts": npy(experts(3) / 2)}, LAYOUT, "is float64"),
        ({"routed_experts": raw(experts(3))}, LAYOUT, "flat.*--config"),
        ({"routed_experts": raw(experts(3))}, Layout(8, None, 5, 2), "no multiple of 40"),
        ({"routed_experts": npy(experts(3))}, Layout(4), r"not in 0\.\.3"),
        ({"routed_experts": npy(experts(3))}, Layout(8, (0, 1)), "twice"),
        ({"routed_experts": npy(experts(3))}, Layout(8, (4,)), "no layer 4 among 4"),
        ({"routed_experts": npy(TWICE)}, Layout(8, (1, 2, 3)), "twice"),
        ({"routed_experts": npy(experts(3)[..., :1])}, LAYOUT, "top-1.*--moe-layers"),
        (completion(tokens=9), LAYOUT, "9 rows from position 0 on, but 7 tokens"),
    ],
)
def test_mistakes_leave_no_store(tmp_path, item, layout, message):
    source = write(tmp_path / "bad.jsonl", item)
    with pytest.raises(InputError, match=message):
        import_routed_experts([source], tmp_path / "s", layout)
    assert not (tmp_path / "s").exists()


def test_an_array_with_a_pickle_is_refused(tmp_path):
    np.save(tmp_path / "bad.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="can't read"):
        import_routed_experts([tmp_path / "bad.npy"], tmp_path / "s", LAYOUT)


def test_ids_are_once_in_a_store(tmp_path):
    source = write(tmp_path / "r.jsonl", completion(), completion())
    with pytest.raises(InputError, match="two requests are called 'cmpl-1'"):
        import_routed_experts([source], tmp_path / "s", LAYOUT)
    source = write(tmp_path / "r.json", completion())
    import_routed_experts([source], tmp_path / "s", LAYOUT)
    with pytest.raises(InputError, match="has the request 'cmpl-1' already"):
        import_routed_experts([source], tmp_path / "s", LAYOUT)
    other = write(tmp_path / "o.json", completion("cmpl-2", routed_experts=npy(experts(6)[:, :3])))
    with pytest.raises(InputError, match=r"\[3, 2\] layers and top-k, but \[4, 2\]"):
        import_routed_experts([source, other], tmp_path / "t", LAYOUT)


def test_what_needs_gate_weights_says_that_there_are_none(tmp_path):
    np.save(tmp_path / "one.npy", experts(6))
    import_routed_experts([tmp_path / "one.npy"], tmp_path / "s", layout=LAYOUT)
    with pytest.raises(InputError, match="no gate weights"):
        risk_difference(tmp_path / "s", positive="a", negative="b", gate_mass=True)
    with pytest.raises(InputError, match="no gate weights"):
        build_aggregate(tmp_path / "s")
