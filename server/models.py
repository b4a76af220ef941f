"""The control plane's answers and requests, as the OpenAPI page shows them."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from moescope.tracer.mask import Mask

_MASK = {
    "name": "calm",
    "entries": [
        {"layer": 3, "expert": 7, "action": "deactivate"},
        {"layer": 3, "expert": 9, "action": "scale", "value": 0.5},
    ],
}
_ENTRY = {"name": "calm", "version": 2, "key": "calm@2"}


def _example(**fields: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [fields]})


MASK_EXAMPLES = {"calm": {"summary": "one expert off, one at half its weight", "value": _MASK}}


class MaskEntryInList(BaseModel):
    """A mask of the list, in its last version."""

    model_config = _example(**_ENTRY, note=None, entries=2)

    name: str
    version: int
    key: str = Field(description="NAME@VERSION")
    note: str | None
    entries: int


class MaskList(BaseModel):
    """All masks."""

    data: list[MaskEntryInList]


class MaskVersion(BaseModel):
    """A mask in one version, and which versions there are."""

    model_config = _example(**_ENTRY, versions=[1, 2], mask=_MASK)

    name: str
    version: int
    key: str
    versions: list[int]
    mask: Mask


class MaskPut(BaseModel):
    """A mask as it was stored; `created` is false if the last version was the same already."""

    model_config = _example(**_ENTRY, created=True)

    name: str
    version: int
    key: str
    created: bool


class MaskDeleted(BaseModel):
    """A name that requests can't use any more."""

    model_config = _example(name="calm", deleted="calm@2")

    name: str
    deleted: str = Field(description="The key of its last version.")


class SteeringChange(BaseModel):
    """The global mask that shall be."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"mask": "calm@2"}]})

    mask: str = Field(description="NAME for its last version, or NAME@VERSION", max_length=200)


class GlobalMask(BaseModel):
    """The global mask that is in force."""

    model_config = _example(mask="calm@2")

    mask: str | None


class Router(BaseModel):
    """How the model's router scores, chooses and weighs experts."""

    scoring: str
    renormalize: bool
    num_groups: int
    topk_groups: int
    correction_bias: bool
    scaling: float


class Slots(BaseModel):
    """The places of masks that requests name."""

    model_config = _example(total=16, in_use={"calm@2": 3}, loaded=["calm@1", "calm@2"])

    total: int
    in_use: dict[str, int] = Field(description="HTTP requests under way, by mask.")
    loaded: list[str] = Field(description="Masks in the engine, idle ones too.")


class Moe(BaseModel):
    """The served model's routing, and what steers it."""

    model: str
    architecture: str
    moe_layers: list[int]
    num_experts: int
    top_k: int
    router: Router
    global_mask: str | None
    own_mask: Literal["replace", "compose"] = Field(
        description="Whether a request's own mask replaces the global one or adds to it."
    )
    slots: Slots


class Run(BaseModel):
    """One run in the trace store."""

    run: str
    requests: int
    rows: int
    incomplete: int


class Traces(BaseModel):
    """The trace store: finished requests that are on disk, and those under way (`live`)."""

    started: str | None = Field(description="The run that takes requests which name none.")
    live: int
    rows: int
    bytes: int
    dropped_rows: int
    runs: list[Run]


class RunState(BaseModel):
    """A run that was started or stopped; `live` requests were still under way then."""

    model_config = _example(run="monday", started=True, live=0)

    run: str
    started: bool
    live: int
