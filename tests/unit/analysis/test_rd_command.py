"""`moescope rd` and `moescope store aggregate`, through typer on real stores."""

from functools import partial

import commands
import pyarrow.parquet as pq
import pytest
import typer

from moescope.analysis.rd import read_settings
from moescope.clients.cli_analysis import register_analysis, store_app
from moescope.tracer.errors import InputError

app = typer.Typer()
register_analysis(app)
app.add_typer(store_app, name="store")


invoke = partial(commands.invoke, app)


@pytest.fixture
def store(maker, tmp_path):
    requests = [
        maker.request(f"{example}{side}", ["prompt"] * 3 + ["response"] * 4, 2 * example + number,
                      example_id=f"e{example}", condition=side)
        for example in range(20)
        for number, side in enumerate("ab")
    ]  # fmt: skip
    return maker.write(tmp_path / "s", requests, per_file=40)


def rd(store, *options):
    return invoke("rd", store, "--positive", "a", "--negative", "b", *options)


def test_says_how_sure_it_is(store, tmp_path):
    output = rd(store, "--out", tmp_path / "r.parquet", "--resamples", 200, "--top", 3)
    table = pq.read_table(tmp_path / "r.parquet")
    first = table.slice(0, 1).to_pylist()[0]
    for text in (
        f"{first['ci_low']:+.4f} {first['ci_high']:+.4f}",
        f"{first['q_value']:.4f}",
        "of 24 experts differ at a false discovery rate of 5 % (q ≤ 0.05; 20 pairs, 200 resamples)",
        "to find an expert named beforehand (80% power): 199 for d = 0.2, 34 for d = 0.5",
    ):
        assert text in output
    assert read_settings(table)["examples"] == sorted(f"e{number}" for number in range(20))
    assert "two halves" not in output


def test_stability(store):
    output = rd(store, "--stability", "--top", 3, "--resamples", 200)
    assert "two halves: rank correlation " in output
    assert "of the first 3 experts " in output


def test_without_intervals(store):
    output = rd(store, "--no-intervals")
    assert "interval" not in output
    assert "power" not in output
    with pytest.raises(InputError, match="leave --no-intervals out"):
        rd(store, "--no-intervals", "--stability")


def test_chooses_tokens(store):
    assert "a: 20 requests, 80 tokens" in rd(store)
    assert "a: 20 requests, 100 tokens" in rd(store, "--lead", 1)
    assert "a: 20 requests, 20 tokens" in rd(store, "--lead", 1, "--positions", "first:1")
    assert "a: 20 requests, 60 tokens" in rd(store, "--exclude-token-ids", "104")
    assert "a: 20 requests, 40 tokens" in rd(store, "--token-ids", "104,105,9")
    with pytest.raises(InputError, match="--token-ids 'x,1': give token ids"):
        rd(store, "--token-ids", "x,1")


def test_special_tokens_need_the_tokenizer(store):
    with pytest.raises(InputError, match=r"the tokenizer of tiny, .* with --exclude-token-ids"):
        rd(store, "--exclude-special")


def test_aggregate(store, tmp_path):
    assert f"{store}/activation.parquet: " in invoke("store", "aggregate", store)
    rd(store, "--out", tmp_path / "r.parquet")
    assert read_settings(pq.read_table(tmp_path / "r.parquet"))["aggregate"]
