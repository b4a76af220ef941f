"""Tensor, pipeline and data parallel engines trace and steer as one process does.

Two cores: two workers each, and float32, so that what differs is the order of sums. vLLM's CPU
backend can't do expert parallelism (its kernel takes the experts of other ranks for its own and
crashes), and for data parallel it lacks two collectives, which `engine_process.Collectives` brings.
"""

import numpy as np
import pytest
import torch
from data_parallel import replicas
from engine_process import ONE_PROCESS, finish, start
from engines import assert_ranks_alike, open_engine, traced_rows
from mask_cases import mask_of
from parallel_cases import NUM_PROMPTS, OF_REPLICAS, assert_masks_obeyed, make_rounds

from moescope.analysis import open_store
from moescope.analysis.verify import verify_store
from moescope.tracer.errors import UnsupportedModelError
from moescope.tracer.store import read_manifest, read_writers
from moescope.tracer.vllm_model import MODULAR_BACKENDS, check_config, find_runners

pytestmark = pytest.mark.engine

ROUNDS = {"plain": 8, "masked": 8, "changed": 60}  # new tokens of a request
TWO_CORES = {
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # `every_rank` sends a function
}


@pytest.fixture(scope="module")
def given():
    """The masks: A and B by name, G for all others."""
    return {name: mask_of(name, seed) for seed, name in enumerate("ABG")}


@pytest.fixture(scope="module")
def engine(specimen, prompts, given, tmp_path_factory):
    """Run a job's ROUNDS; returns the folder of their stores."""

    def run(options, chosen=(range(NUM_PROMPTS),), environments=({},), every_rank=False):
        folder = tmp_path_factory.mktemp("stores")
        started = []
        for numbers, environment in zip(chosen, environments, strict=True):
            job = {
                "model": str(specimen("qwen3_moe")),
                "options": options,
                "prompts": [prompts[i] for i in numbers],
                "rounds": make_rounds(folder, numbers, given, ROUNDS),
                "every_rank": every_rank,
            }
            started.append(start(job, **environment))
        for each in started:
            finish(each)
        return folder

    return run


@pytest.fixture(scope="module")
def alone(engine):
    return engine({}, environments=[ONE_PROCESS])


def assert_same(alone, folder, given):
    for name in ROUNDS:
        assert verify_store(folder / name) == []
    for name in ("plain", "masked"):
        one, other = alone / name, folder / name
        assert read_manifest(other).shape == read_manifest(one).shape
        expected, found = traced_rows(one), traced_rows(other)
        assert expected.keys() == found.keys() == {f"{i}" for i in range(NUM_PROMPTS)}
        near_ties = 0
        for key, (tokens, experts, weights) in expected.items():
            assert found[key][0] == tokens
            same = (np.sort(experts) == np.sort(found[key][1])).all(-1)
            near_ties += int((~same).sum())
            np.testing.assert_allclose(found[key][2][same], weights[same], atol=2e-3)
        assert near_ties <= 3
    assert_masks_obeyed(folder, given)


def test_one_rank_of_a_tensor_parallel_engine_records_what_all_of_them_route(engine, alone, given):
    folder = engine({"tensor_parallel_size": 2}, environments=[TWO_CORES], every_rank=True)
    assert_same(alone, folder, given)
    for name in ROUNDS:
        assert [writer.layers for writer in read_writers(folder / name)] == [None]
        assert assert_ranks_alike(folder / name, folder / f"{name}-rank1") > 700


def test_the_stages_of_a_pipeline_are_joined(engine, alone, given):
    folder = engine({"pipeline_parallel_size": 2}, environments=[TWO_CORES])
    assert_same(alone, folder, given)
    writers = read_writers(folder / "plain")
    assert sorted(writer.layers for writer in writers) == [[0, 1], [2, 3]]
    one, other = (
        open_store(store).execute(
            "SELECT example_id, segment, layer, sum(count) FROM activation "
            "JOIN requests USING (request_id) GROUP BY ALL ORDER BY ALL"
        )
        for store in (alone / "plain", folder / "plain")
    )
    assert one.fetchall() == other.fetchall()


def test_data_parallel_replicas_write_their_own_files(engine, alone, given):
    environments = [TWO_CORES | {"ENGINE_PROCESS_COLLECTIVES": "1"} | each for each in replicas(2)]
    options = {"worker_extension_cls": "engine_process.Collectives"}
    folder = engine(options, chosen=OF_REPLICAS, environments=environments)
    assert_same(alone, folder, given)
    assert len(read_writers(folder / "plain")) == 2


@pytest.fixture(scope="module")
def llm(specimen):
    with open_engine(specimen("qwen3_moe")) as llm:
        yield llm


@pytest.mark.parametrize(
    ("part", "name", "value", "said"),
    [
        ("parallel_config", "decode_context_parallel_size", 2, "decode_context_parallel_size = 2"),
        ("parallel_config", "prefill_context_parallel_size", 2, "prefill_context_parallel_size"),
        ("parallel_config", "enable_dbo", True, "--enable-dbo"),
        ("parallel_config", "enable_elastic_ep", True, "--enable-elastic-ep"),
        ("cache_config", "kv_sharing_fast_prefill", True, "--kv-sharing-fast-prefill"),
    ],
)
def test_an_engine_whose_steps_can_not_be_told_apart_is_refused(
    llm, monkeypatch, part, name, value, said
):
    config = llm.llm_engine.vllm_config
    check_config(config)
    monkeypatch.setattr(getattr(config, part), name, value)
    with pytest.raises(UnsupportedModelError, match=said):
        check_config(config)


def test_routers_that_see_other_tokens_are_refused(llm, monkeypatch):
    [runners] = llm.apply_model(find_runners)
    model = torch.nn.ModuleList(runners)
    parallel = runners[1].moe_config.moe_parallel_config
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "sp_size", 2)
        with pytest.raises(UnsupportedModelError, match=r"sequence-parallel.*tensor-parallel-size"):
            find_runners(model)
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "dp_size", 2)
        find_runners(model)  # the kernel sends tokens on after their routing
        patch.setattr(runners[1]._quant_method, "moe_kernel", None)
        with pytest.raises(UnsupportedModelError, match="data_parallel_size = 2 to 1"):
            find_runners(model)


def test_the_backends_named_instead_of_monolithic_kernels_are_modular():
    from vllm.model_executor.layers.fused_moe.oracle import (
        fp8,
        int_wna16,
        mxfp4,
        nvfp4,
        unquantized,
    )

    found = {
        "nvfp4": (nvfp4.map_nvfp4_backend, nvfp4.backend_to_kernel_cls),
        "mxfp4": (mxfp4.map_mxfp4_backend, mxfp4.backend_to_kernel_cls),
        "mxint4": (int_wna16.map_wna16_backend, int_wna16.backend_to_kernel_cls),
        "fp8": (fp8.map_fp8_backend, fp8.backend_to_kernel_cls),
        "bf16": (unquantized.map_unquantized_backend, unquantized.backend_to_kernel_cls),
    }
    assert found.keys() == MODULAR_BACKENDS.keys()
    for kind, (named, classes) in found.items():
        backends = named(MODULAR_BACKENDS[kind].split()[0])
        for backend in backends if isinstance(backends, list) else [backends]:
            assert not any(experts.is_monolithic() for experts in classes(backend))


def test_load_balancing_leaves_logical_experts_in_the_trace(llm, monkeypatch):
    from vllm.distributed.eplb.eplb_state import EplbLayerState
    from vllm.model_executor.layers.fused_moe.router import base_router

    # The CPU's own mapping to physical experts is none at all.
    monkeypatch.setattr(
        base_router, "eplb_map_to_physical_and_record", lambda topk_ids, **_: topk_ids + 100
    )
    [runners] = llm.apply_model(find_runners)
    router, one = runners[1].router, torch.zeros(1)
    state = EplbLayerState(one, one, one, one)
    state.num_unpadded_tokens_tensors = [one]
    logits = torch.randn(5, 16)
    expected = logits.topk(4).indices.sort().values
    monkeypatch.setattr(router, "eplb_state", state)
    _, physical = router.select_experts(hidden_states=torch.zeros(5, 128), router_logits=logits)
    [recorded] = llm.collective_rpc(
        lambda worker: worker.model_runner.moescope.recorder.ids[1, :5].clone()
    )
    assert torch.equal(physical.long().sort().values, expected + 100)
    assert torch.equal(recorded.long().sort().values, expected)
