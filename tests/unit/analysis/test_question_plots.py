"""The figures of questions: written for every shape, with the experts that go together beside."""

import numpy as np
import pyarrow as pa
import pytest

from moescope.analysis.question_plots import (
    _log_matrix,
    _side_by_side,
    plot_coactivation,
    plot_load,
    plot_request,
    plot_shift,
    plot_tokens,
)
from moescope.analysis.questions import (
    Selection,
    coactivation,
    even_lift,
    expert_load,
    expert_tokens,
    request_routing,
)
from moescope.analysis.shift import compare
from moescope.tracer.errors import InputError
from moescope.tracer.format import MoeShape


def pairs(lifts):
    """A table of `coactivation` with these lifts, by pair."""
    return pa.Table.from_pylist(
        [{"expert": a, "other": b, "lift": lift} for (a, b), lift in lifts.items()]
    )


def test_experts_that_go_together_are_neighbours():
    groups = ({0, 3, 5}, {1, 2, 4, 7})
    lifts = {
        (a, b): 4.0 if any({a, b} <= group for group in groups) else 0.25
        for a in (0, 1, 2, 3, 4, 5, 7)
        for b in (0, 1, 2, 3, 4, 5, 7)
        if a < b
    }
    experts, logs = _log_matrix(pairs(lifts), 0.5)
    assert experts.tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert logs[0, 3] == logs[3, 0] == 3  # log2(4 / 0.5)
    assert np.isnan(logs[0, 0])
    order = experts[_side_by_side(logs)].tolist()
    assert {*order[:3]} in groups or {*order[:4]} in groups


@pytest.mark.parametrize("shape", [MoeShape((0,), 2, 1), MoeShape((0, 5), 64, 6)])
def test_any_shape_is_drawn(maker_of, tmp_path, shape):
    maker = maker_of(shape)
    requests = [maker.request(f"q{n}", ["prompt"] * 30, n, condition="ab"[n % 2]) for n in range(8)]
    store = maker.write(tmp_path / "s", requests)
    plot_load(expert_load(store), tmp_path / "load.png")
    even = even_lift(shape.num_experts, shape.top_k)
    plot_coactivation(
        coactivation(store, 0), tmp_path / "pairs.svg", even_lift=even, title="layer $0"
    )
    found = compare(store, Selection(condition="a"), Selection(condition="b"))
    plot_shift(found.experts, tmp_path / "shift.pdf", title="a to b")
    tokens = expert_tokens(store, 0, 1, min_total=1).to_pylist()[:12]
    labels = [f"${row['token_id']}" for row in tokens]
    plot_tokens(tokens, labels, tmp_path / "tokens.svg", title="expert $1")
    routing = request_routing(store, "q3")
    plot_request(
        routing,
        [f"${n}" for n in range(30)],
        tmp_path / "request.svg",
        num_experts=shape.num_experts,
        title="q3",
    )
    assert f"<!-- {labels[0]} -->" in (tmp_path / "tokens.svg").read_text()
    assert "<!-- 29 $29 -->" in (tmp_path / "request.svg").read_text()
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    assert "<!-- layer $0 -->" in (tmp_path / "pairs.svg").read_text()
    assert (tmp_path / "shift.pdf").read_bytes().startswith(b"%PDF")


def test_a_wrong_suffix_leaves_nothing(maker, tmp_path):
    store = maker.write(tmp_path / "s", [maker.request("q", ["prompt"])])
    with pytest.raises(InputError, match="end its name with"):
        plot_load(expert_load(store), tmp_path / "load.gif")
    assert not (tmp_path / "load.gif").exists()
