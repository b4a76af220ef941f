"""Log lines of the server: one for each request, and one for each change of the control plane.

    2026-05-04 12:00:00,123 INFO moescope: request request_id=my-1 method=POST
        path=/v1/completions status=200 duration_s=0.412 mask=calm@2 run=monday

or the same as one JSON object (MOESCOPE_LOG_FORMAT=json). What was asked and answered is in no
line: no prompt, no completion, no body.

What happens while a request is served is noted in its line (`note`), wherever that is: the line
stands in a context variable.
"""

import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

from pythonjsonlogger.json import JsonFormatter

logger = logging.getLogger("moescope")

_LONGEST = 300  # characters of a value that came from outside
_PLAIN = re.compile(r"[\w.:/@+-]+", re.ASCII)


@dataclass(slots=True)
class RequestLine:
    """What the line of one request will say; `status` is None until an answer begins."""

    request_id: str
    method: str
    path: str
    started: float = field(default_factory=time.monotonic)
    status: int | None = None
    mask: str | None = None
    run: str | None = None
    who: str | None = None
    reason: str | None = None
    detail: str | None = None

    def write(self) -> None:
        """Log it; a request that was refused, as a warning."""
        level = logging.INFO if self.reason is None else logging.WARNING
        duration_s = round(time.monotonic() - self.started, 6)
        known = {"mask": self.mask, "run": self.run, "who": self.who}
        why = {"reason": self.reason, "detail": self.detail}
        _log(
            level,
            "request",
            request_id=self.request_id,
            method=self.method,
            path=self.path,
            status=self.status,
            duration_s=duration_s,
            **{name: value for name, value in (known | why).items() if value is not None},
        )


_current: ContextVar[RequestLine | None] = ContextVar("request", default=None)


@contextmanager
def request_line(
    request_id: str, method: str, path: str, *, logged: bool = True
) -> Iterator[RequestLine]:
    """The line of the request that is served inside the block; written at its end if `logged`."""
    line = RequestLine(request_id, method, path)
    token = _current.set(line)
    try:
        yield line
    except Exception:
        line.status = line.status or 500
        raise
    finally:
        _current.reset(token)
        if logged:
            line.write()


def note(**values: Any) -> None:
    """Set fields of the line of the request that is being served, if there is one."""
    line = _current.get()
    if line is not None:
        for name, value in values.items():
            setattr(line, name, value)


def log_change(what: str, **values: Any) -> None:
    """Log a change of what the server does."""
    line = _current.get()
    request_id = {} if line is None else {"request_id": line.request_id}
    _log(logging.INFO, "change", what=what, **request_id, **values)


def _log(level: int, event: str, **fields: Any) -> None:
    cut = {k: v[:_LONGEST] if isinstance(v, str) else v for k, v in fields.items()}
    logger.log(level, event, extra={"fields": cut})


class TextLines(logging.Formatter):
    """Lines for people: the event, and its fields as NAME=VALUE."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s moescope: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The line; what came from outside can't break it into two."""
        fields: dict[str, Any] = getattr(record, "fields", {})
        said = "".join(f" {name}={_quoted(value)}" for name, value in fields.items())
        return super().formatMessage(record) + said


def _quoted(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


class JsonLines(JsonFormatter):
    """One JSON object a line."""

    def __init__(self) -> None:
        super().__init__(
            ["levelname", "message"], rename_fields={"levelname": "level"}, timestamp="time"
        )

    def add_fields(
        self,
        log_data: dict[str, Any],
        record: logging.LogRecord,
        message_dict: dict[str, Any],
    ) -> None:
        """Put the fields beside the time, the level and the message, and nothing of vLLM's."""
        super().add_fields(log_data, record, message_dict)
        fields = log_data.get("fields", {})
        for name in log_data.keys() - {"time", "level", "message", *message_dict}:
            del log_data[name]
        log_data.update(fields)


def show_logs(form: Literal["text", "json"]) -> None:
    """Write our lines to the error output, unless logging was set up for them already."""
    if logger.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logger.addHandler(handler)
    logger.propagate = False
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
