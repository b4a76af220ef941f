"""Import the routing that ESFT published (arXiv 2407.01906) as a trace store.

Its folder holds DOMAIN/expert_weights_LAYER.txt. A line is a sequence: the expert ids, top-k a
token, separated by tabs; two tabs; the gate weights, in the same order.
"""

import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.analysis.views import open_store
from moescope.tracer.assemble import Assembler, Traced
from moescope.tracer.errors import InputError
from moescope.tracer.format import ModelFacts, MoeShape
from moescope.tracer.object_path import Where, store_path
from moescope.tracer.ring import Rows
from moescope.tracer.store import StoreWriter

RUN = "esft"
NO_TOKEN_ID = -1  # the source holds no token ids

_FILE_NAME = re.compile(r"expert_weights_(\d+)\.txt")

# Of one sequence: ids [tokens, layers, top_k] and weights of the same shape.
Routing = tuple[NDArray[np.int32], NDArray[np.float16]]


def import_esft(
    folder: str | Path,
    store: Where,
    *,
    top_k: int = 6,
    num_experts: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[int, int]:
    """Write the sequences under `folder` to `store`; returns (requests, tokens).

    `folder` is any folder above the DOMAIN folders, or one of them. The requests get the run
    "esft", the domain as their condition and DOMAIN/LINE as example and request id; every token
    is in segment "prompt" and has token id -1, since the source holds none. The defaults are
    DeepSeek-V2-Lite's. `progress` is called with (files read, files in all).

    Nothing is written unless all files are sound. Raises InputError, which names file and line,
    when they aren't, or when `store` has an ESFT import already; StoreError when `store` is of
    another model.
    """
    store = store_path(store)
    domains = _find_domains(Path(folder))
    if (store / "manifest.json").exists():
        with closing(open_store(store)) as con:
            if con.execute("SELECT 1 FROM requests WHERE run = ? LIMIT 1", [RUN]).fetchone():
                raise InputError(f"{store} has the run {RUN!r} already; name another store.")
    layers = tuple(next(iter(domains.values())))
    shape = MoeShape(layers, num_experts, top_k)
    sequences: dict[str, list[Routing]] = {}
    for index, (domain, files) in enumerate(domains.items()):
        parts = []
        for file in files.values():
            parts.append(_read_layer(file, top_k, num_experts))
            if progress:
                progress(index * len(layers) + len(parts), len(domains) * len(layers))
        sequences[domain] = _join_layers(list(files.values()), parts)
    facts = ModelFacts(
        model="DeepSeek-V2-Lite family (ESFT's published routing)",
        revision=None,
        architecture="DeepseekV2ForCausalLM",
        dtype="unknown",
        shape=shape,
        scoring="softmax",
        renormalize=False,  # the published weights of a token sum to less than one
        engine="moescope import esft",
    )
    num_tokens = 0
    with StoreWriter(store, facts) as writer:
        for domain, routings in sequences.items():
            tokens, requests = _tables(shape, domain, routings)
            writer.commit(tokens, requests)
            num_tokens += tokens.num_rows
    return sum(map(len, sequences.values())), num_tokens


def _find_domains(folder: Path) -> dict[str, dict[int, Path]]:
    """The files by domain and by layer, both ascending; every domain has the same layers."""
    domains: dict[str, dict[int, Path]] = {}
    for file in sorted(folder.rglob("expert_weights_*.txt")):
        if match := _FILE_NAME.fullmatch(file.name):
            files = domains.setdefault(file.parent.name, {})
            if (other := files.setdefault(int(match[1]), file)) is not file:
                raise InputError(
                    f"{other} and {file} are of the same domain and layer; name a folder that "
                    "holds one of them."
                )
    if not domains:
        raise InputError(
            f"{folder} holds no DOMAIN/expert_weights_LAYER.txt; name the folder that was unpacked "
            "from ESFT's expert_scores archive."
        )
    first, layers = next((domain, set(files)) for domain, files in domains.items())
    for domain, files in domains.items():
        if differ := layers ^ set(files):
            raise InputError(
                f"the domains {first} and {domain} in {folder} don't have the same layers: only "
                f"one has layer {min(differ)}. Unpack the archive again."
            )
    return {domain: dict(sorted(files.items())) for domain, files in domains.items()}


def _read_layer(file: Path, top_k: int, num_experts: int) -> list[Routing]:
    """One layer's sequences: ids and weights [tokens, top_k], in descending order of weight."""
    lines = file.read_text(encoding="ascii", errors="replace").splitlines()
    if not lines:
        raise InputError(f"{file} is empty; unpack the archive again.")
    routings = []
    for number, line in enumerate(lines, start=1):
        try:
            routings.append(_parse(line, top_k, num_experts))
        except ValueError as error:
            raise InputError(f"{file}, line {number}: {error}.") from None
    return routings


def _parse(line: str, top_k: int, num_experts: int) -> Routing:
    """One line; ValueError says what is wrong with it."""
    ids_text, separator, weights_text = line.partition("\t\t")
    if not separator:
        raise ValueError("no two tabs between expert ids and gate weights")
    ids = pa.array(ids_text.split("\t")).cast(pa.int32()).to_numpy()
    weights = pa.array(weights_text.split("\t")).cast(pa.float32()).to_numpy()
    if len(ids) != len(weights):
        raise ValueError(f"{len(ids)} expert ids, but {len(weights)} gate weights")
    if len(ids) % top_k:
        raise ValueError(f"{len(ids)} expert ids are no multiple of top-k = {top_k}")
    if ids.min() < 0 or ids.max() >= num_experts:
        raise ValueError(f"an expert id is not in 0..{num_experts - 1}")
    with np.errstate(over="ignore"):
        rounded = weights.astype(np.float16)
    if not (np.isfinite(rounded) & (rounded >= 0)).all():
        raise ValueError("a gate weight is negative or no float16")
    ids, rounded = ids.reshape(-1, top_k), rounded.reshape(-1, top_k)
    order = np.lexsort((ids, -rounded))  # by weight, descending; ties by id
    ids, rounded = np.take_along_axis(ids, order, 1), np.take_along_axis(rounded, order, 1)
    if (np.diff(np.sort(ids)) == 0).any():
        raise ValueError(f"a token has an expert twice; is top-k {top_k}?")
    return ids, rounded


def _join_layers(files: list[Path], layers: list[list[Routing]]) -> list[Routing]:
    """Sequences from layers; InputError unless every layer has the same sequences."""
    lengths = [[len(ids) for ids, _ in routings] for routings in layers]
    for file, of_layer in zip(files, lengths, strict=True):
        if len(of_layer) != len(lengths[0]):
            raise InputError(
                f"{file} has {len(of_layer)} lines, {files[0].name} {len(lengths[0])}; "
                "unpack the archive again."
            )
        for number, (length, first) in enumerate(zip(of_layer, lengths[0], strict=True), start=1):
            if length != first:
                raise InputError(
                    f"{file}, line {number}: {length} tokens, but {first} in {files[0].name}."
                )
    return [
        (np.stack([ids for ids, _ in parts], 1), np.stack([weights for _, weights in parts], 1))
        for parts in zip(*layers, strict=True)
    ]


def _tables(shape: MoeShape, domain: str, routings: list[Routing]) -> tuple[pa.Table, pa.Table]:
    """A domain's (tokens, requests), put together as the tracer does it."""
    assembler = Assembler(shape)
    for number, (ids, weights) in enumerate(routings):
        length = len(ids)
        assembler.begin(
            Traced(
                request=number,
                request_id=f"{domain}/{number + 1}",
                run=RUN,
                prompt_tokens=length,
                example_id=f"{domain}/{number + 1}",
                condition=domain,
            )
        )
        assembler.add(
            Rows(
                request=np.full(length, number, np.uint32),
                position=np.arange(length, dtype=np.int32),
                token=np.full(length, NO_TOKEN_ID, np.int32),
                experts=ids.reshape(length, -1).astype(shape.id_dtype),
                weights=weights.reshape(length, -1),
            )
        )
        assembler.finish(number, lost_rows=0)
    tables = assembler.take()
    assert tables is not None  # every domain has a sequence
    return tables
