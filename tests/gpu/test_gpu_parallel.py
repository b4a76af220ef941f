"""On two GPUs: tensor, expert, pipeline and data parallel engines trace and steer as one GPU does.

At the widths of two published models, four layers deep, with random weights; CUDA graphs and
torch.compile as vLLM sets them. In bfloat16 ranks add up in another order, so rows are held to
transformers', as those of one GPU are (test_gpu_parity.py), and to those of one GPU where the
tokens are the same: in the prompts. Ranks that route alike are traced each into a store of its own,
and those are the same to the bit, with masks, and with a global one that comes and goes while
requests run.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from data_parallel import replicas
from engine_process import finish, start
from engines import assert_ranks_alike, traced_rows
from mask_cases import mask_of
from parallel_cases import NUM_PROMPTS, OF_REPLICAS, assert_masks_obeyed, make_rounds
from reference_routing import assert_as_near_as_rounding

from moescope.analysis.verify import verify_store

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

NUM_LAYERS = 4
AT_ONCE = 4  # engines of a model: to start, each waits for imports and compilers most of the time
# New tokens of a request. The first round is long: experts are balanced in it, before the others.
ROUNDS = {"changed": 200, "plain": 24, "masked": 24}
SHAPES = {
    "deepseek_v2": {  # DeepSeek-V2-Lite's
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
    },
    "qwen3_moe": {  # Qwen3-30B-A3B's
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
}
EXPERTS = {"enable_expert_parallel": True}
BALANCED = EXPERTS | {
    "enable_eplb": True,
    # Experts are first moved after a quarter of the interval. Of 16 that is in the steps with which
    # vLLM 0.32 warms up: its thread then copies experts while CUDA graphs are captured, which now
    # and then spoils the graphs, and the engine does not start.
    "eplb_config": {"window_size": 8, "step_interval": 256, "num_redundant_experts": 2},
}
LAYOUTS = {
    "one GPU": {},
    "TP=2": {"tensor_parallel_size": 2},
    "EP=2": {"tensor_parallel_size": 2} | EXPERTS,
    "EP=2 balanced": {"tensor_parallel_size": 2} | BALANCED,
    "PP=2": {"pipeline_parallel_size": 2},
    "DP=2": {},
    "DP=2 EP=2": EXPERTS,
}
OPTIONS = {
    "dtype": "bfloat16",
    "enforce_eager": False,
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16]},
    # With the KV cache's size given, the other is only what must be free at the start.
    "gpu_memory_utilization": 0.02,
    "kv_cache_memory_bytes": 1 << 30,
}
STEERED = {
    "MOESCOPE_STEER": "on",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # `every_rank` sends a function
}


class Model:
    """A model on disk, its masks, and what one GPU traced of it."""

    def __init__(self, arch, folder):
        from moescope.clients.specimen import make_specimen

        make_specimen(folder, arch, num_hidden_layers=NUM_LAYERS, **SHAPES[arch])
        self.arch, self.folder, shape = arch, folder, SHAPES[arch]
        self.first = 1 if arch == "deepseek_v2" else 0  # a dense layer comes before
        layers = range(self.first, NUM_LAYERS)
        experts = shape.get("num_experts") or shape["n_routed_experts"]
        self.masks = {name: mask_of(name, seed, layers, experts) for seed, name in enumerate("ABG")}
        rng = np.random.default_rng(7)
        self.prompts = [rng.integers(10, 900, 5 + 9 * i).tolist() for i in range(NUM_PROMPTS)]

    def run(self, layout, folder):
        """Trace all prompts in three rounds; their folder, and whether experts were moved."""
        began = time.monotonic()
        shares, environments = [range(NUM_PROMPTS)], [{}]
        if layout.startswith("DP"):
            shares, environments = OF_REPLICAS, replicas(2)
        started = []
        for mine, environment in zip(shares, environments, strict=True):
            job = {
                "model": str(self.folder),
                "options": OPTIONS | LAYOUTS[layout],
                "prompts": [self.prompts[i] for i in mine],
                "rounds": make_rounds(folder, mine, self.masks, ROUNDS),
                "every_rank": True,
            }
            # Engines that start at the same time must not compile into one folder.
            environment |= STEERED | {"VLLM_CACHE_ROOT": str(folder / "cache")}
            started.append(start(job, **environment))
        try:
            answers = [finish(each) for each in started]
        finally:
            for process, *_ in started:
                process.kill()  # a replica would wait for one that failed
        print(f"{layout}: {time.monotonic() - began:.0f} s")
        return folder, [answer["moved"] for answer in answers]


@pytest.fixture(scope="module", params=SHAPES)
def model(request, tmp_path_factory):
    return Model(request.param, tmp_path_factory.mktemp("model") / request.param)


@pytest.fixture(scope="module")
def runs(model, request, tmp_path_factory):
    """{layout: what `Model.run` will have returned}, of the layouts to be tested."""
    wanted = {"one GPU"} | {
        item.callspec.params["layout"]
        for item in request.session.items
        if item.module is request.module and item.callspec.params["model"] == model.arch
    }
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {
            layout: pool.submit(model.run, layout, tmp_path_factory.mktemp("run"))
            for layout in LAYOUTS
            if layout in wanted
        }


@pytest.fixture(scope="module")
def alone(model, runs):
    """What one GPU traces: the stores, and how far its rows are from transformers'."""
    folder, _ = runs["one GPU"].result()
    rows = traced_rows(folder / "plain")
    return folder, assert_as_near_as_rounding("one GPU", model.folder, rows)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_and_masks_are_right(layout, model, runs, alone):
    folder, moved = runs[layout].result()
    assert all(moved) == (layout == "EP=2 balanced")
    for name in ROUNDS:
        store = folder / name
        assert verify_store(store) == []
        if layout.startswith(("TP", "EP")):
            print(f"{layout}: {assert_ranks_alike(store, f'{store}-rank1')} rows of two ranks")
    rows = traced_rows(folder / "plain")
    assert rows.keys() == {f"{i}" for i in range(NUM_PROMPTS)}
    lengths = [len(prompt) + ROUNDS["plain"] - 1 for prompt in model.prompts]
    assert [len(rows[f"{i}"][0]) for i in range(NUM_PROMPTS)] == lengths
    near = alone[1]
    if layout != "one GPU":
        near = assert_as_near_as_rounding(layout, model.folder, rows)
    assert near.compared > 1000
    assert_masks_obeyed(folder, model.masks, model.first)
    for name in ("plain", "masked"):
        one, other = traced_rows(alone[0] / name), traced_rows(folder / name)
        assert_prompts_alike(layout, model, one, other, alone[1].rate)


def assert_prompts_alike(layout, model, one, other, rate):
    """The prompts' rows differ by no more than twice what rounding makes of one GPU's."""
    compared = differ = 0
    for i, prompt in enumerate(model.prompts):
        (tokens, experts, weights), theirs = one[f"{i}"], other[f"{i}"]
        assert tokens[: len(prompt)] == theirs[0][: len(prompt)] == prompt
        mine = experts[: len(prompt)], weights[: len(prompt)]
        same = (np.sort(mine[0]) == np.sort(theirs[1][: len(prompt)])).all(-1)
        compared += same.size
        differ += int((~same).sum())
        sums = mine[1].sum(-1) - theirs[2][: len(prompt)].sum(-1)
        assert np.abs(sums[same]).mean() < 0.01
    print(f"{layout}: differs from one GPU in {differ} of {compared} token-layers of prompts")
    assert differ <= (2 * rate + 0.005) * compared
