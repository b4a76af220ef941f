"""SteerMoE's tables: read without running what a pickle says, and written as its notebooks read."""

import base64
import io
import os
import pickle
import zlib

import numpy as np
import pandas as pd
import pytest

from moescope.analysis import risk_difference
from moescope.analysis.rd import read_settings
from moescope.analysis.steermoe import read_steermoe, write_steermoe
from moescope.clients.mask_files import mask_from_rd
from moescope.tracer.errors import InputError

COLUMNS = [
    "layer", "expert", "a1", "a2", "d1", "d2", "a1_n", "a2_n", "risk_diff", "Layer_Expert",
    "risk_diff_abs",
]  # fmt: skip

# As pandas 2.2 and numpy 2.2 pickled it, in the way of SteerMoE's notebook: two layers of four
# experts, of which three tokens chose 0 and 1, and one token 2 and 3.
PANDAS_2 = zlib.decompress(
    base64.b64decode("""
eNqlVd1u0zAUTrp267rxLxV2A7dFQlWzCcEFaIgxJMgoaPeT5SROHTVJI9vRNolJ42LrJvkOswfgRXgl3gCOvaSkZdI2zZX8
nfT82N859vFh48fPecsMeS/DaYB51x8x0g0ZToiSi++wwO+N/F09/aYOVEfWUTJgSj6umkepICzFMe8mOMUDwriSy2/jkT/8
dP4N7rJdeKA48vg/FyXvoDzNIn8YE+RpH238IM2TbL+LTHiQCYt8JZdQyEaJl4ehCdk5s2pWZTTfTOPsuEw/O36vT+N19dfd
z03Xu6n+pvH+w18zeF39lVHJhjkwgIHYz/RxlbXwpTo9Gatt1XHnpP1K9fv9j39gmMm1hPLcpts8VtLeUALM6O3OWVmp8lzN
FVgvsFFgcWushbKUBbYKVPS+rEWVDdD2RcsfKbqil3Zr2owu6S0cXq04ln0JztrNUrpMr+gTt6bzc75F2fTyKBZRCje2wePI
10l2LTCxxxUGsl29uUkOHpgxDJVZRoz4o5QLlvsCfOlduQANwSh1pCO1YXvqPF02/PTKkMTPU1X8OlPFdUjj6Q60pYWtXq+1
2eupUnIm0upEWjOSM7FzJnbOxM4xdgTi0mfuotuq0hsrvdSj6dYXkD3Cux7m0DBbKCW76IP+TzP8IhulbFpnAO1U0TX6XLOl
L0quS/Dx2rBoxHgfWpucJ3sZYQIOMXb0BFurBVoKQKpjB6UaVjUssogPURCFIaR4S7ujzcL51kSFsMcNJ1lPdTfv58e6Wtty
5SIuDKcDTWZbY4UApX0ovcAQ27VknYtRptymFggItolJ9ASPBNxC2JsmXL4lKCECmwzswAnCQsArcQBUURjjgREf4jge7XIU
5BmcLywIirFH4Ik44bnX/Qv0/qmg
""")
)


@pytest.fixture
def ranking(maker, tmp_path):
    store = maker.write(tmp_path / "s", maker.random_requests(3, 20))
    return risk_difference(store, positive="a", negative="b", estimator="token", resamples=0)


def write(path, thing, protocol=5):
    path.write_bytes(thing if isinstance(thing, bytes) else pickle.dumps(thing, protocol))
    return path


def test_a_table_of_older_pandas(tmp_path):
    table = read_steermoe(write(tmp_path / "a.pkl", PANDAS_2), positive="safe", negative="unsafe")
    rows = [(r["layer"], r["expert"], r["a1"], r["d1"], r["a2"], r["d2"], r["rd"])
            for r in table.to_pylist()]  # fmt: skip
    assert rows == [
        (layer, expert, *((3, 0, 0, 1, 1.0) if expert < 2 else (0, 3, 1, 0, -1.0)))
        for layer in (0, 1)
        for expert in range(4)
    ]
    settings = read_settings(table)
    assert (settings["positive"], settings["negative"]) == ("safe", "unsafe")
    assert settings["estimator"] == "token"


def test_there_and_back(maker, ranking, tmp_path):
    write_steermoe(ranking, tmp_path / "a.pkl")
    back = read_steermoe(tmp_path / "a.pkl", layers=maker.shape.layers)
    for name in back.column_names:
        expected = ranking[name].to_pylist()
        if name.startswith("rate") or name == "rd":
            np.testing.assert_allclose(back[name], expected, rtol=1e-12)
        else:
            assert back[name].to_pylist() == expected, name
    mask = mask_from_rd(back, name="m", deactivate=3)
    assert mask.entries == mask_from_rd(ranking, name="m", deactivate=3).entries


def test_the_notebooks_columns(maker, ranking, tmp_path):
    """What its `steer_moe` does with the file: counts of layers and experts, sorting, signs."""
    write_steermoe(ranking, tmp_path / "a.pkl")
    frame = pd.read_pickle(tmp_path / "a.pkl")
    assert list(frame.columns) == COLUMNS
    assert frame["Layer_Expert"].dtype == object  # older pandas reads no other texts
    assert frame.columns.dtype == object
    assert (frame["layer"].nunique(), frame["expert"].nunique(), len(frame)) == (3, 8, 24)
    assert frame["layer"].max() == 2  # the index into the tensor of MoE layers
    ordered = frame.sort_values(by="risk_diff_abs", ascending=False).reset_index(drop=True)
    assert (ordered["risk_diff_abs"] == frame["risk_diff_abs"]).all()
    first = ranking.to_pylist()[0]
    assert frame["risk_diff"][0] == pytest.approx(first["rd"])
    layer, expert = maker.shape.layers.index(first["layer"]), first["expert"]
    assert frame["Layer_Expert"][0] == f"L{layer:02d}\nE{expert:02d}"
    assert frame["a1_n"][0] == pytest.approx(first["rate_positive"])


class Malicious:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize(
    "attack",
    [
        lambda flag: Malicious(os.system, f"touch {flag}"),
        lambda flag: Malicious(eval, f"open({str(flag)!r}, 'w')"),
        lambda flag: pd.DataFrame({"layer": [Malicious(os.system, f"touch {flag}")]}),
        lambda _: Malicious(getattr, pd.DataFrame, "eval"),
        lambda flag: Malicious(pd.read_csv, str(flag)),
        lambda flag: Malicious(np.load, str(flag)),
        lambda flag: Malicious(pd.DataFrame.eval, pd.DataFrame(), f"open({str(flag)!r}, 'w')"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_malicious_pickle_does_nothing(tmp_path, attack, protocol):
    flag = tmp_path / "flag"
    path = write(tmp_path / "a.pkl", attack(flag), protocol)
    with pytest.raises(InputError, match=r"it names [\w.]+, which no table needs"):
        read_steermoe(path)
    assert not flag.exists()


def test_a_dotted_name_does_not_reach_through_an_allowed_one(tmp_path):
    """Protocol 4 lets a name have dots: pandas.DataFrame is allowed, its methods are not."""
    code = (
        b"\x80\x04" + pickle.SHORT_BINUNICODE + b"\x06pandas"
        + pickle.SHORT_BINUNICODE + b"\x0eDataFrame.eval" + pickle.STACK_GLOBAL + b"."
    )  # fmt: skip
    with pytest.raises(InputError, match=r"names pandas\.DataFrame\.eval"):
        read_steermoe(write(tmp_path / "a.pkl", code))


FRAME = pickle.loads(PANDAS_2)


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (b"", "Ran out of input"),
        (PANDAS_2[:300], "can't read"),
        ([1, 2], "is no table of SteerMoE"),
        (FRAME.drop(columns=["d2"]).astype({"Layer_Expert": object}), "no column d2"),
        (FRAME.assign(a1=0.5), "column a1 holds something else than counts"),
        (FRAME.assign(a1=-1.0), "column a1 holds something else than counts"),
        (FRAME.assign(a1=float("nan")), "column a1 holds something else than counts"),
        (FRAME.head(0), "column layer holds something else"),
    ],
)
def test_what_is_no_ranking(tmp_path, thing, message):
    if isinstance(thing, pd.DataFrame):
        thing = thing.copy()
        thing.columns = pd.Index(list(thing.columns), dtype=object)
    with pytest.raises(InputError, match=message):
        read_steermoe(write(tmp_path / "a.pkl", thing))


def test_texts_of_pandas_3_are_refused_with_the_remedy(tmp_path):
    buffer = io.BytesIO()
    pd.DataFrame({"layer": [0], "name": pd.array(["x"], dtype="string[pyarrow]")}).to_pickle(buffer)
    with pytest.raises(InputError, match="dtype object"):
        read_steermoe(write(tmp_path / "a.pkl", buffer.getvalue()))


def test_layers_must_be_all(ranking, tmp_path):
    write_steermoe(ranking, tmp_path / "a.pkl")
    with pytest.raises(InputError, match="3 layers, and 2 numbers"):
        read_steermoe(tmp_path / "a.pkl", layers=[1, 3])


def test_only_rankings_are_written(ranking, tmp_path):
    with pytest.raises(InputError, match="no column d2"):
        write_steermoe(ranking.drop_columns(["d2"]), tmp_path / "a.pkl")
    assert not (tmp_path / "a.pkl").exists()
