"""What one traced token is: its dtypes, their order and the Parquet schemas. All else imports this.

A *row* is one computed token of one request. For a model with L mixture-of-experts layers
and top-k routing it holds

    request    uint32              a number the engine gives to each traced request
    position   int32               the token's place in its sequence, from 0
    token      int32               the token id whose forward pass was routed
    experts    uint8|uint16 [L*k]  logical expert ids, layer-major: layer 0's k, layer 1's k, ...
    weights    float16      [L*k]  the gate weights of those experts, in the same order

Within a layer the k experts stand in descending order of gate weight, so that equal routing
gives equal rows whatever kernel chose it.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

FORMAT_VERSION = 1

DEFAULT_RUN = "default"
PROMPT, RESPONSE, TEMPLATE = "prompt", "response", "template"


@dataclass(frozen=True, slots=True)
class MoeShape:
    """The shape of a model's routing.

    `layers` holds the model's own numbers of its mixture-of-experts layers, ascending; a dense
    layer keeps its number and is absent.
    """

    layers: tuple[int, ...]
    num_experts: int
    top_k: int

    @property
    def num_routes(self) -> int:
        """Expert ids in one row: layers times top-k."""
        return len(self.layers) * self.top_k

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """The narrowest dtype that holds every expert id."""
        return np.dtype(np.uint8 if self.num_experts <= 256 else np.uint16)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in the ring."""
        return 12 + self.num_routes * (self.id_dtype.itemsize + 2)


@dataclass(frozen=True, slots=True)
class Stage:
    """The part of a pipeline-parallel model that one engine process has: stage `number` of `count`.

    Stages are counted from 1, in the model's order, and only those that have mixture-of-experts
    layers. `layers` are this one's; those of all stages together are the model's. The files of a
    stage hold the lists of its own layers (store.py).
    """

    number: int
    count: int
    layers: tuple[int, ...]

    def of(self, whole: MoeShape) -> MoeShape:
        """The stage's part of the model's shape."""
        return replace(whole, layers=self.layers)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the manifest says of the traced model.

    `scoring` is the router's score function (softmax, sigmoid, ...); `renormalize` says whether
    the chosen experts' weights are scaled to sum to one. `weights`: whether the store has gate
    weights; imports of other tools' arrays may have none.
    """

    model: str
    revision: str | None
    architecture: str
    dtype: str
    shape: MoeShape
    scoring: str
    renormalize: bool
    engine: str
    weights: bool = True

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they stand in manifest.json; `weights` only where there are none."""
        out = asdict(self)
        shape = out.pop("shape")
        if self.weights:
            del out["weights"]
        return out | {
            "moe_layers": list(shape["layers"]),
            "num_experts": shape["num_experts"],
            "top_k": shape["top_k"],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "ModelFacts":
        """The inverse of `to_json`; raises KeyError on a missing field."""
        shape = MoeShape(tuple(data["moe_layers"]), data["num_experts"], data["top_k"])
        names = ("model", "revision", "architecture", "dtype", "scoring", "renormalize", "engine")
        return cls(
            shape=shape,
            weights=data.get("weights", True),
            **{name: data[name] for name in names},
        )


def tokens_schema(shape: MoeShape, *, weights: bool = True) -> pa.Schema:
    """The columns of `tokens/*.parquet`: one row a token.

    Without `weights`, `gate_weights` is null in every row.
    """
    ids = pa.uint8() if shape.id_dtype.itemsize == 1 else pa.uint16()
    return pa.schema(
        [
            pa.field("request_id", pa.dictionary(pa.int32(), pa.string()), nullable=False),
            pa.field("position", pa.int32(), nullable=False),
            pa.field("token_id", pa.int32(), nullable=False),
            pa.field("segment", pa.dictionary(pa.int32(), pa.string()), nullable=False),
            pa.field("mask", pa.dictionary(pa.int32(), pa.string())),
            pa.field("expert_ids", pa.list_(pa.field("element", ids, nullable=False)), False),
            pa.field(
                "gate_weights",
                pa.list_(pa.field("element", pa.float16(), nullable=False)),
                nullable=not weights,
            ),
        ]
    )


def requests_schema() -> pa.Schema:
    """The columns of `requests/*.parquet`: one row a request.

    `tokens` counts the request's rows. `complete` is true when the whole prompt and every token
    computed after it have their row. `spans` are [start, stop) token positions.
    """
    span = pa.struct(
        [
            pa.field("segment", pa.string(), nullable=False),
            pa.field("start", pa.int32(), nullable=False),
            pa.field("stop", pa.int32(), nullable=False),
        ]
    )
    return pa.schema(
        [
            pa.field("request_id", pa.string(), nullable=False),
            pa.field("run", pa.string(), nullable=False),
            pa.field("example_id", pa.string()),
            pa.field("condition", pa.string()),
            pa.field("mask", pa.string()),
            pa.field("prompt_tokens", pa.int32(), nullable=False),
            pa.field("tokens", pa.int32(), nullable=False),
            pa.field("complete", pa.bool_(), nullable=False),
            pa.field("spans", pa.list_(span)),
        ]
    )
