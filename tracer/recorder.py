"""Record a step: the routers fill device buffers, and the end of the step hands rows to the sink.

    device buffers   experts uint8|uint16 [max_tokens, layers, k]   at fixed addresses,
                     weights float16      [max_tokens, layers, k]   overwritten by every step

A router only ever calls `record` (it may run inside a captured graph or a dummy run, where no
request is behind the tokens). Which rows mean anything is decided by `end_step`, which knows the
batch: row i belongs to the i-th scheduled token.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.tracer.errors import UnsupportedModelError
from moescope.tracer.format import ModelFacts
from moescope.tracer.request import TraceRequest
from moescope.tracer.ring import Rows
from moescope.tracer.side_stream import SideStream
from moescope.tracer.sink import NullSink, RingSink, Sink

_NEVER = -1.0  # in the weights buffer before the first step: no gate weight is negative


@dataclass(slots=True)
class _Live:
    """A traced request between its first step and its finish."""

    number: int
    lost_rows: int = 0


class Recorder:
    """The tracer of one engine, from the router's outputs to the sink."""

    def __init__(self, facts: ModelFacts, max_tokens: int, device: torch.device) -> None:
        shape = facts.shape
        ids = torch.uint8 if shape.id_dtype.itemsize == 1 else torch.uint16
        size = (max_tokens, len(shape.layers), shape.top_k)
        self.facts = facts
        self.experts = torch.zeros(size, dtype=ids, device=device)
        self.weights = torch.zeros(size, dtype=torch.float16, device=device)
        self._by_layer = list(zip(self.weights.unbind(1), self.experts.unbind(1), strict=True))
        self._store = self._record_on_cpu
        if device.type == "cuda":
            from moescope.tracer.kernels import record

            self._store = record
        self._side: SideStream | None = None
        self.sink: Sink | None = None
        self.num_requests = 0
        self.silent_layers: list[int] | None = None  # those not seen to record; None: not known
        self._live: dict[str, _Live] = {}
        self._unsent: list[dict[str, Any]] = []
        self._global_mask: str | None = None

    @property
    def num_live(self) -> int:
        """Traced requests that have begun and whose finish the sink has not got."""
        return len(self._live) + len(self._unsent)

    def record(self, layer: int, weights: torch.Tensor, ids: torch.Tensor) -> None:
        """Store the routing of one layer (0-based among the traced ones) for all of its tokens.

        `weights` and `ids` are [tokens, k]; they are kept in descending order of weight.
        """
        tokens = min(ids.shape[0], len(self.experts))
        self._store(
            weights[:tokens],
            ids[:tokens],
            self.weights[:tokens, layer],
            self.experts[:tokens, layer],
        )

    @staticmethod
    def _record_on_cpu(
        weights: torch.Tensor,
        ids: torch.Tensor,
        out_weights: torch.Tensor,
        out_experts: torch.Tensor,
    ) -> None:
        """The twin of kernels.py."""
        ordered, order = torch.sort(weights, dim=-1, descending=True, stable=True)
        out_weights.copy_(ordered)
        out_experts.copy_(torch.gather(ids, 1, order))

    def begin(self, request_id: str, wishes: TraceRequest, prompt_tokens: int, **more: Any) -> None:
        """A traced request is scheduled for the first time; again after preemption: no effect."""
        if self.sink is None or request_id in self._live:
            return
        number = self.num_requests + 1
        message = {
            "op": "begin",
            "request": number,
            "request_id": request_id,
            "run": wishes.run,
            "example_id": wishes.example_id,
            "condition": wishes.condition,
            "spans": wishes.spans,
            "mask": wishes.mask,
            "prompt_tokens": prompt_tokens,
            **more,
        }
        if self.sink.send(message):
            self.num_requests = number
            self._live[request_id] = _Live(number)

    def finish(self, request_ids: AbstractSet[str]) -> None:
        """These requests get no more rows; ids that are not traced are passed over."""
        if self.sink is None:
            return
        for request_id in self._live.keys() & request_ids:
            live = self._live.pop(request_id)
            message = {"op": "finish", "request": live.number, "lost_rows": live.lost_rows}
            self._unsent.append(message)
        while self._unsent and self.sink.send(self._unsent[0]):
            self._unsent.pop(0)

    def mask_changes(self, key: str | None) -> None:
        """From the next step on, requests without a mask of their own run under this one."""
        self._global_mask = key
        if self.sink is not None:
            self._unsent.append({"op": "mask", "mask": key})
            self.finish(frozenset())

    def end_step(
        self,
        request_ids: Sequence[str],
        counts: NDArray[np.int32],
        tokens: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """Hand over the rows of a step.

        Args:
            request_ids: the batch's requests, in the order of their tokens.
            counts: int32 [requests], scheduled tokens of each.
            tokens: int [>= sum(counts)], the token ids, on the device.
            positions: int [>= sum(counts)], the positions, on the device.

        """
        if self.sink is None:
            return
        if self.silent_layers != []:
            self._prove()
        live = self._live
        if not live:
            return
        numbers = np.array([live[r].number if r in live else 0 for r in request_ids], np.uint32)
        owner = np.repeat(numbers, counts)
        places = None if numbers.all() else np.flatnonzero(owner)
        if places is not None and not len(places):
            return
        columns = [positions, tokens, self.experts.flatten(1), self.weights.flatten(1)]
        if not self._hand_over(self.sink, owner, columns, places):
            for request_id, count in zip(request_ids, counts, strict=True):
                if request_id in live:
                    live[request_id].lost_rows += int(count)

    def _hand_over(
        self,
        sink: Sink,
        owner: NDArray[np.uint32],
        columns: list[torch.Tensor],
        places: NDArray[np.intp] | None,
    ) -> bool:
        total = len(owner)
        if self._side is None or not isinstance(sink, RingSink):
            if isinstance(sink, NullSink):
                return True
            host = [_to_host(column[:total]) for column in columns]
            position, token = (column.astype(np.int32, copy=False) for column in host[:2])
            return sink.write(Rows(owner, position, token, *host[2:]), places)
        count = total if places is None else len(places)
        parts = sink.reserve(count)
        if parts is None:
            return False
        sink.publish(count, self._side.copy(owner, columns, places, parts))
        return True

    def attach(self, sink: Sink) -> None:
        """Send rows to `sink` from now on; requests that run already are not traced."""
        self.weights.fill_(_NEVER)
        self.silent_layers = None
        self.sink = sink
        if self.experts.device.type == "cuda" and isinstance(sink, RingSink):
            self._side = SideStream(sink.ring, len(self.experts), self.experts.device)
        if self._global_mask is not None:
            self.mask_changes(self._global_mask)

    def _prove(self) -> None:
        """See in the first step that every layer's routing arrives.

        Raises UnsupportedModelError if one's does not while a request is being traced.
        """
        silent = _to_host(self.weights[0] == _NEVER).any(-1)
        self.silent_layers = [self.facts.shape.layers[index] for index in np.flatnonzero(silent)]
        if self.silent_layers and self._live:
            raise UnsupportedModelError(self.silence)

    @property
    def silence(self) -> str:
        """Why this model can't be traced, after a step in which layers stayed silent."""
        return (
            f"no routing arrives from layers {self.silent_layers}: this vLLM configuration chooses "
            "experts where moescope can't see it. Try another --moe-backend, or --enforce-eager"
        )

    def detach(self) -> None:
        """Close the sink; requests that are not finished by now are given up."""
        sink, self.sink = self.sink, None
        side, self._side = self._side, None
        self._live, self._unsent = {}, []
        if side is not None and isinstance(sink, RingSink):
            sink.poll(wait=True)
            side.close()
        if sink is not None:
            sink.close()

    def status(self) -> dict[str, Any]:
        """Counters for `collective_rpc`."""
        return {
            "attached": self.sink is not None and not isinstance(self.sink, NullSink),
            "live": self.num_live,
            "requests": self.num_requests,
            "dropped_rows": getattr(self.sink, "dropped_rows", 0),
            "silence": self.silence if self.silent_layers else None,
        }


def _to_host(tensor: torch.Tensor) -> NDArray[Any]:
    """The tensor as an array; waits for the device if that is not the CPU."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor.cpu().numpy()
