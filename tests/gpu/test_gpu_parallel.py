"""On two GPUs: tensor, expert, pipeline and data parallel engines trace and steer as one GPU does.

At the widths of two published models, four layers deep, with random weights; CUDA graphs and
torch.compile as vLLM sets them. In bfloat16 ranks add up in another order, so rows are held to
transformers', as those of one GPU are (test_gpu_parity.py), and to those of one GPU where the
tokens are the same: in the prompts. Masks too: a rank that ran other experts than the first one
traced would change what every later layer routes.
"""

import socket

import numpy as np
import pytest
from engine_process import finish, start
from engines import traced_rows
from mask_cases import mask_of, violations
from reference_routing import assert_as_near_as_rounding

from moescope.analysis import open_store
from moescope.analysis.verify import verify_store

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

NUM_PROMPTS, NUM_TOKENS, NUM_LAYERS = 16, 24, 4
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
    "eplb_config": {"window_size": 8, "step_interval": 16, "num_redundant_experts": 2},
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
STEERED = {"MOESCOPE_STEER": "on", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def mask_for(i):
    return (None, "A", "B", "none")[i % 4]


class Model:
    """A model on disk, its masks, and what one GPU traced of it."""

    def __init__(self, arch, folder):
        from moescope.clients.specimen import make_specimen

        make_specimen(folder, arch, num_hidden_layers=NUM_LAYERS, **SHAPES[arch])
        self.folder, shape = folder, SHAPES[arch]
        self.first = 1 if arch == "deepseek_v2" else 0  # a dense layer comes before
        layers = range(self.first, NUM_LAYERS)
        experts = shape.get("num_experts") or shape["n_routed_experts"]
        self.masks = {name: mask_of(name, seed, layers, experts) for seed, name in enumerate("ABG")}
        rng = np.random.default_rng(7)
        self.prompts = [rng.integers(10, 900, 5 + 9 * i).tolist() for i in range(NUM_PROMPTS)]

    def run(self, layout, folder):
        """Trace all prompts without masks and with; the two stores."""
        numbers, environments = [range(NUM_PROMPTS)], [{}]
        if layout.startswith("DP"):
            # The second replica has less to do, and takes part in the other's steps.
            numbers, environments = [range(10), range(10, NUM_PROMPTS)], replicas()
        stores = [folder / "plain", folder / "masked"]
        started = []
        for mine, environment in zip(numbers, environments, strict=True):
            rounds = []
            for store in stores:
                masked = store.name == "masked"
                requests = [
                    {
                        "wishes": {"example_id": f"{i}"}
                        | ({"mask": mask_for(i)} if masked else {}),
                        "sampling": {"max_tokens": NUM_TOKENS},
                    }
                    for i in mine
                ]
                given = self.masks
                more = {"masks": [given["A"], given["B"]], "global": given["G"]} if masked else {}
                rounds.append({"store": str(store), "requests": requests} | more)
            job = {"model": str(self.folder), "options": OPTIONS | LAYOUTS[layout]}
            job |= {"rounds": rounds, "prompts": [self.prompts[i] for i in mine]}
            started.append(start(job, **STEERED | environment))
        for each in started:
            finish(each)
        return stores


def replicas():
    """The environments of two data-parallel processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = "VLLM_DP_RANK", "VLLM_DP_RANK_LOCAL", "VLLM_DP_SIZE", "VLLM_DP_MASTER_PORT"
    return [
        {"VLLM_DP_MASTER_IP": "127.0.0.1"}
        | dict(zip(names, map(str, (rank, rank, 2, port)), strict=True))
        for rank in range(2)
    ]


@pytest.fixture(scope="module", params=SHAPES)
def model(request, tmp_path_factory):
    return Model(request.param, tmp_path_factory.mktemp("model") / request.param)


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    """What one GPU traces: the stores, and how far its rows are from transformers'."""
    stores = model.run("one GPU", tmp_path_factory.mktemp("alone"))
    return stores, assert_as_near_as_rounding("one GPU", model.folder, traced_rows(stores[0]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_and_masks_are_right(layout, model, alone, tmp_path):
    stores = alone[0] if layout == "one GPU" else model.run(layout, tmp_path)
    for store in stores:
        assert verify_store(store) == []
    rows = traced_rows(stores[0])
    assert rows.keys() == {f"{i}" for i in range(NUM_PROMPTS)}
    lengths = [len(prompt) + NUM_TOKENS - 1 for prompt in model.prompts]
    assert [len(rows[f"{i}"][0]) for i in range(NUM_PROMPTS)] == lengths
    assert assert_as_near_as_rounding(layout, model.folder, rows).compared > 1000
    steered = traced_rows(stores[1])
    for i in range(NUM_PROMPTS):
        for mask in model.masks.values():
            obeyed = violations(mask, steered[f"{i}"][1], model.first) == 0
            assert obeyed == (mask["name"] == (mask_for(i) or "G")), (i, mask["name"])
    said = open_store(stores[1]).execute(
        "SELECT DISTINCT example_id, tokens.mask FROM tokens JOIN requests USING (request_id)"
    )
    assert dict(said.fetchall()) == {f"{i}": mask_for(i) or "G" for i in range(NUM_PROMPTS)}
    for one, other in zip(alone[0], stores, strict=True):
        assert_prompts_alike(layout, model, traced_rows(one), traced_rows(other), alone[1].rate)


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
