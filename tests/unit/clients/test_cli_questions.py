"""The commands that ask a store, on the trace in examples/."""

import json
from functools import partial
from pathlib import Path

import commands
import pyarrow.parquet as pq
import pytest

from moescope.analysis import open_store, risk_difference
from moescope.analysis.export import write_ranking
from moescope.clients.cli import app
from moescope.clients.specimen_tokenizer import build_tokenizer
from moescope.tracer.errors import InputError

STORE = Path(__file__).parents[3] / "examples" / "traces"


invoke = partial(commands.invoke, app)


def rows(output):
    """The cells of a printed table's lines."""
    return [line.split() for line in output.splitlines() if line.split()[:1]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """That of the traced specimen."""
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rankings(tmp_path_factory):
    """Two rankings of the trace, of the question's and of the response's tokens."""
    folder = tmp_path_factory.mktemp("rankings")
    for segment in ("question", "response"):
        table = risk_difference(
            STORE, positive="with_doc", negative="without_doc", run="plain", segment=segment,
            resamples=0,
        )  # fmt: skip
        write_ranking(table, folder / f"{segment}.parquet")
    return folder / "question.parquet", folder / "response.parquet"


def test_load(tmp_path):
    out, plot = tmp_path / "load.csv", tmp_path / "load.png"
    output = invoke(
        "load", STORE, "--run", "steered", "--overload", 4, "--out", out, "--plot", plot
    )
    # The mask keeps two experts off in layer 2 and one on, whose load is experts / top-k = 4.
    assert "dead: L01E13, L02E07, L02E10, L03E11" in output
    assert "load 4 or more: L01E00, L02E03" in output
    line = next(row for row in rows(output) if row[0] == "2")
    assert line[1] == "6,167"
    assert line[4:] == ["3", "4.00", "2", "1"]
    assert len(out.read_text().splitlines()) == 1 + 3 * 16
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "dead" not in invoke("load", STORE, "--run", "plain").split("overused", 1)[1]


def test_coactivation(tmp_path):
    out, plot = tmp_path / "pairs.parquet", tmp_path / "pairs.svg"
    output = invoke(
        "coactivation", STORE, "--layer", 2, "--condition", "with_doc", "--mask", "none",
        "--top", 3, "--out", out, "--plot", plot,
    )  # fmt: skip
    best = pq.read_table(out).to_pylist()
    shown = [row for row in rows(output) if len(row) == 7 and row[0].isdigit()]
    enough = [row for row in best if row["together"] >= 10]
    assert [row[:2] for row in shown] == [[str(r["expert"]), str(r["other"])] for r in enough[:3]]
    assert "layer 2, 4,847 tokens (condition=with_doc, mask=none)" in output
    assert "a router that chooses at random has the lift 0.80" in output
    assert "<!-- layer 2, 4,847 tokens (condition=with_doc, mask=none) -->" in plot.read_text()


def test_compare(tmp_path):
    out, plot = tmp_path / "shift.json", tmp_path / "shift.svg"
    output = invoke(
        "compare", STORE, "--a", "run=plain", "--b", "mask=follow", "--segment", "response",
        "--relabellings", 100, "--top", 3, "--out", out, "--plot", plot,
    )  # fmt: skip
    assert "tokens of both sides: 300, of 48 pairs of requests" in output
    shift = {(row["layer"], row["expert"]): row for row in json.loads(out.read_text())}
    assert shift[2, 3]["share_b"] == pytest.approx(1 / 4)  # activated: in every token's top-4
    assert shift[2, 7]["share_b"] == 0  # deactivated
    top = [row for row in rows(output) if len(row) > 4 and row[2][:1] in "+-"]
    assert [row[:2] for row in top] == [["2", "3"], ["1", "0"], ["2", "7"]]
    assert top[2][5].startswith("3,")  # its place was taken by the activated one
    assert "<!-- run=plain to mask=follow -->" in plot.read_text()


def test_rank_overlap(rankings, tmp_path):
    output = invoke(
        "rank-overlap", *rankings, "--top", 8, "--top", 48, "--plot", tmp_path / "o.png"
    )
    shown = {row[0]: row[1:] for row in rows(output) if row[0] in ("8", "48")}
    strongest = [
        {(row["layer"], row["expert"]) for row in pq.read_table(file).to_pylist()[:8]}
        for file in rankings
    ]
    assert int(shown["8"][0]) == len(strongest[0] & strongest[1])
    assert shown["8"][1] == "1.3"  # 8 x 8 / 48
    assert shown["48"] == ["48", "48.0", "1"]
    same = invoke("rank-overlap", rankings[0], rankings[0])
    assert "+1.000 of RD, +1.000 of |RD|" in same
    assert (tmp_path / "o.png").stat().st_size > 0


def test_experts_show(tokenizer, tmp_path):
    out = tmp_path / "tokens.csv"
    output = invoke(
        "experts", "show", "L02E07", STORE, "--tokenizer", tokenizer, "--run", "plain",
        "--top", 3, "--context", 4, "--by", "count", "--out", out, "--plot", tmp_path / "t.svg",
    )  # fmt: skip
    assert "L02E07: favourite tokens" in (tmp_path / "t.svg").read_text()
    first = out.read_text().splitlines()[1].split(",")
    line = next(row for row in rows(output) if first[0] in row)
    assert f"{int(first[1]):,}" in line
    assert "» the«" in output
    by_id = invoke("experts", "show", "L02E07", STORE, "--run", "plain", "--top", 3)
    assert "»" in by_id  # ids alone
    assert "lower --min-total" in invoke(
        "experts", "show", "L02E07", STORE, "--run", "steered", "--min-total", 1
    )


def test_request(tokenizer, tmp_path):
    con = open_store(STORE)
    query = "SELECT request_id, expert_ids FROM tokens WHERE position = 2 ORDER BY ALL LIMIT 1"
    [(request_id, experts)] = con.execute(query).fetchall()
    out = tmp_path / "request.parquet"
    output = invoke(
        "request", STORE, request_id, "--layers", "2-3", "--tokenizer", tokenizer, "--out", out,
        "--plot", tmp_path / "q.svg",
    )  # fmt: skip
    drawn = (tmp_path / "q.svg").read_text()
    assert "|user|" in drawn
    assert "layer 3" in drawn
    assert "layer 1" not in drawn
    line = next(row for row in rows(output) if row[0] == "2")
    assert line[-8:] == [str(expert) for expert in experts[4:]]
    assert "layer 1" not in output
    assert "<|user|>" in output
    table = pq.read_table(out)
    assert table.num_rows == 3 * len({*table["position"].to_pylist()})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["load", STORE, "--segment", "x"], "no token with segment=x"),
        (["load", STORE, "--plot", "x.gif"], "can't draw x.gif"),
        (["load", STORE, "--out", "x.txt"], "can't tell the format"),
        (["coactivation", STORE, "--layer", "0"], "no MoE layer 0"),
        (["compare", STORE, "--a", "x", "--b", "run=plain"], "NAME=VALUE"),
        (["experts", "show", "7", STORE], "as L12E07"),
        (["experts", "show", "L01E99", STORE], "no expert 99 of layer 1"),
        (["experts", "show", "L01E01", STORE, "--tokenizer", "/nowhere"], "tokenizer /nowhere"),
        (["request", STORE, "nobody"], "no request 'nobody'"),
        (["rank-overlap", STORE / "manifest.json", "x.parquet"], "can't read|is no ranking"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(InputError, match=message):
        invoke(*arguments)


def test_layers_of_a_request_are_checked():
    [(request_id,)] = (
        open_store(STORE).execute("SELECT request_id FROM requests LIMIT 1").fetchall()
    )
    for layers, message in (("0-3", "no MoE layer 0, but 1 to 3"), ("a", "numbers and ranges")):
        with pytest.raises(InputError, match=message):
            invoke("request", STORE, request_id, "--layers", layers)


def test_rankings_of_other_models_have_no_overlap(rankings, tmp_path):
    table = pq.read_table(rankings[0])
    pq.write_table(table.slice(0, 40), tmp_path / "part.parquet")
    with pytest.raises(InputError, match="different experts"):
        invoke("rank-overlap", rankings[0], tmp_path / "part.parquet")
