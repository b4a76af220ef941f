"""Small routing that is easy to recognise: every value follows from (request, position)."""

import numpy as np
import pytest

from moescope.tracer.format import ModelFacts, MoeShape
from moescope.tracer.ring import Rows


@pytest.fixture
def shape():
    return MoeShape((1, 2, 5), num_experts=8, top_k=2)


@pytest.fixture
def facts(shape):
    return ModelFacts(
        model="toy",
        revision=None,
        architecture="ToyMoE",
        dtype="float32",
        shape=shape,
        scoring="softmax",
        renormalize=False,
        engine="test",
    )


@pytest.fixture
def make_rows(shape):
    def make(request, positions, version=0):
        """Rows of one request; `version` marks rows that were computed again."""
        positions = np.asarray(positions, np.int32)
        rows = Rows.empty(len(positions), shape)
        rows.request[:] = request
        rows.position[:] = positions
        rows.token[:] = 1000 * request + positions
        first = (positions[:, None] + np.arange(len(shape.layers)) + request + version) % 8
        rows.experts[:] = np.stack([first, (first + 1) % 8], -1).reshape(rows.experts.shape)
        rows.weights[:] = np.tile(np.array([0.75, 0.25], np.float16), len(shape.layers))
        return rows

    return make
