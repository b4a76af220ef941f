"""Record the expert routing of a mixture-of-experts model inside vLLM, and write it to disk."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moescope.tracer.request import TraceRequest
    from moescope.tracer.session import trace

__all__ = ["TraceRequest", "trace"]


def __getattr__(name: str) -> Any:
    """Import the public names on first use: the writer process must not pay for them."""
    if name == "trace":
        from moescope.tracer.session import trace

        return trace
    if name == "TraceRequest":
        from moescope.tracer.request import TraceRequest

        return TraceRequest
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
