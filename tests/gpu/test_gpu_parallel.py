"""On two GPUs: tensor, expert, pipeline and data parallel engines trace and steer as one GPU does.

CUDA graphs and torch.compile as vLLM sets them. In bfloat16 ranks add up in another order, so rows
are held to transformers', as those of one GPU are (test_gpu_parity.py).
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

NUM_PROMPTS = 16
GIVEN = {name: mask_of(name, seed) for seed, name in enumerate("ABG")}
OPTIONS = {"dtype": "bfloat16", "enforce_eager": False, "gpu_memory_utilization": 0.3}
EXPERTS = {"enable_expert_parallel": True}
BALANCED = EXPERTS | {
    "enable_eplb": True,
    "eplb_config": {"window_size": 8, "step_interval": 16, "num_redundant_experts": 2},
}
STEERED = {"MOESCOPE_STEER": "on", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def mask_for(i):
    return (None, "A", "B", "none")[i % 4]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from moescope.clients.specimen import make_specimen

    folder = tmp_path_factory.mktemp("model") / "qwen3_moe"
    make_specimen(folder, "qwen3_moe")
    return folder


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


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("one GPU", {}),
        ("TP=2", {"tensor_parallel_size": 2}),
        ("EP=2", {"tensor_parallel_size": 2} | EXPERTS),
        ("EP=2 balanced", {"tensor_parallel_size": 2} | BALANCED),
        ("PP=2", {"pipeline_parallel_size": 2}),
        ("DP=2", {}),
        ("DP=2 EP=2", EXPERTS),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_rows_and_masks_are_right(layout, options, model, tmp_path):
    rng = np.random.default_rng(7)
    prompts = [rng.integers(10, 900, 5 + 9 * i).tolist() for i in range(NUM_PROMPTS)]
    numbers = [range(NUM_PROMPTS)]
    environments = [{}]
    if layout.startswith("DP"):
        numbers, environments = [range(10), range(10, NUM_PROMPTS)], replicas()
    stores = [tmp_path / "plain", tmp_path / "masked"]
    started = []
    for mine, environment in zip(numbers, environments, strict=True):
        rounds = []
        for store in stores:
            masked = store.name == "masked"
            requests = [
                {
                    "wishes": {"example_id": f"{i}"} | ({"mask": mask_for(i)} if masked else {}),
                    "sampling": {"max_tokens": 24},
                }
                for i in mine
            ]
            more = {"masks": [GIVEN["A"], GIVEN["B"]], "global": GIVEN["G"]} if masked else {}
            rounds.append({"store": str(store), "requests": requests} | more)
        job = {"model": str(model), "options": OPTIONS | options, "rounds": rounds}
        job["prompts"] = [prompts[i] for i in mine]
        started.append(start(job, **STEERED | environment))
    for each in started:
        finish(each)
    for store in stores:
        assert verify_store(store) == []
    rows = traced_rows(stores[0])
    assert rows.keys() == {f"{i}" for i in range(NUM_PROMPTS)}
    assert all(len(rows[f"{i}"][0]) == len(prompts[i]) + 23 for i in range(NUM_PROMPTS))
    assert assert_as_near_as_rounding(layout, model, rows) > 1000
    steered = traced_rows(stores[1])
    for i in range(NUM_PROMPTS):
        for mask in GIVEN.values():
            obeyed = violations(mask, steered[f"{i}"][1]) == 0
            assert obeyed == (mask["name"] == (mask_for(i) or "G")), (i, mask["name"])
    said = open_store(stores[1]).execute(
        "SELECT DISTINCT example_id, tokens.mask FROM tokens JOIN requests USING (request_id)"
    )
    assert dict(said.fetchall()) == {f"{i}": mask_for(i) or "G" for i in range(NUM_PROMPTS)}
