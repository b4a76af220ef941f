"""A data card: what a file was made from and how, as JSON beside it. It holds no text of the data.

job.jsonl
job.jsonl.card.json
"""

import json
import os
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moescope.tracer.errors import InputError


def card_path(out: Path) -> Path:
    """Where the card of `out` is."""
    return out.with_name(f"{out.name}.card.json")


def write_card(out: Path, **facts: Any) -> Path:
    """Write the card of `out`, aside and then renamed: the facts, the version and the date."""
    card = {
        "file": out.name,
        "made_by": f"moescope {version('moescope')}",
        "made_on": datetime.now(UTC).date().isoformat(),
        **facts,
    }
    path = card_path(out)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            aside.write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", "utf-8")
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"can't write the data card {path}: {error.strerror}.") from error
    return path
