"""Bring a step's rows from a GPU into the ring while the next step runs.

    main stream   step n ──▶ staged ─────────────▶ step n+1 ──▶ (waits for copied) staged ──▶
                                │                                      ▲
    side stream                 └──▶ copy into the ring ──▶ copied ────┘
    host          launches only; publishes the rows of step n when it sees that their copy is done

The step's buffers are overwritten by the next step, so its rows are packed aside (staged) on the
main stream, which costs microseconds. A few rows, as of a decoding step, are packed right into the
ring: their way over the bus is short, and the host, which small batches wait for, launches one
kernel and no copies. The host waits for the device only to end or to sync a trace.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.tracer.errors import TracerError
from moescope.tracer.ring import Ring

_FEW_ROWS = 256


class SideStream:
    """The copies of one recorder into one ring."""

    def __init__(self, ring: Ring, max_tokens: int, device: torch.device) -> None:
        from moescope.tracer.kernels import pack

        self._ring = ring
        # Pinned: a copy into other memory would make the host wait for it.
        error = torch.cuda.cudart().cudaHostRegister(ring.address, ring.nbytes, 0)
        if int(error) != 0:
            raise TracerError(
                f"CUDA can't pin {ring.nbytes >> 20} MiB for the ring ({error}): make it smaller "
                "(MOESCOPE_RING_MIB), or raise the limit of locked memory (ulimit -l)"
            )
        self._owner, *columns = ring.columns.columns()
        self._targets = [torch.from_numpy(column) for column in columns]
        self._staged = [
            torch.empty((max_tokens, *t.shape[1:]), dtype=t.dtype, device=device)
            for t in self._targets
        ]
        self._pack = pack
        self._stream = torch.cuda.Stream(device)
        self._copied: Any = torch.cuda.Event()
        self._places: NDArray[np.intp] | None = None
        self._index: torch.Tensor | None = None  # `_places` on the device

    def close(self) -> None:
        """Unpin the ring; no copy may be under way."""
        torch.cuda.cudart().cudaHostUnregister(self._ring.address)

    def copy(
        self,
        step: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        owner: NDArray[np.uint32],
        places: NDArray[np.intp] | None,
        parts: list[tuple[slice, slice]],
    ) -> Any:
        """Start to copy rows into `parts` of the ring; returns the event of their arrival.

        Args:
            step: weights, ids, positions and tokens of the step, on the device (`kernels.pack`).
            owner: uint32 [rows], the request of each row that is wanted.
            places: intp [rows], which of the step's tokens these are; None: the first ones. An
                array that was given before must still hold the same.
            parts: from `Ring.reserve`, for as many rows.

        """
        main, count = torch.cuda.current_stream(), len(owner)
        if places is not self._places:  # the same array in steps of the same requests
            index = None if places is None else torch.from_numpy(places).pin_memory()
            self._index = index if index is None else index.to(main.device, non_blocking=True)
            self._places = places
        index = self._index
        for source, target in parts:
            self._owner[target] = owner[source]
        if count <= _FEW_ROWS and len(parts) == 1:
            [(_, target)] = parts
            self._pack(*step, index, self._targets, count, target.start)
            arrived = torch.cuda.Event()
            arrived.record(main)
            return arrived
        main.wait_event(self._copied)
        self._pack(*step, index, self._staged, count)
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            for source, target in parts:
                for staged, goal in zip(self._staged, self._targets, strict=True):
                    goal[target].copy_(staged[source], non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(self._stream)
        return self._copied
