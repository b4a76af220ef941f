"""Heat maps: written for every shape, with the model's own numbers and the settings on them."""

import pytest

from moescope.analysis import risk_difference
from moescope.analysis.plot import heatmap
from moescope.tracer.errors import InputError
from moescope.tracer.format import MoeShape


def ranking(maker, path, **options):
    return risk_difference(
        maker.write(path / "s", maker.random_requests(3, 20)), positive="a", negative="b", **options
    )


@pytest.mark.parametrize(
    ("shape", "labels", "hidden"),
    [
        (MoeShape((1, 3, 27), 16, 2), ["1", "3", "27", "15"], ["2.5", "26"]),
        (MoeShape(tuple(range(48)), 128, 4), ["0", "47", "124"], ["1.5", "125"]),
    ],
)
def test_labels_are_thinned_out(maker_of, tmp_path, shape, labels, hidden):
    maker = maker_of(shape)
    heatmap(ranking(maker, tmp_path), tmp_path / "map.svg")
    svg = (tmp_path / "map.svg").read_text()
    # Text is drawn as paths, each after a comment with the text.
    assert [label for label in labels if f"<!-- {label} -->" not in svg] == []
    assert [label for label in hidden if f"<!-- {label} -->" in svg] == []


def test_the_title_says_what_is_compared(maker, tmp_path):
    table = ranking(maker, tmp_path, segment="all", estimator="token", gate_mass=True)
    heatmap(table, tmp_path / "map.svg")
    svg = (tmp_path / "map.svg").read_text()
    for text in ("a minus b", "segment all, estimator token", "difference in mean gate weight"):
        assert f"<!-- {text} -->" in svg


def test_no_difference_at_all_can_be_drawn(maker, tmp_path):
    same = [maker.request(name, ["response"], condition=name) for name in "ab"]
    table = risk_difference(maker.write(tmp_path / "s", same), positive="a", negative="b")
    heatmap(table, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_suffix(maker, tmp_path):
    with pytest.raises(InputError, match=r"\.pdf, \.png, \.svg"):
        heatmap(ranking(maker, tmp_path), tmp_path / "map.gif")
