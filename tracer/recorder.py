"""Record a step: the routers fill device buffers, and the end of the step hands rows to the sink.

    device buffers   weights float32 [layers, max_tokens, k]   at fixed addresses,
                     ids     int32   [layers, max_tokens, k]   overwritten by every step

A router writes there by itself (`room`), at no cost, or what it wrote elsewhere is copied
(`record`). It may run inside a captured graph or a dummy run, where no request is behind the
tokens. Which rows mean anything is decided by `end_step`, which knows the batch: row i belongs to
the i-th scheduled token. Only then are those rows, and no others, brought into the format of
format.py (`pack`): experts in descending order of weight, narrowed.
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
    begin: dict[str, Any]
    lost_rows: int = 0


class Recorder:
    """The tracer of one engine, from the router's outputs to the sink."""

    def __init__(self, facts: ModelFacts, max_tokens: int, device: torch.device) -> None:
        shape = facts.shape
        size = (len(shape.layers), max_tokens, shape.top_k)
        self.facts, self.max_tokens = facts, max_tokens
        self.weights = torch.zeros(size, dtype=torch.float32, device=device)
        self.ids = torch.zeros(size, dtype=torch.int32, device=device)
        self._by_layer = list(zip(self.weights, self.ids, strict=True))
        self._store = store_on_cpu
        if device.type == "cuda":
            from moescope.tracer.kernels import store

            self._store = store
        self._side: SideStream | None = None
        self.sink: Sink | None = None
        self.num_requests = 0
        self.silent_layers: list[int] | None = None  # those not seen to record; None: not known
        self._live: dict[str, _Live] = {}
        self._unsent: list[dict[str, Any]] = []
        self._global_mask: str | None = None
        self._batch: tuple[list[str], bytes] | None = None  # that `_owner` and `_places` are of
        self._owner: NDArray[np.uint32] = np.zeros(0, np.uint32)
        self._places: NDArray[np.intp] | None = None

    @property
    def num_live(self) -> int:
        """Traced requests that have begun and whose finish the sink has not got."""
        return len(self._live) + len(self._unsent)

    def room(self, layer: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Where a layer's router may leave its weights and ids, both [tokens, k], contiguous.

        `layer` is 0-based among the traced ones. None if there are more tokens than the buffers
        have rows.
        """
        if tokens > self.max_tokens:
            return None
        weights, ids = self._by_layer[layer]
        return weights[:tokens], ids[:tokens]

    def record(self, layer: int, weights: torch.Tensor, ids: torch.Tensor) -> None:
        """Keep the routing of one layer for all of its tokens, [tokens, k], if it isn't there."""
        mine, my_ids = self._by_layer[layer]
        if ids.data_ptr() != my_ids.data_ptr():
            tokens = min(len(ids), self.max_tokens)
            self._store(weights[:tokens], ids[:tokens], mine[:tokens], my_ids[:tokens])

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
            self._live[request_id] = _Live(number, message)
            self._batch = None

    def finish(self, request_ids: AbstractSet[str]) -> None:
        """These requests get no more rows; ids that are not traced are passed over."""
        if self.sink is None:
            return
        for request_id in self._live.keys() & request_ids:
            live, self._batch = self._live.pop(request_id), None
            message = {"op": "finish", "request": live.number, "lost_rows": live.lost_rows}
            self._unsent.append(message)
        while self._unsent and self.sink.send(self._unsent[0]):
            self._unsent.pop(0)

    def rest(self) -> None:
        """Nothing is computed for now: let go of the rows whose copy was under way.

        Waits for the device, and so only while no traced request runs.
        """
        if self.sink is not None and not self._live:
            self.sink.poll(wait=True)

    def _resume(self, sink: RingSink) -> None:
        """Give the sink another writer, which must know of the requests that run."""
        begins = [live.begin for live in self._live.values()]
        if not sink.resume(begins, self.num_requests):
            self._unsent.append(sink.resumed(self.num_requests))

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
        # Also for steps without a traced request: the last one's rows may have been on their way.
        self.sink.poll()
        if isinstance(self.sink, RingSink) and self.sink.wants_another:
            self._resume(self.sink)
        if self.silent_layers != []:
            self._prove()
        live = self._live
        if not live:
            return
        batch = list(request_ids), counts.tobytes()
        if batch != self._batch:  # in decoding, most are as the one before
            numbers = np.array([live[r].number if r in live else 0 for r in request_ids], np.uint32)
            owner = np.repeat(numbers, counts)
            self._places = None if numbers.all() else np.flatnonzero(owner)
            self._owner = owner if self._places is None else owner[self._places]
            self._batch = batch
        if not len(self._owner):
            return
        if not self._hand_over(self.sink, positions, tokens):
            for request_id, count in zip(request_ids, counts, strict=True):
                if request_id in live:
                    live[request_id].lost_rows += int(count)

    def _hand_over(
        self,
        sink: Sink,
        positions: torch.Tensor,
        tokens: torch.Tensor,
    ) -> bool:
        if isinstance(sink, NullSink):
            return True
        wanted, places = self._owner, self._places
        if self._side is None:
            rows = Rows.empty(len(wanted), self.facts.shape)
            rows.request[:] = wanted
            out = tuple(torch.from_numpy(column) for column in rows.columns()[1:])
            index = None if places is None else torch.from_numpy(places)
            pack_on_cpu(self.weights, self.ids, positions, tokens, index, out)
            return sink.write(rows)
        assert isinstance(sink, RingSink)
        parts = sink.reserve(len(wanted))
        if parts is None:
            return False
        step = self.weights, self.ids, positions, tokens
        sink.publish(len(wanted), self._side.copy(step, wanted, places, parts))
        return True

    def attach(self, sink: Sink) -> None:
        """Send rows to `sink` from now on; requests that run already are not traced."""
        self.weights.fill_(_NEVER)
        self.silent_layers = None
        self.sink, self._batch = sink, None
        if self.ids.device.type == "cuda" and isinstance(sink, RingSink):
            self._side = SideStream(sink.ring, self.max_tokens, self.ids.device)
        if self._global_mask is not None:
            self.mask_changes(self._global_mask)

    def _prove(self) -> None:
        """See in the first step that every layer's routing arrives.

        Raises UnsupportedModelError if one's does not while a request is being traced.
        """
        silent = (self.weights[:, 0] == _NEVER).any(-1).cpu().numpy()
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
        self._live, self._unsent, self._batch = {}, [], None
        if side is not None and isinstance(sink, RingSink):
            sink.poll(wait=True)
            side.close()
        if isinstance(sink, RingSink) and sink.has_stopped:
            sink.resume([], self.num_requests)  # what lies in the ring is to reach the disk
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


def store_on_cpu(
    weights: torch.Tensor, ids: torch.Tensor, out_weights: torch.Tensor, out_ids: torch.Tensor
) -> None:
    """The twin of `kernels.store`."""
    out_weights.copy_(weights)
    out_ids.copy_(ids)


def pack_on_cpu(
    weights: torch.Tensor,
    ids: torch.Tensor,
    positions: torch.Tensor,
    tokens: torch.Tensor,
    places: torch.Tensor | None,
    out: Sequence[torch.Tensor],
) -> None:
    """The twin of `kernels.pack`, which see."""
    out_positions, out_tokens, out_experts, out_weights = out
    rows = slice(len(out_positions)) if places is None else places
    ordered, order = weights[:, rows].transpose(0, 1).sort(dim=-1, descending=True, stable=True)
    out_positions.copy_(positions[rows])
    out_tokens.copy_(tokens[rows])
    out_experts.copy_(ids[:, rows].transpose(0, 1).gather(-1, order).flatten(1))
    out_weights.copy_(ordered.flatten(1))
