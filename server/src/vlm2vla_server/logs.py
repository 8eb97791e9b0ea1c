"""Structured logs on standard error: one JSON object a line.

Pictures are never logged; prompts and model text only when `--log-texts` asks for them.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

FORMATS = ("json", "text")
REQUEST_ID: ContextVar[str | None] = ContextVar("vlm2vla_request_id", default=None)
"""The server's id of the request that the running task works for; the answer's header `x-request-id` has it too."""
MAX_CHARS = 8000


def setup(kind: str) -> None:
    """Send every log record to standard error in one of FORMATS; called once, by `cli`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if kind == "json" else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def fields(**values: Any) -> dict[str, dict[str, Any]]:
    """The `extra` of a log call: named values that become members of the line."""
    return {"fields": values}


class JsonFormatter(logging.Formatter):
    """time (UTC), level, logger, message, request_id, then the call's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:MAX_CHARS],
        }
        line |= _context(record)
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = describe(record.exc_info[1])[-MAX_CHARS:]
        return json.dumps(line, ensure_ascii=True, default=str)


class TextFormatter(logging.Formatter):
    """The same for a person's eyes."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and an exception's after it."""
        values = " ".join(f"{name}={value}" for name, value in _context(record).items())
        when = datetime.fromtimestamp(record.created).isoformat(sep=" ", timespec="milliseconds")
        text = f"{when} {record.levelname} {record.name} {record.getMessage()[:MAX_CHARS]} {values}".rstrip()
        if record.exc_info and record.exc_info[1] is not None:
            text += "\n" + describe(record.exc_info[1])
        return text


def _context(record: logging.LogRecord) -> dict[str, Any]:
    known = {} if (request_id := REQUEST_ID.get()) is None else {"request_id": request_id}
    return {**known, **getattr(record, "fields", {})}


def describe(problem: BaseException) -> str:
    """Traceback and message of an exception and of what caused it. A validation error's message is left out: it repeats
    the value that was refused, which may be a caller's text."""
    parts: list[str] = []
    seen: set[int] = set()
    one: BaseException | None = problem
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        message = "(message left out)" if isinstance(one, ValidationError) else str(one)
        parts.append("".join(traceback.format_tb(one.__traceback__)) + f"{type(one).__name__}: {message}")
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return "\ncaused by\n".join(parts)
