"""Import the `routed_experts` that vLLM and SGLang return, as a trace store without gate weights.

routed_sources.py says what the sources are.
"""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.analysis.routed_sources import Layout, Routed, read_source
from moescope.analysis.views import open_store
from moescope.tracer.errors import InputError
from moescope.tracer.format import (
    PROMPT,
    RESPONSE,
    ModelFacts,
    MoeShape,
    requests_schema,
    tokens_schema,
)
from moescope.tracer.object_path import StorePath, Where, store_path
from moescope.tracer.store import StoreWriter

NO_TOKEN_ID = -1
_REQUESTS_IN_FILE = 1000


def import_routed_experts(
    sources: Sequence[str | Path],
    store: Where,
    layout: Layout,
    *,
    run: str = "import",
    condition: str | None = None,
    start: int = 0,
) -> tuple[int, int]:
    """Write the requests of `sources` to `store`; returns (requests, tokens).

    `run` and `condition` are for requests whose item says none. `start` is the position of the
    first row, if the engine was told to leave out a part of the prompt. If nothing says how long
    the prompt is, all tokens are in segment "prompt"; without token ids they are -1. A request that
    lacks rows at its start is stored as incomplete.

    Nothing is written unless all sources are sound. Raises InputError, which names the source, when
    they aren't, or when `store` has a request of the same id; StoreError when `store` is of another
    model.
    """
    store = store_path(store)
    sequences = [item for source in sources for item in read_source(Path(source), layout)]
    if not sequences:
        raise InputError("the sources hold no routed_experts: was the engine told to return them?")
    shape = _shape(sequences, layout)
    _check_ids(sequences, store)
    facts = ModelFacts(
        model=layout.model,
        revision=None,
        architecture=layout.architecture,
        dtype="unknown",
        shape=shape,
        scoring=layout.scoring,
        renormalize=False,
        engine="moescope import routed-experts",
        weights=False,
    )
    tables = [_tables(item, shape, run, condition, start) for item in sequences]
    with StoreWriter(store, facts) as writer:
        for first in range(0, len(tables), _REQUESTS_IN_FILE):
            part = tables[first : first + _REQUESTS_IN_FILE]
            writer.commit(*(pa.concat_tables(side) for side in zip(*part, strict=True)))
    return len(tables), sum(tokens.num_rows for tokens, _ in tables)


def _shape(sequences: Sequence[Routed], layout: Layout) -> MoeShape:
    """The shape of the store; InputError if the arrays don't fit it, or each other."""
    first = sequences[0]
    for item in sequences:
        if item.experts.shape[1:] != first.experts.shape[1:]:
            raise InputError(
                f"{item.where}: {list(item.experts.shape[1:])} layers and top-k, but "
                f"{list(first.experts.shape[1:])} in {first.where}: import models one by one."
            )
    hidden, top_k = first.experts.shape[1:]
    # The experts of a token are different ones, so that only a layer without a router repeats.
    routed = np.zeros(hidden, bool)
    for item in sequences:
        routed |= (_sorted_steps(item.experts) > 0).all(axis=(0, 2))
    layers = layout.layers
    if layers is None:
        if top_k == 1:
            raise InputError(
                f"{first.where}: with top-1 a dense layer can't be told from one whose tokens all "
                "choose expert 0: give --moe-layers."
            )
        layers = tuple(int(layer) for layer in np.flatnonzero(routed))
    if not layers or max(layers) >= hidden:
        wanted = "no layer looks routed" if not layers else f"there is no layer {max(layers)}"
        raise InputError(f"{first.where}: {wanted} among {hidden}: give --moe-layers.")
    for item in sequences:
        experts = item.experts[:, list(layers)]
        if experts.min() < 0 or experts.max() >= layout.num_experts:
            raise InputError(
                f"{item.where}: an expert id is not in 0..{layout.num_experts - 1}: are the number "
                "of experts and the MoE layers right?"
            )
        if (_sorted_steps(experts) == 0).any():
            raise InputError(f"{item.where}: a token has an expert of one layer twice.")
    return MoeShape(layers, layout.num_experts, top_k)


def _sorted_steps(experts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.diff(np.sort(experts, axis=2), axis=2)


def _check_ids(sequences: Sequence[Routed], store: StorePath) -> None:
    ids = [item.request_id for item in sequences]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise InputError(f'two requests are called {twice!r}: give them a "request_id" each.')
    if (store / "manifest.json").exists():
        with closing(open_store(store)) as con:
            found = con.execute(
                "SELECT request_id FROM requests WHERE request_id IN (SELECT unnest(?)) LIMIT 1",
                [ids],
            ).fetchall()
        if found:
            raise InputError(f"{store} has the request {found[0][0]!r} already; name a new store.")


def _tables(
    item: Routed, shape: MoeShape, run: str, condition: str | None, start: int
) -> tuple[pa.Table, pa.Table]:
    """(tokens, requests) of one sequence."""
    rows = len(item.experts)
    ids = [*(item.prompt_ids or []), *(item.output_ids or [])]
    complete_ids = item.prompt_ids is not None and item.output_ids is not None
    total = len(ids) if complete_ids else item.total_tokens
    if total is not None and start + rows not in (total - 1, total):
        raise InputError(
            f"{item.where}: {rows:,} rows from position {start} on, but {total:,} tokens, of which "
            "the last has none: was a part of the prompt left out (--start)?"
        )
    prompt = len(item.prompt_ids) if item.prompt_ids is not None else item.prompt_tokens
    prompt = start + rows if prompt is None else prompt
    positions = np.arange(start, start + rows, dtype=np.int32)
    tokens = np.full(rows, NO_TOKEN_ID, np.int32)
    if item.prompt_ids is not None:
        there = np.array(ids, np.int32)[start : start + rows]
        tokens[: len(there)] = there
    segments = np.where(positions < prompt, PROMPT, RESPONSE)
    chosen = item.experts[:, list(shape.layers)].reshape(rows, -1).astype(shape.id_dtype)
    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * shape.num_routes)
    schema = tokens_schema(shape, weights=False)
    columns = {
        "request_id": pa.array([item.request_id] * rows),
        "position": pa.array(positions),
        "token_id": pa.array(tokens),
        "segment": pa.array(segments.tolist()),
        "mask": pa.nulls(rows, pa.string()),
        "expert_ids": pa.ListArray.from_arrays(
            offsets, pa.array(chosen.ravel()), type=schema.field("expert_ids").type
        ),
        "gate_weights": pa.nulls(rows, schema.field("gate_weights").type),
    }
    request = {
        "request_id": item.request_id,
        "run": item.run or run,
        "example_id": item.example_id,
        "condition": item.condition or condition,
        "mask": None,
        "prompt_tokens": prompt,
        "tokens": rows,
        "complete": start == 0 and rows >= prompt,
        "spans": None,
    }
    arrays = [columns[field.name].cast(field.type) for field in schema]
    return (
        pa.Table.from_arrays(arrays, schema=schema),
        pa.Table.from_pylist([request], requests_schema()),
    )
