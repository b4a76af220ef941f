"""A data file, whole or not at all, and its card: what it was made from and how, as JSON beside it.

The card holds no text of the data.

job.jsonl
job.jsonl.card.json
"""

import hashlib
import json
import os
from collections.abc import Iterable
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
    write_whole(path, [json.dumps(card, indent=2, ensure_ascii=False) + "\n"], "data card")
    return path


def write_whole(out: Path, texts: Iterable[str], what: str = "job") -> str:
    """Write aside, then rename: `out` is never seen half written. Returns its SHA-256."""
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    hashed = hashlib.sha256()
    try:
        try:
            with aside.open("wb") as file:
                for text in texts:
                    file.write(text.encode())
                    hashed.update(text.encode())
                file.flush()
                os.fsync(file.fileno())
            aside.replace(out)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"can't write the {what} {out}: {error.strerror}.") from error
    return hashed.hexdigest()
