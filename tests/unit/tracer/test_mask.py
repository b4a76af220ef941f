"""The mask's format, its checks against a model, and the arrays that it becomes."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.tracer.errors import InputError
from moescope.tracer.format import MoeShape
from moescope.tracer.mask import (
    ACTIVATE,
    DEACTIVATE,
    ComposeError,
    MaskSignature,
    RouterSpec,
    SignatureError,
    check_mask,
    compile_mask,
    compose,
    make_mask,
    mask_in_force,
    parse_mask,
    read_mask,
    write_mask,
)
from moescope.tracer.mask_format import number_ranges

SHAPE = MoeShape((1, 2, 5), num_experts=8, top_k=2)
SOFTMAX = RouterSpec("softmax", renormalize=False)


def entry(layer, expert, action="deactivate", value=None):
    fields = {"layer": layer, "expert": expert, "action": action}
    return fields if value is None else fields | {"value": value}


def mask(*entries, **fields):
    return make_mask(**({"name": "m", "entries": list(entries)} | fields))


def masks():
    """Any sound mask for SHAPE: at most two activated and six deactivated experts a layer."""

    @st.composite
    def build(draw):
        steermoe = draw(st.booleans())
        entries = []
        for layer in SHAPE.layers:
            experts = draw(st.permutations(range(8)))
            active, off = draw(st.integers(0, 2)), draw(st.integers(0, 6))
            entries += [entry(layer, e, "activate") for e in experts[:active]]
            entries += [entry(layer, e) for e in experts[2 : 2 + off]]
            if not steermoe:
                rest = experts[:2]
                factors = draw(st.lists(st.floats(0, 1e6), max_size=2))
                entries += [
                    entry(layer, e, "scale", f) for e, f in zip(rest, factors, strict=False)
                ]
                biases = draw(st.lists(st.floats(-1e6, 1e6), max_size=2))
                entries += [entry(layer, e, "bias", b) for e, b in zip(rest, biases, strict=False)]
        fields = {"name": draw(st.from_regex(r"[a-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True))}
        if steermoe:
            fields |= {"mode": "steermoe", "epsilon": draw(st.floats(1e-3, 10))}
        else:
            fields["renormalise"] = draw(st.sampled_from([None, True, False]))
        if fields["name"] == "none":
            fields["name"] = "some"
        fields["signature"] = draw(st.sampled_from([None, MaskSignature.of(SHAPE).model_dump()]))
        fields["note"] = draw(st.none() | st.text(max_size=20))
        return mask(*draw(st.permutations(entries)), **fields)

    return build()


@given(masks())
def test_json_keeps_everything(made):
    assert parse_mask(made.to_json()) == made
    assert parse_mask(made.to_json()).to_json() == made.to_json()
    json.loads(made.to_json())


@given(masks())
def test_a_sound_mask_is_accepted_and_compiled(made):
    check_mask(made, SHAPE, SOFTMAX)
    table = compile_mask(made, SHAPE)
    places = {(layer, expert) for layer, expert in made.by_expert()}
    at = {layer: index for index, layer in enumerate(SHAPE.layers)}
    seen = np.zeros((3, 8), bool)
    for item in made.entries:
        place = at[item.layer], item.expert
        seen[place] = True
        match item.action:
            case "scale":
                assert table.scale[place] == np.float32(item.value)
            case "bias":
                assert table.bias[place] == np.float32(item.value)
            case "activate":
                assert table.action[place] == ACTIVATE
            case "deactivate":
                assert table.action[place] == DEACTIVATE
    assert (table.named == seen).all()
    assert seen.sum() == len(places)
    assert (table.touched == seen.any(1)).all()
    unnamed = ~table.named
    assert not table.action[unnamed].any()
    assert not table.bias[unnamed].any()
    assert (table.scale[unnamed] == 1).all()
    assert table.action.dtype == np.int8
    assert table.bias.dtype == table.scale.dtype == np.float32


def test_a_file_is_written_whole_one_entry_a_line(tmp_path):
    path = tmp_path / "m.json"
    made = mask(
        entry(1, 7), entry(2, 0, "scale", 0.5), note="naïve", source={"rd": {"segment": "all"}}
    )
    write_mask(made, path)
    assert read_mask(path) == made
    lines = path.read_text().splitlines()
    assert '    {"layer": 1, "expert": 7, "action": "deactivate"},' in lines
    assert '    {"layer": 2, "expert": 0, "action": "scale", "value": 0.5}' in lines
    assert list(tmp_path.iterdir()) == [path]
    assert mask().to_json() == '{\n  "name": "m",\n  "mode": "hard",\n  "entries": []\n}\n'
    with pytest.raises(InputError, match="can't write the mask"):
        write_mask(made, tmp_path / "none" / "m.json")


def test_epsilon_has_a_default_in_mode_steermoe_only():
    assert mask(mode="steermoe").epsilon == 0.01
    assert mask(mode="steermoe", epsilon=1).epsilon == 1
    assert mask().epsilon is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "a/b"}, "name = 'a/b': 'a/b' can't be a mask's name: use up to 100"),
        ({"name": "None"}, 'not "none"'),
        ({"name": "x" * 101}, "up to 100"),
        ({"name": "a\n"}, "can't be"),
        ({"name": "-a"}, "begin with a letter"),
        ({"epsilon": 0.1}, 'epsilon = 0.1: goes with "mode": "steermoe" only'),
        ({"mode": "steermoe", "epsilon": 0}, "epsilon = 0: Input should be greater than 0"),
        ({"mode": "soft"}, "mode = 'soft': Input should be 'hard' or 'steermoe'"),
        ({"mode": "steermoe", "renormalise": True}, "renormalise belongs to scale"),
        ({"renormalise": "yes"}, "renormalise = 'yes'"),
        ({"renormalize": True}, "renormalize = True: Extra inputs are not permitted"),
        ({"entries": [entry(1, 2, "kill")]}, r"entries\[0\].action = 'kill'.*'deactivate'"),
        ({"entries": [entry(1, -1)]}, r"entries\[0\].expert = -1"),
        ({"entries": [entry(True, 1)]}, r"entries\[0\].layer"),
        ({"entries": [entry("1", 1)]}, r"entries\[0\].layer = '1'"),
        ({"entries": [{"layer": 1, "action": "activate"}]}, r"entries\[0\].expert: Field required"),
        ({"entries": [entry(3, 7, "scale")]}, "layer 3, expert 7: scale needs a value"),
        ({"entries": [entry(3, 7, "bias")]}, "layer 3, expert 7: bias needs a value"),
        ({"entries": [entry(3, 7, "scale", -0.5)]}, "layer 3, expert 7: a scale of -0.5 is"),
        ({"entries": [entry(3, 7, "bias", 1e39)]}, r"layer 3, expert 7: the value 1e\+39"),
        ({"entries": [entry(3, 7, "bias", float("nan"))]}, r"entries\[0\].value = nan"),
        ({"entries": [entry(3, 7, "scale", float("inf"))]}, r"entries\[0\].value = inf"),
        ({"entries": [entry(3, 7, "activate", 1.0)]}, "layer 3, expert 7: activate takes no"),
        ({"entries": [entry(3, 7), entry(3, 7)]}, "layer 3, expert 7: deactivate is given twice"),
        (
            {"entries": [entry(3, 7, "scale", 1), entry(3, 7, "scale", 2)]},
            "layer 3, expert 7: scale is given twice",
        ),
        (
            {"entries": [entry(3, 7), entry(3, 7, "activate")]},
            "layer 3, expert 7: deactivate and activate contradict",
        ),
        (
            {"entries": [entry(3, 7, "bias", 1), entry(3, 7, "scale", 1), entry(3, 7)]},
            "layer 3, expert 7: deactivate and bias and scale contradict",
        ),
        (
            {"mode": "steermoe", "entries": [entry(3, 7), entry(3, 8, "bias", 1)]},
            "layer 3, expert 8: the mode steermoe knows only .* take bias out",
        ),
        ({"entries": [entry(1, 2, "a")] * 5}, "and 2 more"),
        ({"signature": {"moe_layers": [1], "num_experts": 8}}, "signature.top_k: Field required"),
    ],
)
def test_a_bad_mask_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        mask(**fields)


def test_a_bad_file_is_named(tmp_path):
    path = tmp_path / "m.json"
    with pytest.raises(InputError, match=r"can't read the mask .*m\.json: No such file"):
        read_mask(path)
    for text, message in [
        ("{", "m.json: Invalid JSON"),
        ("[]", "m.json: Input should be an object"),
        ('{"name": "m", "entries": [], "source": {"x": NaN}}', "source: Out of range float"),
        (b"\xff", "m.json: Invalid JSON"),
        ("{}", "m.json: name: Field required; entries: Field required"),
    ]:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(InputError, match=message):
            read_mask(path)


def test_scale_bias_and_activate_may_meet_on_one_expert():
    both = mask(entry(1, 2, "activate"), entry(1, 2, "scale", 2), entry(1, 2, "bias", -1))
    table = compile_mask(both, SHAPE)
    assert (table.action[0, 2], table.scale[0, 2], table.bias[0, 2]) == (ACTIVATE, 2, -1)
    assert [str(item) for item in both.entries] == ["activate", "scale 2.0", "bias -1.0"]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (mask(entry(0, 3)), r"names layer 0 \(layer 0: expert 3\).* MoE layers are 1-2, 5"),
        (mask(entry(3, 1), entry(4, 2)), r"names layer 3-4 \(layer 3: expert 1\)"),
        (mask(entry(5, 8)), "names expert 8 of layer 5, and this model's experts are 0 to 7"),
        (mask(*(entry(2, e) for e in range(1, 8))), r"layer 2 has 7 of its 8 .*\(1-7\).*most 6"),
        (
            mask(*(entry(5, e, "activate") for e in (0, 4, 6))),
            r"layer 5 has 3 activated experts \(0, 4, 6\), and a token gets 2",
        ),
    ],
)
def test_a_mask_that_the_model_cannot_follow_is_refused(made, message):
    for check in (compile_mask, lambda m, s: check_mask(m, s, SOFTMAX)):
        with pytest.raises(InputError, match=message):
            check(made, SHAPE)


@pytest.mark.parametrize(
    ("scoring", "made", "message"),
    [
        ("custom", mask(entry(1, 0, "scale", 0.5)), "a function of its own"),
        ("hash", mask(entry(1, 0)), "by the token's id"),
        ("sigmoid", mask(mode="steermoe"), "scores by sigmoid"),
        ("sqrtsoftplus", mask(mode="steermoe"), "scores by sqrtsoftplus"),
    ],
)
def test_a_router_without_a_sound_meaning_is_refused(scoring, made, message):
    with pytest.raises(InputError, match=message):
        check_mask(made, SHAPE, RouterSpec(scoring, renormalize=True))


def test_a_mask_for_another_model_is_told_apart():
    other = {"moe_layers": [1, 2, 5], "num_experts": 16, "top_k": 2}
    with pytest.raises(SignatureError, match=r"3 MoE layers \(1-2, 5\) of 16 experts, top-2"):
        check_mask(mask(signature=other), SHAPE, SOFTMAX)
    check_mask(mask(signature=other | {"num_experts": 8}), SHAPE, SOFTMAX)


@given(masks(), masks())
def test_composed_masks_are_both_in_force(base, own):
    tables = [compile_mask(made, SHAPE) for made in (base, own)]
    try:
        both = compose(*tables)
    except ComposeError:
        actions = np.where(tables[1].named, tables[1].action, tables[0].action)
        assert (
            tables[0].steermoe != tables[1].steermoe
            or ((actions == ACTIVATE).sum(1) > 2).any()
            or ((actions == DEACTIVATE).sum(1) > 6).any()
        )
        return
    for name in ("action", "bias", "scale"):
        made, first, second = (getattr(table, name) for table in (both, *tables))
        assert (made[tables[1].named] == second[tables[1].named]).all()
        assert (made[~tables[1].named] == first[~tables[1].named]).all()
    assert (both.named == (tables[0].named | tables[1].named)).all()
    assert (both.touched == both.named.any(1)).all()


def test_compose_lets_the_own_mask_win():
    base = compile_mask(mask(entry(1, 0), entry(1, 1, "scale", 3), renormalise=True), SHAPE)
    own = compile_mask(mask(entry(1, 0, "bias", 0.0)), SHAPE)
    both = compose(base, own)
    assert (both.action[0, 0], both.scale[0, 1], both.renormalise) == (0, 3, True)
    own = compile_mask(mask(entry(1, 3), renormalise=False), SHAPE)
    assert compose(base, own).renormalise is False
    assert compose(base, compile_mask(mask(), SHAPE)) is base
    assert compose(compile_mask(mask(mode="steermoe"), SHAPE), base) is base


def test_compose_refuses_what_is_sound_only_apart():
    tables = [
        compile_mask(mask(*(entry(2, e, "activate") for e in pair)), SHAPE)
        for pair in ([0, 1], [1, 2])
    ]
    with pytest.raises(ComposeError, match="own together: layer 2 has 3 activated"):
        compose(*tables)
    with pytest.raises(ComposeError, match=r"^all@1 and mine@2 together: layer 2"):
        compose(*tables, ("all@1", "mine@2"))
    paper = compile_mask(mask(entry(1, 0), mode="steermoe"), SHAPE)
    with pytest.raises(ComposeError, match="mode hard and the request's own of mode steermoe"):
        compose(tables[0], paper)


@pytest.mark.parametrize(
    ("key", "own", "alone", "both"),
    [
        (None, None, None, None),
        ("all@1", None, "all@1", "all@1"),
        (None, "own@1", "own@1", "own@1"),
        ("all@1", "own@1", "own@1", "all@1+own@1"),
        ("all@1", "none", "none", "none"),
    ],
)
def test_what_is_in_force_has_a_name(key, own, alone, both):
    assert mask_in_force(key, own, composes=False) == alone
    assert mask_in_force(key, own, composes=True) == both


def test_number_ranges():
    assert number_ranges([5, 1, 2, 3, 9, 8, 2]) == "1-3, 5, 8-9"
    assert number_ranges([]) == "none"
