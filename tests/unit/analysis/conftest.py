"""One maker of trace stores for all tests here: by hand, or at random from a seed."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from moescope.tracer.format import ModelFacts, MoeShape, Stage, requests_schema, tokens_schema
from moescope.tracer.store import StoreWriter


@dataclass
class Request:
    """One request of a store; experts and weights are [tokens, layers, top_k]."""

    request_id: str
    experts: NDArray[Any]
    weights: NDArray[np.float16]
    segments: list[str]
    condition: str | None = "a"
    example_id: str | None = None
    run: str = "r"
    complete: bool = True
    spans: list[dict[str, Any]] | None = None

    def token_rows(self) -> list[dict[str, Any]]:
        return [
            {
                "request_id": self.request_id,
                "position": position,
                "token_id": 100 + position,
                "segment": segment,
                "mask": None,
                "expert_ids": self.experts[position].ravel().tolist(),
                "gate_weights": list(self.weights[position].ravel()),
            }
            for position, segment in enumerate(self.segments)
        ]

    def row(self) -> dict[str, Any]:
        return {
            "request_id": self.request_id,
            "run": self.run,
            "example_id": self.example_id,
            "condition": self.condition,
            "mask": None,
            "prompt_tokens": self.segments.count("prompt"),
            "tokens": len(self.segments),
            "complete": self.complete,
            "spans": self.spans,
        }


@dataclass
class Maker:
    """Makes requests of one model shape and writes them to stores."""

    shape: MoeShape = field(default_factory=lambda: MoeShape((1, 3, 4), 8, 2))

    def request(
        self, name: str, segments: list[str], seed: int | np.random.Generator = 0, **fields: Any
    ) -> Request:
        """A request with this many tokens and random routing."""
        rng, shape = np.random.default_rng(seed), self.shape
        size = (len(segments), len(shape.layers))
        experts = rng.random((*size, shape.num_experts)).argsort(axis=2)[..., : shape.top_k]
        weights = rng.random((*size, shape.top_k)).astype(np.float16)
        return Request(name, experts, -np.sort(-weights, axis=2), segments, **fields)

    def random_requests(self, seed: int, count: int) -> list[Request]:
        """Requests of three conditions, paired, unpaired and incomplete, in no order of ids."""
        rng = np.random.default_rng(seed)
        names = [f"q{number}" for number in rng.permutation(count)]
        requests = []
        for number, name in enumerate(names):
            prompt, response = rng.integers(1, 5), rng.integers(0, 6)
            segments = rng.choice(["prompt", "doc"], prompt).tolist() + ["response"] * response
            requests.append(
                self.request(
                    name,
                    segments,
                    rng,
                    condition=["a", "b", "c", None][min(number % 4, rng.integers(0, 6))],
                    example_id=f"x{number // 4}" if rng.random() < 0.9 else None,
                    complete=bool(rng.random() < 0.85),
                )
            )
        return requests

    def facts(self) -> ModelFacts:
        return ModelFacts("tiny", None, "TinyMoe", "float32", self.shape, "softmax", False, "test")

    def write(
        self, path: Path, requests: list[Request], *, per_file: int = 3, writer: str = "w"
    ) -> Path:
        """A store with these requests, `per_file` in each pair of files."""
        with StoreWriter(path, self.facts(), writer=writer) as store:
            for start in range(0, len(requests), per_file):
                part = requests[start : start + per_file]
                store.commit(
                    pa.Table.from_pylist(
                        [row for request in part for row in request.token_rows()],
                        tokens_schema(self.shape),
                    ),
                    pa.Table.from_pylist([request.row() for request in part], requests_schema()),
                )
        return path

    def write_stages(
        self, path: Path, requests: list[Request], sizes: tuple[int, ...], *, writer: str = "w"
    ) -> Path:
        """A store with these requests from a pipeline whose stages have so many layers each."""
        done = 0
        for number, size in enumerate(sizes, 1):
            part = slice(done, done + size)
            stage = Stage(number, len(sizes), self.shape.layers[part])
            with StoreWriter(path, self.facts(), writer=writer, stage=stage) as store:
                rows = [
                    row
                    | {"expert_ids": experts[part].ravel().tolist()}
                    | {"gate_weights": list(weights[part].ravel())}
                    for request in requests
                    for row, experts, weights in zip(
                        request.token_rows(), request.experts, request.weights, strict=True
                    )
                ]
                store.commit(
                    pa.Table.from_pylist(rows, tokens_schema(stage.of(self.shape))),
                    pa.Table.from_pylist(
                        [request.row() for request in requests], requests_schema()
                    ),
                )
            done += size
        return path


@pytest.fixture(scope="session")
def maker() -> Maker:
    return Maker()


@pytest.fixture(scope="session")
def maker_of() -> type[Maker]:
    return Maker
