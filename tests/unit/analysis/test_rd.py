"""Risk differences against a reference in numpy, exactly, and the errors for what can't be had."""

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.analysis import open_store, risk_difference
from moescope.analysis.rd import read_settings
from moescope.tracer.errors import InputError, StoreError
from moescope.tracer.format import MoeShape

SIDES = {"positive": "a", "negative": "b"}


def choices(request, shape, segment, gate_mass, lead, positions, without):
    """A of each token that counts: [tokens, layers, experts]."""
    a = np.zeros((len(request.segments), len(shape.layers), shape.num_experts))
    np.put_along_axis(a, request.experts, request.weights if gate_mass else 1.0, axis=2)
    places = [at for at, there in enumerate(request.segments) if segment in ("all", there)]
    if places and lead:
        places = [*range(max(places[0] - lead, 0), places[0]), *places]
    part = {None: slice(None), "first:2": slice(2), "last:2": slice(-2, None)}
    part |= {"1:-1": slice(1, -1), "-3:": slice(-3, None), ":1": slice(1)}
    places = [at for at in places[part[positions]] if 100 + at not in (without or ())]
    return a[places]


def reference(
    requests, shape, segment, estimator, gate_mass, length_match, include_incomplete, **tokens
):
    """Rates [2, layers, experts] of the conditions a and b, with their token and request counts."""
    sides = [[], []]
    for request in sorted(requests, key=lambda request: request.request_id):
        a = choices(request, shape, segment, gate_mass, **tokens)
        if request.condition in ("a", "b") and len(a) and (request.complete or include_incomplete):
            sides["ab".index(request.condition)].append((request.example_id, a))
    if length_match:
        lengths = [{example: len(a) for example, a in side if example} for side in sides]
        both = {example: min(lengths[0][example], lengths[1][example])
                for example in lengths[0].keys() & lengths[1].keys()}  # fmt: skip
        sides = [[(ex, a[: both[ex]]) for ex, a in side if ex in both] for side in sides]
    rates = []
    for side in sides:
        units = [a for _, a in side]
        if estimator == "token" and units:
            units = [np.concatenate(units)]
        # Python's sum adds one after another; numpy's might not.
        rates.append(sum(a.sum(axis=0) / len(a) for a in units) / max(len(units), 1))
    return rates, [sum(len(a) for _, a in side) for side in sides], [len(side) for side in sides]


def dense(table, column, shape):
    out = np.full((len(shape.layers), shape.num_experts), np.nan)
    rows = np.searchsorted(shape.layers, table["layer"].to_numpy())
    out[rows, table["expert"].to_numpy()] = table[column].to_numpy()
    return out


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from(
        [MoeShape((1, 3, 4), 8, 2), MoeShape((0,), 4, 4), MoeShape((2, 3), 300, 1)]
    ),
    count=st.integers(1, 16),
    segment=st.sampled_from(["response", "prompt", "doc", "all"]),
    estimator=st.sampled_from(["token", "sequence"]),
    gate_mass=st.booleans(),
    length_match=st.booleans(),
    include_incomplete=st.booleans(),
    lead=st.sampled_from([0, 0, 1, 3]),
    positions=st.sampled_from([None, None, "first:2", "last:2", "1:-1", "-3:", ":1"]),
    exclude_token_ids=st.sampled_from([None, None, [102], [100, 103]]),
)
def test_equals_the_reference(maker_of, seed, shape, count, **options):
    if options["segment"] == "all":
        options["lead"] = 0
    maker = maker_of(shape)
    requests = maker.random_requests(seed, count)
    if options["length_match"]:  # at most one complete request of each example and condition
        unique = {
            (request.example_id or request.request_id, request.condition, request.complete): request
            for request in requests
            if request.complete or not options["include_incomplete"]
        }
        requests = list(unique.values())
    expected = {k: v for k, v in options.items() if k != "exclude_token_ids"}
    expected["without"] = options["exclude_token_ids"]
    rates, tokens, examples = reference(requests, shape, **expected)
    options["resamples"] = 0
    with tempfile.TemporaryDirectory() as folder:
        path = maker.write(Path(folder, "s"), requests, per_file=8)
        if 0 in examples:
            with pytest.raises(InputError):
                risk_difference(path, **SIDES, **options)
            return
        table = risk_difference(path, **SIDES, **options)
        # A path's tokens are read from its files; a connection's, by a query.
        assert table.equals(risk_difference(open_store(path), **SIDES, **options))
    counts, *_ = reference(
        requests, shape, **(expected | {"estimator": "token", "gate_mass": False})
    )
    assert table.num_rows == len(shape.layers) * shape.num_experts
    for at, (side, number) in enumerate((("positive", 1), ("negative", 2))):
        assert (dense(table, f"rate_{side}", shape) == rates[at]).all()
        assert table[f"tokens_{side}"].unique().to_pylist() == [tokens[at]]
        assert table[f"examples_{side}"].unique().to_pylist() == [examples[at]]
        chosen = dense(table, f"a{number}", shape)
        assert (chosen == np.rint(counts[at] * tokens[at])).all()
        assert (dense(table, f"d{number}", shape) == tokens[at] - chosen).all()
    assert (dense(table, "rd", shape) == rates[0] - rates[1]).all()
    order = [(-abs(row["rd"]), row["layer"], row["expert"]) for row in table.to_pylist()]
    assert order == sorted(order)


@pytest.fixture(scope="module")
def requests(maker):
    """Two complete pairs, an unpaired request, an incomplete one and one of another run."""
    return [
        maker.request(f"{run}/{example}{condition}", ["prompt"] * 2 + ["response"] * length, length,
                      example_id=example, condition=condition, run=run, complete=complete)
        for run, example, condition, length, complete in [
            ("r", "x", "a", 3, True), ("r", "x", "b", 5, True),
            ("r", "y", "a", 6, True), ("r", "y", "b", 2, True),
            ("r", "z", "a", 4, True), ("r", "v", "b", 4, False),
            ("other", "x", "a", 4, True),
        ]
    ]  # fmt: skip


@pytest.fixture(scope="module")
def store(maker, requests, tmp_path_factory):
    return maker.write(tmp_path_factory.mktemp("rd") / "s", requests)


def test_the_metadata_says_what_was_counted(store):
    options = {"run": "r", "length_match": True}
    found = read_settings(risk_difference(store, **SIDES, **options, resamples=0))
    assert found == {
        "store": str(store),
        "condition_column": "condition",
        **SIDES,
        "segment": "response",
        "estimator": "sequence",
        "gate_mass": False,
        "length_match": True,
        "run": "r",
        "include_incomplete": False,
        "positions": None,
        "lead": 0,
        "token_ids": None,
        "exclude_token_ids": None,
        "strata": None,
        "resamples": 0,
        "seed": 0,
        "tokens_positive": 5,
        "tokens_negative": 5,
        "examples_positive": 2,
        "examples_negative": 2,
        "design": "paired",
        "pairs": 2,
        "aggregate": False,
        "examples": ["x", "y"],
        "num_examples": 2,
        "left_out": {"incomplete": 1, "unpaired": 1},
    }


def test_a_connection_is_left_as_it_was(store):
    con = open_store(store)
    before = con.execute("SHOW TABLES").fetchall()
    assert risk_difference(con, **SIDES).equals(risk_difference(store, **SIDES))
    assert con.execute("SHOW TABLES").fetchall() == before


def test_any_column_can_tell_conditions_apart(store):
    table = risk_difference(store, condition_column="run", positive="r", negative="other")
    assert table["examples_positive"][0].as_py() == 5
    assert table["examples_negative"][0].as_py() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"condition_column": "label"}, "'label'; the requests have: request_id, run, example_id"),
        ({"positive": "c"}, r"condition = 'c'; there are: a \(4\), b \(3\)"),
        ({"positive": "c", "run": "other"}, r"condition = 'c'; there are: a \(1\)"),
        ({"run": "s"}, r"run 's'; the runs are: other \(1\), r \(6\)"),
        ({"segment": "answer"}, r"'answer'; .*: prompt \(14\), response \(28\), or all"),
        ({"estimator": "mean"}, "'mean': choose token or sequence"),
        ({"negative": "a"}, "both 'a'"),
        ({"positions": "2"}, r"positions '2': give first:K, last:K or START:STOP"),
        ({"positions": "first:0"}, "first:K"),
        ({"lead": -1}, "lead is -1"),
        ({"lead": 1, "segment": "all"}, "nothing precedes segment all"),
        ({"resamples": 5}, "5 resamples are too few"),
        ({"resamples": 0, "stability": 3}, "give resamples"),
        ({"strata": "topic"}, "unknown strata column 'topic'; the requests have: request_id"),
        ({"strata": "nowhere.csv:topic"}, "no file nowhere.csv"),
        ({"strata": "run"}, "example 'x' is in the strata 'other' and 'r'"),
        ({"strata": "mask"}, "every request with condition = 'a' is left out"),
        ({"strata": "prompt_tokens", "run": "r"}, None),
        ({"token_ids": [7]}, "and only tokens that the positions and token ids choose"),
        ({"length_match": True}, r"example 'x' has several: other/xa, r/xa, .*\(other, r\)"),
    ],
)
def test_errors_name_the_remedy(store, options, message):
    if message is None:  # the one that is none
        assert risk_difference(store, **(SIDES | options)).num_rows
        return
    with pytest.raises(InputError, match=message):
        risk_difference(store, **(SIDES | options))


def test_everything_left_out(maker, requests, tmp_path):
    path = maker.write(tmp_path / "s", [requests[0], requests[5]])
    with pytest.raises(InputError, match=r"'b' is left out \(incomplete \(1\)\)"):
        risk_difference(path, **SIDES)
    with pytest.raises(InputError, match=r"'a' is left out \(unpaired \(1\)\)"):
        risk_difference(path, **SIDES, include_incomplete=True, length_match=True)


def test_an_incomplete_request_does_not_shorten_a_pair(maker, tmp_path):
    requests = [
        maker.request(name, ["response"] * length, condition=name[0], example_id="x", complete=ok)
        for name, length, ok in [("a1", 5, True), ("a2", 2, False), ("b1", 6, True)]
    ]
    table = risk_difference(maker.write(tmp_path / "s", requests), **SIDES, length_match=True)
    assert table["tokens_positive"][0].as_py() == table["tokens_negative"][0].as_py() == 5


def test_an_empty_store(maker, tmp_path):
    path = maker.write(tmp_path / "s", [])
    with pytest.raises(InputError, match="the store is empty"):
        risk_difference(path, **SIDES)


def test_damaged_tokens_are_an_error_of_the_store(maker, requests, tmp_path):
    path = maker.write(tmp_path / "s", requests)
    file = next((path / "tokens").iterdir())
    data = bytearray(file.read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    file.write_bytes(data)
    with pytest.raises(StoreError, match="store verify"):
        risk_difference(path, **SIDES)


def test_rates_are_added_in_the_order_of_the_ids(maker, tmp_path):
    """Of many addends another order gives other last bits."""
    requests = [
        maker.request(f"q{number:02}", ["response"] * (3 + number % 11), number, condition=side)
        for number, side in enumerate("ab" * 30)
    ]
    shuffled = [requests[at] for at in np.random.default_rng(0).permutation(len(requests))]
    table = risk_difference(maker.write(tmp_path / "s", shuffled), **SIDES, resamples=0)
    options = {"segment": "response", "estimator": "sequence", "gate_mass": False}
    options |= {"length_match": False, "include_incomplete": False}
    tokens = {"lead": 0, "positions": None, "without": None}
    expected, *_ = reference(requests, maker.shape, **options, **tokens)
    assert (dense(table, "rate_positive", maker.shape) == expected[0]).all()
    backwards = sum(
        choices(one, maker.shape, "response", False, **tokens).mean(axis=0)
        for one in requests[::2][::-1]
    )
    assert (backwards / 30 != expected[0]).any()


def test_a_thread_count_does_not_matter(maker, tmp_path):
    path = maker.write(tmp_path / "s", maker.random_requests(7, 40), per_file=5)
    tables = []
    for threads in (1, 3):
        con = open_store(path)
        con.execute(f"SET threads = {threads}")
        tables += [
            risk_difference(con, **SIDES, estimator=estimator, gate_mass=gate_mass)
            for estimator, gate_mass in itertools.product(("token", "sequence"), (False, True))
        ]
    for one, other in zip(tables[:4], tables[4:], strict=True):
        assert one.equals(other)
