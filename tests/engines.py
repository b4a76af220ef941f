"""Real vLLM engines on the CPU, in this process, one at a time, and what they traced."""

import gc
from contextlib import contextmanager

import numpy as np


@contextmanager
def open_engine(model, **options):
    """A `vllm.LLM` in float32 that is gone after the block."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    given = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 64,
        "enable_prefix_caching": False,
    }
    if "deepseek" in str(model) and current_platform.is_cpu():
        # The other one, for processors with AMX, knows no float32.
        given["attention_backend"] = "CPU_MLA"
    llm = LLM(model=str(model), **given | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def as_prompts(prompts):
    return [{"prompt_token_ids": prompt} for prompt in prompts]


def traced_rows(store, run=None):
    """{(example_id or request_id): (token ids, expert ids [n, L, k], weights [n, L, k])}."""
    from moescope.analysis import open_store
    from moescope.tracer.store import read_manifest

    shape = read_manifest(store).shape
    connection = open_store(store)
    where = "" if run is None else f"WHERE run = '{run}'"
    rows = connection.execute(
        "SELECT coalesce(example_id, request_id), list(token_id ORDER BY position), "
        "list(position ORDER BY position), list(expert_ids ORDER BY position), "
        "list(gate_weights ORDER BY position) "
        f"FROM tokens JOIN requests USING (request_id) {where} GROUP BY 1, request_id"
    ).fetchall()
    size = (-1, len(shape.layers), shape.top_k)
    out = {}
    for key, tokens, positions, experts, weights in rows:
        assert positions == list(range(len(positions))), key
        assert key not in out, f"{key} twice"
        out[key] = (tokens, np.array(experts).reshape(size), np.array(weights).reshape(size))
    return out


def assert_ranks_alike(one, other):
    """Two ranks of a tensor-parallel engine stored the same rows, to the bit, under the same masks.

    Returns how many.
    """
    from moescope.analysis import open_store

    rows, others = (
        open_store(store)
        .execute(
            "SELECT coalesce(example_id, request_id), position, token_id, tokens.mask, expert_ids, "
            "gate_weights FROM tokens JOIN requests USING (request_id) ORDER BY ALL"
        )
        .fetchall()
        for store in (one, other)
    )
    assert len(rows) == len(others)
    differ = [(one, other) for one, other in zip(rows, others, strict=True) if one != other]
    assert not differ, f"{len(differ)} of {len(rows)} rows differ; the first: {differ[0]}"
    return len(rows)
