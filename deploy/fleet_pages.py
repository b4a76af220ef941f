"""What the coordinator tells of the replicas: the route /v1/replicas, and all metrics as one."""

from collections.abc import Iterator, Mapping
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from pydantic import BaseModel

from moescope.deploy.fleet import Fleet, Reach
from moescope.server.routes import ControlRoute

_METRICS = "/metrics"
_LABEL = "replica"


class Replica(BaseModel):
    """One replica; `why` it does not serve."""

    replica: str
    serves: bool
    why: str | None = None


class Replicas(BaseModel):
    """All replicas there are, and how many there should be."""

    expected: int
    global_mask: str | None
    data: list[Replica]


def _fleet(request: Request) -> Fleet:
    fleet: Fleet = request.app.state.fleet
    return fleet


TheFleet = Annotated[Fleet, Depends(_fleet)]
fleet_router = APIRouter(prefix="/v1", route_class=ControlRoute)
metrics_router = APIRouter()  # open, as a single server's metrics are


@fleet_router.get("/replicas")
async def list_replicas(fleet: TheFleet) -> Replicas:
    """Show which replicas serve, all with the same masks and global mask, and why others do not."""
    reach = await fleet.reach()
    data = [Replica(replica=replica, serves=True) for replica in reach.reached]
    for replica, why in reach.not_reached.items():
        data.append(Replica(replica=replica, serves=False, why=why))
    steering = fleet.target.state.steering
    return Replicas(expected=reach.expected, global_mask=steering, data=data)


@metrics_router.get(_METRICS)
async def metrics(fleet: TheFleet) -> Response:
    """Show the metrics of every replica, each with the label `replica`."""
    pages = await fleet.report(_METRICS)
    texts = {replica: str(page[_METRICS]) for replica, page in pages.items()}
    return Response(joined_metrics(texts, await fleet.reach()), media_type=CONTENT_TYPE_LATEST)


def joined_metrics(pages: Mapping[str, str], reach: Reach) -> bytes:
    """Prometheus pages by replica as one page, with the number of replicas."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Joined(pages, reach))
    return generate_latest(registry)


class _Joined(Collector):
    def __init__(self, pages: Mapping[str, str], reach: Reach) -> None:
        self._pages, self._reach = pages, reach

    def collect(self) -> Iterator[Metric]:
        replicas = GaugeMetricFamily(
            "moescope_replicas", "Replicas that serve, and that should.", labels=["state"]
        )
        replicas.add_metric(["serving"], len(self._reach.reached))
        replicas.add_metric(["expected"], self._reach.expected)
        yield replicas
        families: dict[str, Metric] = {}
        for replica, text in self._pages.items():
            for family in text_string_to_metric_families(text):
                joined = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    labels = sample.labels | {_LABEL: replica}
                    joined.samples.append(sample._replace(labels=labels))
        yield from families.values()
