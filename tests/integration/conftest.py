"""Tiny models and prompts for real engines."""

import os

import numpy as np
import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


@pytest.fixture(scope="session", autouse=True)
def _engines_in_this_process():
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


@pytest.fixture(scope="session")
def specimen(tmp_path_factory):
    """`specimen(arch)` is the folder of a tiny random-weight model, made once."""
    from moescope.clients.specimen import make_specimen

    made = {}

    def make(arch="deepseek_v2"):
        if arch not in made:
            made[arch] = tmp_path_factory.mktemp("models") / arch
            make_specimen(made[arch], arch)
        return made[arch]

    return make


@pytest.fixture(scope="session")
def prompts():
    """64 prompts of varied length as token ids, with repeats of a long common beginning."""
    rng = np.random.default_rng(7)
    common = rng.integers(10, 900, 48).tolist()
    return [
        (common if i % 4 == 0 else []) + rng.integers(10, 900, 5 + 3 * i % 120).tolist()
        for i in range(64)
    ]
