"""A mask on one model: checked against its shape and its router, and laid out as arrays.

    action  int8    [layers, experts]   0 none, 1 deactivate, 2 activate
    bias    float32 [layers, experts]   added to the gate logit; 0 is none
    scale   float32 [layers, experts]   multiplies the gate weight; 1 is none
    named   bool    [layers, experts]   an entry names the expert, be it with bias 0 or scale 1
    touched bool    [layers]            an entry names an expert of the layer

Layers stand in the order of `MoeShape.layers`. A `MaskTable` that exists is sound: its layers and
experts are the model's, and every layer keeps top-k experts to choose from.

The format itself is in mask_format.py; this module offers its names too.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moescope.tracer.errors import InputError
from moescope.tracer.format import MoeShape
from moescope.tracer.mask_format import (
    NO_MASK,
    Mask,
    MaskEntry,
    MaskSignature,
    make_mask,
    number_ranges,
    parse_mask,
    read_mask,
    write_mask,
)

__all__ = [
    "ACTIVATE",
    "DEACTIVATE",
    "NONE",
    "ComposeError",
    "Mask",
    "MaskEntry",
    "MaskSignature",
    "MaskTable",
    "RouterSpec",
    "SignatureError",
    "check_mask",
    "compile_mask",
    "compose",
    "make_mask",
    "mask_in_force",
    "parse_mask",
    "read_mask",
    "write_mask",
]

NONE, DEACTIVATE, ACTIVATE = 0, 1, 2

_UNSOUND = {
    "custom": "chooses experts by a function of its own, which moescope can't repeat under a mask",
    "hash": "chooses experts by the token's id and not by their scores, so there is no choice that "
    "a mask could change",
}


class SignatureError(InputError):
    """The mask is for a model of another shape."""


class ComposeError(InputError):
    """Two masks, each of them sound, that can't be in force together."""


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """How a model's router scores, chooses and weighs.

    `renormalize`: the chosen experts' weights are divided by their sum. `num_groups` and
    `topk_groups`: experts are chosen from the best groups only. `correction_bias`: a learned bias
    is added to the scores for the choice, not for the weights. `scaling`: the factor that the
    router itself applies to the weights at the end; 1 where vLLM scales the experts' sum instead.
    """

    scoring: Literal["softmax", "sigmoid", "sqrtsoftplus", "custom", "hash"]
    renormalize: bool
    num_groups: int = 1
    topk_groups: int = 1
    correction_bias: bool = False
    scaling: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class MaskTable:
    """The arrays drawn above, and what holds for the whole mask."""

    shape: MoeShape
    action: NDArray[np.int8]
    bias: NDArray[np.float32]
    scale: NDArray[np.float32]
    named: NDArray[np.bool_]
    touched: NDArray[np.bool_]
    steermoe: bool = False
    epsilon: float = 0.0
    renormalise: bool | None = None


def check_mask(mask: Mask, shape: MoeShape, spec: RouterSpec) -> None:
    """Refuse a mask that has no sound meaning on this model.

    SignatureError: it says itself that it is for another model. InputError: an entry names a layer
    or expert that isn't there, a layer would be left fewer experts than top-k or be given more, or
    the router knows no such action.
    """
    _check_signature(mask, shape)
    if spec.scoring in _UNSOUND:
        raise InputError(f"mask {mask.name}: this model's router {_UNSOUND[spec.scoring]}")
    if mask.mode == "steermoe" and spec.scoring != "softmax":
        raise InputError(
            f"mask {mask.name}: the mode steermoe edits log-softmax scores, and this model's "
            f'router scores by {spec.scoring}: use "mode": "hard"'
        )
    compile_mask(mask, shape)


def compile_mask(mask: Mask, shape: MoeShape) -> MaskTable:
    """The mask as arrays for a model of this shape; errors as in `check_mask`."""
    _check_signature(mask, shape)
    _check_places(mask, shape)
    size = len(shape.layers), shape.num_experts
    action, named = np.zeros(size, np.int8), np.zeros(size, np.bool_)
    bias, scale = np.zeros(size, np.float32), np.ones(size, np.float32)
    index = {layer: at for at, layer in enumerate(shape.layers)}
    for entry in mask.entries:
        at = index[entry.layer], entry.expert
        named[at] = True
        if entry.action == "scale":
            scale[at] = entry.value
        elif entry.action == "bias":
            bias[at] = entry.value
        else:
            action[at] = ACTIVATE if entry.action == "activate" else DEACTIVATE
    _check_counts(action, shape, f"mask {mask.name}")
    return MaskTable(
        shape=shape,
        action=action,
        bias=bias,
        scale=scale,
        named=named,
        touched=np.logical_or.reduce(named, axis=1),
        steermoe=mask.mode == "steermoe",
        epsilon=mask.epsilon or 0.0,
        renormalise=mask.renormalise,
    )


def compose(
    global_table: MaskTable,
    own_table: MaskTable,
    names: tuple[str, str] = ("the global mask", "the request's own"),
) -> MaskTable:
    """The global mask and a request's own, both in force; `names` is how errors call them.

    Where both name an expert, all of the own mask's actions on it stand and none of the global
    one's. `renormalise` is the own mask's if it says so, and so is `epsilon`.

    Raises ComposeError when the two are of different modes, or sound each but not together.
    """
    if not own_table.touched.any():
        return global_table
    if not global_table.touched.any():
        return own_table
    if global_table.steermoe != own_table.steermoe:
        modes = ["steermoe" if t.steermoe else "hard" for t in (global_table, own_table)]
        raise ComposeError(
            f"{names[0]} is of mode {modes[0]} and {names[1]} of mode {modes[1]}: they can't be in "
            "force together. Use one mode for both, or let own masks replace the global one "
            "(MOESCOPE_OWN_MASK=replace)"
        )

    def both(name: str) -> NDArray[Any]:
        own, base = getattr(own_table, name), getattr(global_table, name)
        return np.where(own_table.named, own, base)

    action = both("action")
    try:
        _check_counts(action, own_table.shape, f"{names[0]} and {names[1]} together")
    except InputError as error:
        raise ComposeError(str(error)) from None
    named = global_table.named | own_table.named
    said = own_table.renormalise
    return MaskTable(
        shape=own_table.shape,
        action=action,
        bias=both("bias"),
        scale=both("scale"),
        named=named,
        touched=np.logical_or.reduce(named, axis=1),
        steermoe=own_table.steermoe,
        epsilon=own_table.epsilon,
        renormalise=global_table.renormalise if said is None else said,
    )


def mask_in_force(global_key: str | None, own: str | None, *, composes: bool) -> str | None:
    """What a token is steered by, as traces and answers say it: "GLOBAL+OWN" if it is both.

    `own` is the request's own mask, "none" if it wants none, and None if it says nothing.
    """
    if composes and global_key is not None and own not in (None, NO_MASK):
        return f"{global_key}+{own}"
    return global_key if own is None else own


def _check_signature(mask: Mask, shape: MoeShape) -> None:
    here = MaskSignature.of(shape)
    if mask.signature is not None and mask.signature != here:
        raise SignatureError(
            f"mask {mask.name} is for a model with {mask.signature}, and this one has {here}: make "
            "a mask from this model's own ranking"
        )


def _check_places(mask: Mask, shape: MoeShape) -> None:
    places = list(mask.by_expert())
    layers = {layer for layer, _ in places} - set(shape.layers)
    if layers:
        experts = number_ranges(expert for layer, expert in places if layer == min(layers))
        raise InputError(
            f"mask {mask.name} names layer {number_ranges(layers)} (layer {min(layers)}: expert "
            f"{experts}), where this model has no experts; its MoE layers are "
            f"{number_ranges(shape.layers)}"
        )
    for layer, expert in places:
        if expert >= shape.num_experts:
            raise InputError(
                f"mask {mask.name} names expert {expert} of layer {layer}, and this model's "
                f"experts are 0 to {shape.num_experts - 1}"
            )


def _check_counts(action: NDArray[np.int8], shape: MoeShape, whose: str) -> None:
    """Every layer must have at most top-k activated experts and at least top-k usable ones."""
    for layer, actions in zip(shape.layers, action, strict=True):
        (active,), (off,) = np.nonzero(actions == ACTIVATE), np.nonzero(actions == DEACTIVATE)
        if len(active) > shape.top_k:
            raise InputError(
                f"{whose}: layer {layer} has {len(active)} activated experts "
                f"({number_ranges(active.tolist())}), and a token gets {shape.top_k}: activate at "
                f"most {shape.top_k} in a layer"
            )
        if shape.num_experts - len(off) < shape.top_k:
            raise InputError(
                f"{whose}: layer {layer} has {len(off)} of its {shape.num_experts} experts "
                f"deactivated ({number_ranges(off.tolist())}), and a token needs {shape.top_k}: "
                f"deactivate at most {shape.num_experts - shape.top_k} in a layer"
            )
