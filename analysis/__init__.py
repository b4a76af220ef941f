"""Questions to a trace store: SQL views, checks, risk differences. Needs no torch and no vLLM."""

from moescope.analysis.rd import risk_difference
from moescope.analysis.views import open_store

__all__ = ["open_store", "risk_difference"]
