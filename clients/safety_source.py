"""The rows that safety pairs are made of.

Errors name the row and the field, and never quote a text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moescope.clients.sources import open_source
from moescope.tracer.errors import InputError

PROMPT, HARMFUL, SAFE = "prompt", "harmful_response", "safe_response"
_EXPECTED = (
    f"Expected rows with the texts `{PROMPT}` and `{HARMFUL}`, and with --given `{SAFE}` "
    "(docs/data.md)."
)


@dataclass(frozen=True, slots=True)
class Pair:
    """One row of the source; `row` counts from 1, `given` is its own refusal."""

    row: int
    prompt: str
    harmful: str
    given: str = ""


def read_pairs(source: str, *, given: bool) -> tuple[list[Pair | str], dict[str, Any]]:
    """Every row, or why it can't be used; and the source's origin, for the data card.

    `given` asks for the source's own refusals as well.
    """
    names = (PROMPT, HARMFUL, SAFE) if given else (PROMPT, HARMFUL)
    pairs: list[Pair | str] = []
    try:
        with open_source(source, _EXPECTED) as opened:
            missing = [f"`{name}`" for name in names if name not in opened.columns]
            if not missing:
                pairs.extend(
                    _pair(source, number, [row[name] for name in names], names)
                    for number, row in enumerate(opened.rows, start=1)
                )
            num_fields, origin = len(opened.columns), opened.origin
    except _FieldError:
        raise
    except InputError as error:
        # What a reader says of a bad row may quote it.
        read = Path(source).exists() or type(error.__cause__).__name__ == "DatasetGenerationError"
        if not read:
            raise
        raise InputError(
            f"can't read rows in {source}: it must be JSON, JSON lines, CSV or Parquet, as its "
            f"ending says, in UTF-8. {_EXPECTED}"
        ) from None
    if missing:
        # Not their names: the first row of a CSV without a header would be shown.
        raise InputError(
            f"{source} lacks {' and '.join(missing)} among its {num_fields} fields: rename or add "
            f"them. {_EXPECTED}"
        )
    if not pairs:
        raise InputError(f"{source} holds no row. {_EXPECTED}")
    return pairs, origin


class _FieldError(InputError):
    """A field of ours, told without its value."""


def _pair(source: str, number: int, values: list[Any], names: tuple[str, ...]) -> Pair | str:
    for name, value in zip(names, values, strict=True):
        if value is not None and not isinstance(value, str):
            kind = type(value).__name__
            raise _FieldError(f"{source}, row {number}: `{name}` is {kind}, not a text.")
        if not (value or "").strip():
            return f"without `{name}`"
    return Pair(number, *(value.strip() for value in values))
