"""The ESFT import: on small files, and on the published archive with its published scores."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from moescope.analysis import open_store, risk_difference
from moescope.analysis.esft import import_esft
from moescope.analysis.verify import verify_store
from moescope.tracer.errors import InputError, StoreError

ARCHIVE = (
    Path(__file__).parents[3] / ".." / "shared" / "data" / "esft_routing" / "expert_scores.tar.xz"
)


def write(folder, files):
    for name, lines in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{line}\n" for line in lines))
    return folder


# Top-2 of 4. Two sequences of two tokens and one.
GOOD = {
    "x/law/expert_weights_2.txt": ["0\t3\t2\t1\t\t0.25\t0.5\t0.125\t0.125", "1\t0\t\t0.5\t0.25"],
    "x/law/expert_weights_10.txt": ["3\t1\t1\t0\t\t0.5\t0\t0.5\t0.25", "2\t3\t\t0.25\t0.125"],
}
SMALL = {"top_k": 2, "num_experts": 4}


def test_a_small_import(tmp_path):
    folder, seen = write(tmp_path / "esft", GOOD), []
    counts = import_esft(folder, tmp_path / "s", **SMALL, progress=lambda *done: seen.append(done))
    assert counts == (2, 3)
    assert seen == [(1, 2), (2, 2)]
    con = open_store(tmp_path / "s")
    assert con.execute("FROM tokens ORDER BY request_id, position").fetchall() == [
        ("law/1", 0, -1, "prompt", None, [3, 0, 3, 1], [0.5, 0.25, 0.5, 0.0]),
        ("law/1", 1, -1, "prompt", None, [1, 2, 1, 0], [0.125, 0.125, 0.5, 0.25]),
        ("law/2", 0, -1, "prompt", None, [1, 0, 2, 3], [0.5, 0.25, 0.25, 0.125]),
    ]
    assert con.execute("FROM requests ORDER BY request_id").fetchall() == [
        ("law/1", "esft", "law/1", "law", None, 2, 2, True, None),
        ("law/2", "esft", "law/2", "law", None, 1, 1, True, None),
    ]
    assert con.execute("SELECT moe_layers FROM model").fetchone() == ([2, 10],)
    assert verify_store(tmp_path / "s") == []
    with pytest.raises(InputError, match="has the run 'esft' already"):
        import_esft(folder, tmp_path / "s", **SMALL)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1\t0\t0.5\t0.25", "no two tabs"),
        ("1\tx\t\t0.5\t0.25", "x"),
        ("1\t0\t\t0.5\t", "''|float"),
        ("1\t0\t2\t\t0.5\t0.25\t0.1", "3 expert ids are no multiple of top-k = 2"),
        ("1\t0\t\t0.5", "2 expert ids, but 1 gate weights"),
        ("1\t4\t\t0.5\t0.25", r"not in 0\.\.3"),
        ("1\t1\t\t0.5\t0.25", "an expert twice"),
        ("1\t0\t\t0.5\t-0.25", "negative"),
        ("1\t0\t\t1e9\t0.25", "no float16"),
        ("", "no two tabs"),
        ("1\t0\t2\t3\t\t0.5\t0.25\t0.5\t0.25", "2 tokens, but 1 in expert_weights_2.txt"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    name = "x/law/expert_weights_10.txt"
    folder = write(tmp_path / "esft", GOOD | {name: [GOOD[name][0], line]})
    with pytest.raises(InputError, match=f"expert_weights_10.txt, line 2: .*{message}"):
        import_esft(folder, tmp_path / "s", **SMALL)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"readme.txt": ["hello"]}, "holds no DOMAIN"),
        (GOOD | {"y/law/expert_weights_2.txt": []}, "same domain and layer"),
        (GOOD | {"x/code/expert_weights_2.txt": ["1\t0\t\t1\t0"]}, "one has layer 10"),
        (GOOD | {"x/law/expert_weights_10.txt": []}, "is empty"),
        (GOOD | {"x/law/expert_weights_10.txt": ["1\t0\t\t1\t0"]}, "1 lines, .*2.txt 2"),
    ],
)
def test_bad_folders(tmp_path, files, message):
    with pytest.raises(InputError, match=message):
        import_esft(write(tmp_path / "esft", files), tmp_path / "s", **SMALL)


def test_another_model(maker, tmp_path):
    path = maker.write(tmp_path / "s", [])
    with pytest.raises(StoreError, match="another model"):
        import_esft(write(tmp_path / "esft", GOOD), path, **SMALL)


@pytest.mark.skipif(not ARCHIVE.exists(), reason="needs ../shared/data/esft_routing")
def test_the_published_archive(tmp_path):
    """Token-pooled rates equal ESFT's own scores, to the four digits that it published."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path / "esft", filter="data")
    assert import_esft(tmp_path / "esft", tmp_path / "s") == (213, 33_279)
    assert verify_store(tmp_path / "s") == []
    con = open_store(tmp_path / "s")
    for gate_mass, scores, per_token in ((False, "token_scores", 6), (True, "gate_scores", 1)):
        table = risk_difference(
            con,
            positive="law",
            negative="summary",
            segment="prompt",
            estimator="token",
            gate_mass=gate_mass,
        )
        for side, domain in (("positive", "law"), ("negative", "summary")):
            file = tmp_path / "esft" / "results" / "expert_scores" / domain / "summary.json"
            published = json.loads(file.read_text())[scores]
            rates = np.array(table[f"rate_{side}"]) / per_token
            experts = zip(table["layer"].to_pylist(), table["expert"].to_pylist(), strict=True)
            expected = [published[str(layer)][str(expert)] for layer, expert in experts]
            # Published to four digits; float16 weights are off by at most 2^-12 of themselves.
            np.testing.assert_allclose(rates, expected, rtol=2**-12, atol=0.51e-4)
