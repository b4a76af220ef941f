"""Make masks: from a ranking of `moescope rd`, at random as a control, and compare two."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from moescope.analysis.rd import METADATA_KEY, read_settings
from moescope.clients.ranking import ranking_shape, read_ranking
from moescope.tracer.errors import InputError
from moescope.tracer.format import MoeShape
from moescope.tracer.mask import Mask, MaskEntry, MaskSignature, make_mask
from moescope.tracer.mask_format import Expert, number_ranges

Select = Literal["rd", "steermoe"]
# Of a ranking's facts: they are long, and the ranking has them.
_NOT_IN_A_MASK = ("examples", "power", "stability")
Ranked = tuple[float, int, int]  # (rd, layer, expert)


@dataclass(frozen=True, slots=True)
class MaskDiff:
    """What tells two masks apart: each name or expert with what it is in the one and the other."""

    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    experts: dict[Expert, tuple[str, str]] = field(default_factory=dict)


def mask_from_rd(
    ranking: str | Path | pa.Table,
    *,
    name: str,
    deactivate: int = 0,
    activate: int = 0,
    scale: float | None = None,
    layers: str | None = None,
    min_abs_rd: float | None = None,
    reverse: bool = False,
    select: Select = "rd",
    mode: Literal["hard", "steermoe"] = "hard",
) -> Mask:
    """A mask that moves the model towards the ranking's positive condition.

    The `activate` experts of largest positive RD are activated, since the positive condition uses
    them more, and the `deactivate` experts of most negative RD are deactivated, or scaled by
    `scale` if that is given. `reverse` moves the model the other way. `layers` ("4-20, 22") and
    `min_abs_rd` say which experts are candidates.

    A layer can have at most top-k experts activated and must keep top-k usable ones. Candidates
    beyond that are passed over, for the next ones of the ranking; with `select` "steermoe" nothing
    takes their place, as in SteerMoE's code. The mask's note says how many were.

    The ranking is a table of `risk_difference` or its file. Raises InputError when it isn't, or
    when no expert is selected.
    """
    if select not in ("rd", "steermoe"):
        raise InputError(f"unknown selection rule {select!r}: choose rd or steermoe")
    if min(deactivate, activate) < 0 or deactivate + activate == 0:
        raise InputError(
            f"{deactivate} experts to deactivate and {activate} to activate: say how many of at "
            "least one of them"
        )
    table = ranking if isinstance(ranking, pa.Table) else read_ranking(ranking)
    shape = ranking_shape(table)
    candidates = _candidates(table, _parse_layers(layers, shape), min_abs_rd or 0.0, reverse)
    refill = select == "rd"
    signs = ("negative", "positive") if reverse else ("positive", "negative")
    on, notes = _pick(candidates, activate, shape.top_k, refill, "activate", signs[0])
    lowering = "deactivate" if scale is None else "scale"
    spare = shape.num_experts - (shape.top_k if scale is None else 0)
    mirrored = [(-rd, layer, expert) for rd, layer, expert in reversed(candidates)]
    off, more = _pick(mirrored, deactivate, spare, refill, lowering, signs[1])
    notes += more
    entries: list[dict[str, Any]] = [
        {"layer": layer, "expert": expert, "action": "activate"} for layer, expert in on
    ] + [
        {"layer": layer, "expert": expert, "action": lowering, "value": scale}
        for layer, expert in off
    ]
    if not entries:
        raise InputError(f"no expert is selected: {'; '.join(notes)}")
    known = METADATA_KEY in (table.schema.metadata or {})
    facts = read_settings(table) if known else {}
    kept = {name: fact for name, fact in facts.items() if name not in _NOT_IN_A_MASK}
    return make_mask(
        name=name,
        mode=mode,
        entries=sorted(entries, key=lambda entry: (entry["layer"], entry["expert"])),
        signature=MaskSignature.of(shape),
        note="; ".join(notes) or None,
        source={
            "ranking": None if isinstance(ranking, pa.Table) else str(ranking),
            "rd": kept or None,
            "selection": {
                "select": select,
                "deactivate": deactivate,
                "activate": activate,
                "layers": layers,
                "min_abs_rd": min_abs_rd,
                "reverse": reverse,
            },
        },
    )


def random_mask(like: Mask, seed: int, *, name: str) -> Mask:
    """The control of `like`: in each layer as many experts with the same actions, but others.

    They are drawn from those that `like` does not name; where too few are left, all of these are
    taken and the rest drawn from the named ones. Equal seeds give equal masks, whatever the
    machine; a layer's draw does not depend on the other layers.
    """
    if like.signature is None:
        raise InputError(
            f'mask {like.name} has no "signature", so how many experts there are to draw from is '
            "not known: add it (docs/masks.md)"
        )
    by_layer: dict[int, dict[int, tuple[MaskEntry, ...]]] = {}
    for (layer, expert), actions in like.by_expert().items():
        by_layer.setdefault(layer, {})[expert] = actions
    entries = []
    for layer, named in by_layer.items():
        rng = np.random.default_rng([seed, layer])
        others = [e for e in range(like.signature.num_experts) if e not in named]
        drawn = [*rng.permutation(others).tolist(), *rng.permutation(list(named)).tolist()]
        for expert, actions in zip(drawn[: len(named)], named.values(), strict=True):
            entries += [entry.model_copy(update={"expert": int(expert)}) for entry in actions]
    fields = like.model_dump(exclude={"name", "entries", "note", "source"}, exclude_none=True)
    return make_mask(
        name=name,
        entries=sorted(entries, key=lambda entry: (entry.layer, entry.expert)),
        source={"random_like": like.name, "seed": seed},
        **fields,
    )


def diff(one: Mask, other: Mask) -> MaskDiff:
    """What differs in effect: settings and experts, not names, notes, sources or order."""
    settings = {
        name: (getattr(one, name), getattr(other, name))
        for name in ("mode", "epsilon", "renormalise", "signature")
        if getattr(one, name) != getattr(other, name)
    }
    before, after = one.by_expert(), other.by_expert()
    experts = {
        place: (actions_text(before.get(place, ())), actions_text(after.get(place, ())))
        for place in sorted(before.keys() | after.keys())
    }
    return MaskDiff(settings, {place: pair for place, pair in experts.items() if len({*pair}) > 1})


def actions_text(entries: tuple[MaskEntry, ...]) -> str:
    """One expert's actions, always in the same order."""
    return ", ".join(sorted(map(str, entries))) or "-"


def _candidates(
    table: pa.Table, layers: set[int], min_abs_rd: float, reverse: bool
) -> list[Ranked]:
    """Experts of these layers by descending RD; negative ones in the order that reversing gives."""
    rows = [
        (-row["rd"] if reverse else row["rd"], row["layer"], row["expert"])
        for row in table.select(["rd", "layer", "expert"]).to_pylist()
        if row["layer"] in layers and abs(row["rd"]) >= min_abs_rd
    ]
    positive = sorted((row for row in rows if row[0] > 0), key=lambda r: (-r[0], r[1], r[2]))
    negative = sorted((row for row in rows if row[0] < 0), key=lambda r: (r[0], r[1], r[2]))
    return positive + negative[::-1]


def _pick(
    candidates: list[Ranked], count: int, most: int, refill: bool, action: str, sign: str
) -> tuple[list[Expert], list[str]]:
    """The first `count` candidates of positive RD, at most `most` in a layer; and notes."""
    chosen: list[Expert] = []
    passed_over: list[int] = []
    for rd, layer, expert in candidates:
        if rd < 0 or len(chosen) + (0 if refill else len(passed_over)) == count:
            break
        if sum(there == layer for there, _ in chosen) == most:
            passed_over.append(layer)
        else:
            chosen.append((layer, expert))
    notes = []
    if passed_over:
        where = f"layer {number_ranges(passed_over)}"
        why = f"{most} there already" + ("" if action == "activate" else ", the rest are needed")
        notes.append(f"{action}: {len(passed_over)} passed over in {where} ({why})")
    short = count - len(chosen) - (0 if refill else len(passed_over))
    if short:
        notes.append(
            f"{action}: {len(chosen)} instead of {count}, for want of candidates with {sign} RD"
        )
    return chosen, notes


def _parse_layers(text: str | None, shape: MoeShape) -> set[int]:
    """The MoE layers that a text such as "4-20, 22" names; None: all."""
    if text is None:
        return set(shape.layers)
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise InputError(f'layers = {text!r}: write numbers and ranges, such as "4-20,22"')
        there = {n for n in shape.layers if int(first) <= n <= int(last or first)}
        if not there:
            raise InputError(
                f"layers = {text!r}: the ranking has no layer {part.strip()}; its layers are "
                f"{number_ranges(shape.layers)}"
            )
        layers |= there
    return layers
