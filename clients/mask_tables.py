"""Masks as tables of experts: layer, expert, action, value."""

import pyarrow as pa
import pyarrow.csv

from moescope.tracer.errors import InputError
from moescope.tracer.mask import Mask, make_mask

_COLUMNS = ("layer", "expert", "action")


def mask_table(mask: Mask) -> pa.Table:
    """A row an entry of the mask; `value` is null where the action has none."""
    schema = pa.schema(
        [
            ("layer", pa.int32()),
            ("expert", pa.int32()),
            ("action", pa.string()),
            ("value", pa.float64()),
        ]
    )
    rows = [
        {name: getattr(entry, name) for name in schema.names}
        for entry in sorted(mask.entries, key=lambda entry: (entry.layer, entry.expert))
    ]
    return pa.Table.from_pylist(rows, schema)


def mask_from_table(table: pa.Table, *, name: str, source: str | None = None) -> Mask:
    """A mask with an entry a row; InputError if columns are missing or an entry is unsound."""
    missing = [column for column in _COLUMNS if column not in table.column_names]
    if missing:
        raise InputError(
            f"the table has no column {', '.join(missing)}: a mask needs layer, expert and action."
        )
    names = [column for column in (*_COLUMNS, "value") if column in table.column_names]
    entries = [
        {
            key: float(value) if key == "value" else value
            for key, value in row.items()
            if value is not None
        }
        for row in table.select(names).to_pylist()
    ]
    return make_mask(name=name, entries=entries, source={"table": source})
