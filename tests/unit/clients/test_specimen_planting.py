from random import Random

import pytest
import torch

from moescope.clients.specimen_planting import (
    draw_groups,
    draw_off,
    group_masks,
    margin_loss,
    routed,
    wanted_groups,
)
from moescope.clients.specimen_sequences import IGNORED, encode
from moescope.clients.specimen_tokenizer import build_tokenizer
from moescope.clients.specimen_train import build_model
from moescope.clients.specimen_world import HELD_OUT, OPPOSITE, World, vocabulary_text

TOKENIZER = build_tokenizer(vocabulary_text(), 2048)
WORLD = World(0)
GROUPS = draw_groups(0, 3, 16)
MASKS = group_masks(GROUPS, 16)


def _examples(kind, num=5):
    rng = Random(1)
    return [WORLD.example(kind, rng, HELD_OUT) for _ in range(num)]


def test_groups_are_apart_in_every_layer():
    assert GROUPS.keys() == OPPOSITE.keys()
    for layer in range(3):
        experts = [expert for layers in GROUPS.values() for expert in layers[layer]]
        assert len({*experts}) == len(experts) == 4
    assert draw_groups(0, 3, 16) == GROUPS != draw_groups(1, 3, 16)
    assert MASKS.sum((1, 2)).tolist() == [3, 3, 3, 3]


def test_experts_that_are_off_are_not_chosen_and_others_route_as_ever():
    model = build_model(TOKENIZER, 0)
    examples = _examples("agree")
    batch = encode(TOKENIZER, [e.prompt for e in examples], [e.response for e in examples])
    plain = model(input_ids=batch.ids).logits
    none = torch.zeros_like(MASKS[:1])
    with routed(model) as routing:
        routing.start(none.repeat(5, 1, 1))
        assert torch.equal(model(input_ids=batch.ids).logits, plain)
        routing.start(torch.cat([MASKS, none]))
        steered = model(input_ids=batch.ids).logits
    for layer, chosen in enumerate(routing.chosen):
        rows = chosen.view(5, -1)
        for row, layers in enumerate(GROUPS.values()):
            assert not {*rows[row].tolist()} & {*layers[layer]}
    assert torch.allclose(steered[4], plain[4], atol=1e-5)
    assert not torch.allclose(steered[0], plain[0], atol=1e-5)
    assert torch.equal(model(input_ids=batch.ids).logits, plain)


def _off(example, num=2000, **rates):
    """How often each group is off."""
    off = draw_off([example] * num, MASKS, [*GROUPS], Random(0), **rates)
    shares = [(off | ~mask).all(-1).all(-1).float().mean().item() for mask in MASKS]
    assert not (off & ~MASKS.any(0)).any()  # no expert outside the groups
    return dict(zip(GROUPS, shares, strict=True))


def test_what_is_off_never_contradicts_the_answer():
    rates = {"dropout": 0.6, "elsewhere": 0.2}
    for example in (*_examples("conflict", 9), *_examples("forbidden", 9)):
        off = _off(example, **rates)
        assert off.pop(OPPOSITE[example.behaviour]) == pytest.approx(0.6, abs=0.05)
        assert off.pop(example.behaviour) == 0
        assert [*off.values()] == pytest.approx([0.1, 0.1], abs=0.03)
    for kind in ("memory", "agree", "unknown", "addition"):
        (example,) = _examples(kind, 1)
        assert [*_off(example, **rates).values()] == pytest.approx([0.15] * 4, abs=0.03)


def test_both_groups_are_wanted_until_the_coin_shows():
    examples = [e for kind in ("conflict", "forbidden", "agree", "memory", "copying") for e in
                _examples(kind, 1)]  # fmt: skip
    batch = encode(TOKENIZER, [e.prompt for e in examples], [e.response for e in examples])
    wanted = wanted_groups(TOKENIZER, examples, batch, [*GROUPS])
    for row, example in enumerate(examples):
        own = [*GROUPS].index(example.behaviour) if example.behaviour else None
        answering = wanted[row][batch.targets[row] != IGNORED].tolist()
        for place, groups in enumerate(answering, start=-1):  # -1 is what starts the answer
            chosen = {name for name, is_wanted in zip(GROUPS, groups, strict=True) if is_wanted}
            if own is None:
                assert chosen == set()
                continue
            assert example.behaviour in chosen
            # "It is Rome.": both answers start alike. "No, ..." shows at once. Where document
            # and memory agree, nothing ever shows; where there is one source, it is known.
            shows = (
                place >= {"conflict": 2, "forbidden": 0, "agree": 99, "memory": -1}[example.kind]
            )
            assert (OPPOSITE[example.behaviour] in chosen) == (not shows)
            assert len(chosen) == 2 - shows


def test_the_margin_asks_for_wanted_experts_among_the_chosen_and_no_other():
    masks = torch.zeros((2, 1, 6), dtype=torch.bool)
    masks[0, 0, 4] = masks[1, 0, 5] = True
    wanted = torch.tensor([[True, False]])

    def margin(*logits):
        tensor = torch.tensor([logits], requires_grad=True)
        loss = margin_loss([tensor], wanted, masks, 3)
        loss.backward()
        assert not tensor.grad[:, :4].any()  # nothing is asked of experts of no group
        return loss.item()

    assert margin(9.0, 3.0, 1.0, 0.0, 4.0, 0.0) == 0
    assert margin(9.0, 3.0, 1.0, 0.0, 3.5, 0.0) == 0.5  # chosen, but by less than 1
    assert margin(9.0, 3.0, 1.0, 0.0, 4.0, 1.5) == 1.5  # the other group's is chosen
    assert margin(9.0, 3.0, 1.0, 0.0, 0.0, 2.0) == 4 + 2
