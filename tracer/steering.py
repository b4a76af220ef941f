"""The masks of one engine: what lies in which slot, and which request is steered by which.

    slot 0               the global mask: every request that names none
    slots 1..num_slots   masks that requests name
    -1, the last one     touches nothing: requests that want no mask, not even the global one

A request's own mask stands in place of the global one. Slots change between steps only.
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
    RouterSpec,
    check_mask,
    compile_mask,
)
from moescope.tracer.mask_format import NO_MASK
from moescope.tracer.reroute import SteerTables, steer

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
    ) -> None:
        """`captured`: the edit is part of CUDA graphs (None: there are none to be part of)."""
        self.shape, self.spec, self.num_slots = shape, spec, num_slots
        self.tables = SteerTables(shape, num_slots + 2, max_tokens, device)
        self.global_key: str | None = None
        self.keys: dict[int, str] = {NO_MASK_SLOT: NO_MASK}
        self._captured = captured
        # A captured graph can't ask the host whether there is something to edit.
        self.always = captured is True and spec.scoring not in ("custom", "hash")
        self._biases = correction_biases
        self._slots: dict[str, int] = {}  # of requests that name a mask and run

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

        InputError (SignatureError) if the mask does not fit the model.
        """
        if not 1 <= slot <= self.num_slots:
            raise TracerError(f"there is no mask slot {slot}, only 1 to {self.num_slots}")
        if self.keys.get(slot) == key:
            return True
        self._check(mask)
        if slot in self._slots.values():
            return False
        self.tables.set_slot(slot, compile_mask(mask, self.shape))
        self.keys[slot] = key
        return True

    def unload_all(self) -> None:
        """Empty the slots of requests' own masks; TracerError while requests run under one."""
        if self._slots:
            raise TracerError(
                f"{len(self._slots)} requests still run under masks of their own: let them finish "
                "before their masks are unloaded"
            )
        for slot in range(1, self.num_slots + 1):
            self.tables.clear_slot(slot)
            self.keys.pop(slot, None)

    def set_global(self, key: str | None, mask: Mask | None) -> None:
        """The mask of requests that name none; InputError if it does not fit the model."""
        if mask is None:
            self.tables.clear_slot(0)
            self.global_key = None
            return
        self._check(mask)
        self.tables.set_slot(0, compile_mask(mask, self.shape))
        self.global_key = key

    def _check(self, mask: Mask) -> None:
        if self._captured is False:
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

    def finish(self, request_ids: Iterable[str]) -> None:
        """These requests run no more."""
        for request_id in request_ids:
            self._slots.pop(request_id, None)

    def assign(self, request_ids: Sequence[str], counts: NDArray[Any]) -> None:
        """Say of a step, before it runs, which mask each of its tokens has."""
        slots = np.array([self._slots.get(r, 0) for r in request_ids], np.int32)
        slots[slots == NO_MASK_SLOT] = self.num_slots + 1
        token_slots = torch.from_numpy(np.repeat(slots, counts))
        self.tables.token_slots[: len(token_slots)].copy_(token_slots)

    def route(
        self, layer: int, logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What vLLM's router decided, edited by the masks; see reroute.py for the shapes."""
        if not (self.always or self.tables.touches(layer)):
            return weights, ids
        slots = self.tables.token_slots[: ids.shape[0]]
        bias = self._biases[layer]
        return steer(layer, logits, weights, ids, slots, self.tables, self.spec, bias)
