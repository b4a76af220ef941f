"""The masks of one engine: what lies in which slot, and which request is steered by which.

    slot 0               the global mask: every request that names none
    slots 1..num_slots   masks that requests name
    -1, the last one     touches nothing: requests that want no mask, not even the global one

A request's own mask stands in place of the global one, or, where own masks compose, is in force
together with it: its slot holds both, made again when the global one changes. Slots change between
steps only.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.tracer.errors import InputError, TracerError
from moescope.tracer.format import MoeShape
from moescope.tracer.mask import (
    Mask,
    MaskTable,
    RouterSpec,
    check_mask,
    compile_mask,
    compose,
)
from moescope.tracer.mask_format import NO_MASK
from moescope.tracer.reroute import SteerTables, steer
from moescope.tracer.settings import load_settings

NO_MASK_SLOT = -1


class Steering:
    """The masks of one engine's worker."""

    def __init__(
        self,
        shape: MoeShape,
        spec: RouterSpec,
        correction_biases: list[torch.Tensor | None],
        num_slots: int,
        max_tokens: int,
        device: torch.device,
        captured: bool | None = None,
        composes: bool | None = None,
    ) -> None:
        """`captured`: the edit is part of CUDA graphs (None: there are none to be part of).

        `composes`: own masks are in force together with the global one (None: as is set).
        """
        self.shape, self.spec, self.num_slots = shape, spec, num_slots
        self.tables = SteerTables(shape, num_slots + 2, max_tokens, device)
        self.global_key: str | None = None
        self.keys: dict[int, str] = {NO_MASK_SLOT: NO_MASK}
        self.composes = load_settings().own_mask == "compose" if composes is None else composes
        self._global: MaskTable | None = None
        self._own: dict[int, MaskTable] = {}  # by slot, before they are composed
        self.captured = captured
        self._on_gpu = device.type == "cuda"
        self._assigned = np.zeros(max_tokens, np.int32)  # what `tables.token_slots` holds
        # A captured graph can't ask the host whether there is something to edit.
        self.always = captured is True and spec.scoring not in ("custom", "hash")
        self._biases = correction_biases
        self._slots: dict[str, int] = {}  # of requests that name a mask and run
        self._batch: tuple[list[str], bytes] | None = None  # that `_assigned` is of

    @property
    def active(self) -> bool:
        """Whether any mask is loaded; if none is, a step has nothing to do."""
        return self.global_key is not None or len(self.keys) > 1

    @property
    def num_requests(self) -> int:
        """Requests that run under a mask of their own."""
        return len(self._slots)

    def load(self, slot: int, key: str, mask: Mask) -> bool:
        """Put a mask into a slot; False while requests still run under what lies in it.

        InputError (SignatureError) if the mask does not fit the model; ComposeError if it is to be
        in force together with the global one and can't be.
        """
        if not 1 <= slot <= self.num_slots:
            raise TracerError(f"there is no mask slot {slot}, only 1 to {self.num_slots}")
        if self.keys.get(slot) == key:
            return True
        self._check(mask)
        if slot in self._slots.values():
            return False
        own = compile_mask(mask, self.shape)
        self.tables.set_slot(slot, self._in_force(own, key, self._global, self.global_key))
        self._own[slot], self.keys[slot] = own, key
        return True

    def unload(self, slots: Iterable[int]) -> bool:
        """Empty these slots; False while requests still run under a mask in one, which stays."""
        busy = set(self._slots.values()).intersection(slots)
        for slot in set(slots) - busy:
            self.tables.clear_slot(slot)
            self._own.pop(slot, None)
            self.keys.pop(slot, None)
        return not busy

    def unload_all(self) -> None:
        """Empty the slots of requests' own masks; TracerError while requests run under one."""
        if self._slots:
            raise TracerError(
                f"{len(self._slots)} requests still run under masks of their own: let them finish "
                "before their masks are unloaded"
            )
        self.unload(range(1, self.num_slots + 1))

    def set_global(self, key: str | None, mask: Mask | None) -> None:
        """The mask of requests that name none, and of all others too where own masks compose.

        InputError if it does not fit the model, ComposeError if it can't be in force together with
        a mask that is loaded; then everything is as it was.
        """
        table = None
        if mask is not None:
            self._check(mask)
            table = compile_mask(mask, self.shape)
        own = self._own if self.composes else {}
        both = {s: self._in_force(t, self.keys[s], table, key) for s, t in own.items()}
        if table is None:
            self.tables.clear_slot(0)
        else:
            self.tables.set_slot(0, table)
        for slot, composed in both.items():
            self.tables.set_slot(slot, composed)
        self._global, self.global_key = table, key

    def _in_force(
        self, own: MaskTable, key: str, base: MaskTable | None, base_key: str | None
    ) -> MaskTable:
        """What requests with this mask of their own are steered by under this global one."""
        if base is None or not self.composes:
            return own
        return compose(base, own, (f"the global mask {base_key}", f"mask {key}"))

    def _check(self, mask: Mask) -> None:
        if self.captured is False:
            raise InputError(
                "this engine's CUDA graphs were captured without steering: start it with "
                "MOESCOPE_STEER=on in its environment, or with --enforce-eager"
            )
        check_mask(mask, self.shape, self.spec)

    def begin(self, request_id: str, slot: int, key: str) -> None:
        """A request with its own mask is scheduled; TracerError if the slot holds another."""
        if request_id in self._slots:
            return
        if self.keys.get(slot) != key:
            raise TracerError(
                f"request {request_id} asked for mask {key!r} in slot {slot}, which holds "
                f"{self.keys.get(slot)!r}: it must not run unsteered"
            )
        self._slots[request_id] = slot
        self._batch = None

    def finish(self, request_ids: Iterable[str]) -> None:
        """These requests run no more."""
        for request_id in request_ids:
            if self._slots.pop(request_id, None) is not None:
                self._batch = None  # the next request of this name may want another mask, or none

    def assign(self, request_ids: Sequence[str], counts: NDArray[Any]) -> None:
        """Say of a step, before it runs, which mask each of its tokens has."""
        batch = list(request_ids), counts.tobytes()
        if batch == self._batch:
            return  # as in the step before, which in decoding is the rule
        self._batch = batch
        slots = np.array([self._slots.get(r, 0) for r in request_ids], np.int32)
        slots[slots == NO_MASK_SLOT] = self.num_slots + 1
        token_slots = np.repeat(slots, counts).astype(np.int32, copy=False)
        assigned = self._assigned[: len(token_slots)]
        if np.array_equal(assigned, token_slots):
            return
        assigned[:] = token_slots
        on_host = torch.from_numpy(token_slots)
        if self._on_gpu:  # from other memory the copy would wait for the device
            on_host = on_host.pin_memory()
        self.tables.token_slots[: len(token_slots)].copy_(on_host, non_blocking=True)

    def route(
        self,
        layer: int,
        logits: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        room: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What vLLM's router decided, edited by the masks; see reroute.py for the shapes.

        `room`: where a GPU shall leave the result (`Recorder.room`), which may be where `weights`
        and `ids` are already.
        """
        if not (self.always or self.tables.touches(layer)):
            return weights, ids
        slots = self.tables.token_slots[: ids.shape[0]]
        bias = self._biases[layer]
        if not self._on_gpu or room is None:
            return steer(layer, logits, weights, ids, slots, self.tables, self.spec, bias)
        from moescope.tracer import kernels

        kernels.steer(layer, logits, weights, ids, slots, self.tables, self.spec, bias, *room)
        return room[0].to(weights.dtype), room[1].to(ids.dtype)

    def route_alone(
        self,
        layer: int,
        logits: torch.Tensor,
        padding: torch.Tensor | None,
        room: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """The router's work and the masks' in one kernel, on a GPU; see `kernels.route`."""
        from moescope.tracer import kernels

        slots, bias = self.tables.token_slots[: len(logits)], self._biases[layer]
        kernels.route(layer, logits, slots, self.tables, self.spec, bias, *room, padding)
