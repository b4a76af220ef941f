"""A mask: what steering does to single experts of single layers. The JSON format and its checks.

    {"name": "doc", "entries": [{"layer": 3, "expert": 9, "action": "scale", "value": 0.5}]}

docs/masks.md describes it for users. What a mask means for one model is in mask.py, what it does to
a token's routing in reroute.py.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from moescope.tracer.errors import InputError
from moescope.tracer.format import MoeShape

Action = Literal["deactivate", "activate", "scale", "bias"]
Mode = Literal["hard", "steermoe"]
Expert = tuple[int, int]  # (layer, expert)

DEFAULT_EPSILON = 0.01  # as in SteerMoE's code
NO_MASK = "none"  # what a request says that wants no mask
MAX_VALUE = 1e6  # of scale and bias: beyond any use, and far from float32's limits

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MAX_PROBLEMS = 3
_CONFIG = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
_Number = Annotated[StrictInt, Field(ge=0)]


class MaskEntry(BaseModel):
    """One action on one expert; `layer` is the model's own number of the layer."""

    model_config = _CONFIG

    layer: _Number
    expert: _Number
    action: Action
    value: StrictFloat | None = None

    @model_validator(mode="after")
    def _check_value(self) -> Self:
        where = f"layer {self.layer}, expert {self.expert}"
        valued = self.action in ("scale", "bias")
        if valued and self.value is None:
            raise ValueError(f"{where}: {self.action} needs a value, such as 0.5")
        if not valued and self.value is not None:
            raise ValueError(f"{where}: {self.action} takes no value (given: {self.value})")
        if self.value is not None and abs(self.value) > MAX_VALUE:
            raise ValueError(f"{where}: the value {self.value} is beyond ±{MAX_VALUE:.0e}")
        if self.action == "scale" and self.value is not None and self.value < 0:
            raise ValueError(f"{where}: a scale of {self.value} is negative: use 0 or more")
        return self

    def __str__(self) -> str:
        return self.action if self.value is None else f"{self.action} {self.value}"


class MaskSignature(BaseModel):
    """The model that a mask is for, by the shape of its routing."""

    model_config = _CONFIG

    moe_layers: tuple[_Number, ...]
    num_experts: _Number
    top_k: _Number

    @classmethod
    def of(cls, shape: MoeShape) -> Self:
        """The signature of a model with this shape."""
        return cls(moe_layers=shape.layers, num_experts=shape.num_experts, top_k=shape.top_k)

    def __str__(self) -> str:
        return (
            f"{len(self.moe_layers)} MoE layers ({number_ranges(self.moe_layers)}) of "
            f"{self.num_experts} experts, top-{self.top_k}"
        )


class Mask(BaseModel):
    """A named set of actions. Equal masks have equal JSON, so a version can be told by it.

    `renormalise` None is "not said": it counts as false, and leaves the choice to the other mask
    when two are in force. `epsilon` belongs to the mode steermoe.
    """

    model_config = _CONFIG

    name: str
    mode: Mode = "hard"
    epsilon: Annotated[StrictFloat, Field(gt=0, le=MAX_VALUE)] | None = Field(
        None, validate_default=True
    )
    renormalise: StrictBool | None = None
    signature: MaskSignature | None = None
    note: str | None = None
    source: dict[str, JsonValue] | None = None
    entries: tuple[MaskEntry, ...]

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return check_name(name)

    @field_validator("epsilon")
    @classmethod
    def _check_epsilon(cls, epsilon: float | None, info: ValidationInfo) -> float | None:
        if info.data.get("mode") == "steermoe":
            return DEFAULT_EPSILON if epsilon is None else epsilon
        if epsilon is not None:
            raise ValueError('goes with "mode": "steermoe" only: leave it out')
        return None

    @field_validator("source")
    @classmethod
    def _check_source(cls, source: dict[str, JsonValue] | None) -> dict[str, JsonValue] | None:
        _dumps(source)  # NaN is a float, and no JSON
        return source

    @model_validator(mode="after")
    def _check_entries(self) -> Self:
        for (layer, expert), entries in self.by_expert().items():
            actions = [entry.action for entry in entries]
            where = f"layer {layer}, expert {expert}"
            twice = next((action for action in actions if actions.count(action) > 1), None)
            if twice is not None:
                raise ValueError(f"{where}: {twice} is given twice: keep one of the entries")
            if "deactivate" in actions and len(actions) > 1:
                others = " and ".join(action for action in actions if action != "deactivate")
                raise ValueError(
                    f"{where}: deactivate and {others} contradict each other, since a deactivated "
                    "expert is never chosen: keep one of the entries"
                )
            odd = next((entry for entry in entries if entry.value is not None), None)
            if self.mode == "steermoe" and odd is not None:
                raise ValueError(
                    f"{where}: the mode steermoe knows only deactivate and activate: take "
                    f'{odd.action} out, or use "mode": "hard"'
                )
        if self.mode == "steermoe" and self.renormalise is not None:
            raise ValueError("renormalise belongs to scale, which the mode steermoe does not know")
        return self

    def by_expert(self) -> dict[Expert, tuple[MaskEntry, ...]]:
        """The entries of each expert that is named, by (layer, expert) in ascending order."""
        grouped: dict[Expert, list[MaskEntry]] = {}
        for entry in self.entries:
            grouped.setdefault((entry.layer, entry.expert), []).append(entry)
        return {key: tuple(grouped[key]) for key in sorted(grouped)}

    def to_json(self) -> str:
        """The mask as it stands in a file: a field or entry a line, so that versions compare."""
        fields = self.model_dump(mode="json", exclude={"entries"}, exclude_none=True)
        heads = [f'  "{key}": {_dumps(value)},\n' for key, value in fields.items()]
        entries = [f"    {_dumps(entry.model_dump(exclude_none=True))}" for entry in self.entries]
        listed = "[\n" + ",\n".join(entries) + "\n  ]" if entries else "[]"
        return "{\n" + "".join(heads) + f'  "entries": {listed}\n}}\n'


def check_name(name: str) -> str:
    """The name, if it can be a mask's: it becomes a file's name and part of a header."""
    if not _NAME.fullmatch(name) or name.lower() == NO_MASK:
        raise InputError(
            f"{name!r} can't be a mask's name: use up to 100 letters, digits, dots, dashes and "
            f'underscores that begin with a letter or digit, and not "{NO_MASK}"'
        )
    return name


def make_mask(**fields: Any) -> Mask:
    """A mask from its fields; InputError says which is wrong."""
    try:
        return Mask.model_validate(fields)
    except ValidationError as error:
        raise InputError(explain(error)) from None


def parse_mask(text: str | bytes) -> Mask:
    """A mask from its JSON; InputError says what is wrong where."""
    try:
        return Mask.model_validate_json(text)
    except ValidationError as error:
        raise InputError(explain(error)) from None


def read_mask(path: str | Path) -> Mask:
    """The mask in a file; InputError names the file and what is wrong in it."""
    try:
        return parse_mask(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"can't read the mask {path}: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}. docs/masks.md describes the format.") from None


def write_mask(mask: Mask, path: str | Path) -> None:
    """Write the mask aside and rename it into place, so that no reader sees half of it."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.part")
    try:
        aside.write_text(mask.to_json(), encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise InputError(f"can't write the mask {path}: {error.strerror}") from error


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def explain(error: ValidationError) -> str:
    """Why a mask is unusable: the fields, their values and what they may be."""
    problems, details = [], error.errors(include_url=False)
    for item in details[:_MAX_PROBLEMS]:
        where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in item["loc"])[1:]
        if isinstance(item["input"], str | int | float) and item["type"] != "json_invalid":
            where += f" = {item['input']!r}"
        message = item["msg"].removeprefix("Value error, ")
        problems.append(f"{where}: {message}" if where else message)
    if len(details) > _MAX_PROBLEMS:
        problems.append(f"and {len(details) - _MAX_PROBLEMS} more")
    return "; ".join(problems)


def number_ranges(numbers: Iterable[int]) -> str:
    """Numbers as people write them: "1-3, 7"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs) or "none"
