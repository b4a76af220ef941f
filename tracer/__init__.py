"""Record and steer the expert routing of a mixture-of-experts model inside vLLM."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moescope.tracer.mask import Mask, read_mask
    from moescope.tracer.request import TraceRequest
    from moescope.tracer.session import masks, steer, trace

__all__ = ["Mask", "TraceRequest", "masks", "read_mask", "steer", "trace"]

_HOMES = {
    "Mask": "mask",
    "read_mask": "mask",
    "TraceRequest": "request",
    "masks": "session",
    "steer": "session",
    "trace": "session",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use: the writer process must not pay for them."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"moescope.tracer.{_HOMES[name]}"), name)
