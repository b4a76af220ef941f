"""Read the `routed_experts` that vLLM and SGLang return.

A source is one of

    NAME.npy      int array [rows, layers, top_k], as vLLM's CompletionOutput.routed_experts
    NAME.json     a response of an API, or an item (below), or a list of these
    NAME.jsonl    one of them a line

Where a response has its experts, and how:

    vLLM 0.32     choices[].routed_experts: base64 of the bytes of a .npy, uint8 or uint16
                  (completions, chat, and /inference/v1/generate)
    vLLM 0.21     prompt_routed_experts, and choices[].routed_experts: nested lists
    SGLang        meta_info.routed_experts (/generate, a list for a batch), or sglext.routed_experts
                  (OpenAI's routes): base64 of int32 in row-major order, with no shape

Row p is the routing of the token at position p. The last token of a sequence was sampled and never
computed: n tokens have n - 1 rows. All count hidden layers, dense ones too, whose entries are zeros
(vLLM) or -1: a store has none of these.
"""

import base64
import binascii
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.tracer.errors import InputError

_NPY_MAGIC = b"\x93NUMPY"

# What an item can say of its request, beside its experts or its response.
_LABELS = ("request_id", "run", "example_id", "condition")


@dataclass(frozen=True, slots=True)
class Layout:
    """What arrays don't say themselves. `layers`: the MoE layers; None: all that don't look dense.

    `hidden_layers` and `top_k` are needed for SGLang's flat arrays alone.
    """

    num_experts: int
    layers: tuple[int, ...] | None = None
    hidden_layers: int | None = None
    top_k: int | None = None
    model: str = "unknown"
    architecture: str = "unknown"
    scoring: str = "unknown"

    @classmethod
    def of_config(cls, path: str | Path, layers: tuple[int, ...] | None = None) -> "Layout":
        """From a Hugging Face config.json, or the folder that holds it."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"can't read the model's config {path}: {error}") from error
        text = config.get("text_config") or config
        experts = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
        top_k = ("num_experts_per_tok", "experts_per_token", "moe_top_k", "moe_k")
        found = {
            name: next((text[key] for key in keys if isinstance(text.get(key), int)), None)
            for name, keys in (("experts", experts), ("top_k", top_k))
        }
        if found["experts"] is None:
            raise InputError(f"{path} names no number of experts: give --num-experts.")
        return cls(
            num_experts=found["experts"],
            layers=layers,
            hidden_layers=text.get("num_hidden_layers"),
            top_k=found["top_k"],
            model=str(config.get("_name_or_path") or path.parent),
            architecture=str((config.get("architectures") or ["unknown"])[0]),
            scoring=str(text.get("scoring_func") or "unknown"),
        )


@dataclass(slots=True)
class Routed:
    """One request's experts [rows, hidden layers, top_k], from position `start` on."""

    experts: NDArray[np.int64]
    where: str
    request_id: str
    prompt_ids: list[int] | None = None
    output_ids: list[int] | None = None
    prompt_tokens: int | None = None
    total_tokens: int | None = None
    run: str | None = None
    example_id: str | None = None
    condition: str | None = None


def read_source(source: Path, layout: Layout) -> Iterator[Routed]:
    """The sequences of one source."""
    try:
        if source.suffix == ".npy":
            experts = _checked(np.load(source, allow_pickle=False), str(source))
            yield Routed(experts, str(source), source.stem)
            return
        text = source.read_text(encoding="utf-8")
        if source.suffix == ".jsonl":
            lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
            items = [(f"{source}, line {n}", json.loads(line)) for n, line in lines]
        else:
            whole = json.loads(text)
            many = whole if isinstance(whole, list) else [whole]
            items = [(f"{source}, item {n}", item) for n, item in enumerate(many, 1)]
    except (OSError, ValueError) as error:
        raise InputError(f"can't read {source}: {error}") from error
    for number, (where, item) in enumerate(items, 1):
        if not isinstance(item, dict):
            raise InputError(f"{where}: is no JSON object, but {type(item).__name__}.")
        yield from _of_item(item, where, f"{source.stem}-{number}", source.parent, layout)


def _of_item(
    item: Mapping[str, Any], where: str, name: str, folder: Path, layout: Layout
) -> Iterator[Routed]:
    """An item: labels beside a `response`, or beside `routed_experts`; or a bare response."""
    labels = {key: None if item.get(key) is None else str(item[key]) for key in _LABELS}
    response = item.get("response", item)
    found = list(_of_response(response, where, folder, layout))
    if not found:
        raise InputError(f"{where}: holds no routed_experts: was the engine told to return them?")
    for number, sequence in enumerate(found):
        said = response.get("id") or (response.get("meta_info") or {}).get("id")
        own = labels["request_id"] or said or name
        sequence.request_id = f"{own}-{number}" if len(found) > 1 else str(own)
        sequence.run, sequence.condition = labels["run"], labels["condition"]
        sequence.example_id = labels["example_id"]
        yield sequence


def _of_response(
    response: Mapping[str, Any], where: str, folder: Path, layout: Layout
) -> Iterator[Routed]:
    """The sequences of a response; nothing if it has no experts."""
    usage = response.get("usage") or response.get("meta_info") or {}
    prompt_ids = response.get("prompt_token_ids")
    known: dict[str, Any] = {
        "prompt_tokens": usage.get("prompt_tokens"),
        "total_tokens": _sum(usage.get("prompt_tokens"), usage.get("completion_tokens")),
    }
    if "choices" in response:
        alone = len(response["choices"]) == 1
        of_all = (response.get("sglext") or {}).get("routed_experts")
        for number, choice in enumerate(response["choices"]):
            # SGLang sends those of the first choice alone.
            value = choice.get("routed_experts", None if number else of_all)
            if value is None:
                continue
            rows = _decode(value, where, folder, layout)
            if (before := response.get("prompt_routed_experts")) is not None:
                rows = np.concatenate([_decode(before, where, folder, layout), rows])
            yield Routed(
                rows, where, "",
                prompt_ids=choice.get("prompt_token_ids") or prompt_ids,
                output_ids=choice.get("token_ids"),
                prompt_tokens=known["prompt_tokens"],
                total_tokens=known["total_tokens"] if alone else None,
            )  # fmt: skip
        return
    value = (response.get("meta_info") or {}).get("routed_experts", response.get("routed_experts"))
    if value is not None:
        yield Routed(
            _decode(value, where, folder, layout), where, "", prompt_ids=prompt_ids,
            output_ids=response.get("output_ids", response.get("token_ids")), **known,
        )  # fmt: skip


def _sum(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first + second


def _decode(value: Any, where: str, folder: Path, layout: Layout) -> NDArray[np.int64]:
    """Experts from base64 of a .npy or of int32, from nested lists, or from a .npy by its name."""
    if isinstance(value, list):
        try:
            return _checked(np.array(value), where)
        except ValueError as error:
            raise InputError(f"{where}: routed_experts is no array: {error}") from error
    if not isinstance(value, str):
        raise InputError(f"{where}: routed_experts is {type(value).__name__}, not base64 text.")
    if value.endswith(".npy"):
        try:
            return _checked(np.load(folder / value, allow_pickle=False), f"{where}, {value}")
        except (OSError, ValueError) as error:
            raise InputError(f"{where}: can't read {value}: {error}") from error
    try:
        data = base64.b64decode(value, validate=True)
        if data.startswith(_NPY_MAGIC):
            return _checked(np.load(io.BytesIO(data), allow_pickle=False), where)
    except (binascii.Error, ValueError, EOFError) as error:
        raise InputError(f"{where}: routed_experts is damaged: {error}") from error
    if layout.hidden_layers is None or layout.top_k is None:
        raise InputError(
            f"{where}: routed_experts are flat, as SGLang sends them, and don't say their shape: "
            "give the model's --config."
        )
    row_bytes = layout.hidden_layers * layout.top_k * 4
    if len(data) % row_bytes:
        raise InputError(
            f"{where}: routed_experts has {len(data):,} bytes, no multiple of {row_bytes:,} "
            f"({layout.hidden_layers} layers x top-{layout.top_k} x 4): is --config this model's?"
        )
    flat = np.frombuffer(data, "<i4").astype(np.int64)
    return flat.reshape(-1, layout.hidden_layers, layout.top_k)


def _checked(experts: NDArray[Any], where: str) -> NDArray[np.int64]:
    if experts.ndim != 3 or not np.issubdtype(experts.dtype, np.integer) or not experts.size:
        raise InputError(
            f"{where}: routed_experts should be integers [tokens, layers, top-k], and is "
            f"{experts.dtype} {list(experts.shape)}."
        )
    return experts.astype(np.int64)
