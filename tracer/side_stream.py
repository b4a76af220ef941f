"""Bring a step's rows from a GPU into the ring while the next step runs.

    main stream   step n ──▶ staged ─────────────▶ step n+1 ──▶ (waits for copied) staged ──▶
                                │                                      ▲
    side stream                 └──▶ copy into the ring ──▶ copied ────┘
    host          launches only; publishes the rows of step n when it sees that their copy is done

The step's buffers are overwritten by the next step, so its rows are set aside (staged) on the main
stream, which costs microseconds. The host waits for the device only to end or to sync a trace.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.tracer.errors import TracerError
from moescope.tracer.ring import Ring


class SideStream:
    """The copies of one recorder into one ring."""

    def __init__(self, ring: Ring, max_tokens: int, device: torch.device) -> None:
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
        self._stream = torch.cuda.Stream(device)
        self._copied: Any = torch.cuda.Event()

    def close(self) -> None:
        """Unpin the ring; no copy may be under way."""
        torch.cuda.cudart().cudaHostUnregister(self._ring.address)

    def copy(
        self,
        owner: NDArray[np.uint32],
        columns: list[torch.Tensor],
        places: NDArray[np.intp] | None,
        parts: list[tuple[slice, slice]],
    ) -> Any:
        """Start to copy rows into `parts` of the ring; returns the event of their arrival.

        Args:
            owner: uint32 [rows], each row's request; all rows of the step, chosen or not.
            columns: positions, tokens, experts, weights, each [>= rows, ...] on the device.
            places: the rows that are wanted, ascending; None: all.
            parts: from `Ring.reserve`, for as many rows as are wanted.

        """
        main = torch.cuda.current_stream()
        main.wait_event(self._copied)
        wanted = owner if places is None else owner[places]
        count = len(wanted)
        index = None
        if places is not None:
            index = torch.from_numpy(places).pin_memory().to(main.device, non_blocking=True)
        for staged, column in zip(self._staged, columns, strict=True):
            rows = column[: len(owner)]
            staged[:count].copy_(rows if index is None else rows.index_select(0, index))
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            for source, target in parts:
                self._owner[target] = wanted[source]
                for staged, goal in zip(self._staged, self._targets, strict=True):
                    goal[target].copy_(staged[source], non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(self._stream)
        return self._copied
