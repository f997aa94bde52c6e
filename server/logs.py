"""How the server logs: events with keys, one line each, for people or as JSON. Never the text of a request.

`note(log, "ready", adapters=41, seconds=1.8)` gives `ready adapters=41 seconds=1.8`, or one JSON object.
"""

import json
import logging
import traceback
from typing import Any

from adapters_store.errors import EspalierError

# Exceptions whose messages are about the machine or our own code. Others may quote what a client sent.
_TELLING = (EspalierError, RuntimeError, OSError, MemoryError, AssertionError)


def note(log: logging.Logger, event: str, level: int = logging.INFO, **keys: object) -> None:
    """One event with its keys."""
    if log.isEnabledFor(level):
        log.log(level, event, extra={"keys": keys})


def trace_of(error: BaseException) -> str:
    """The traceback of an error and its causes, without messages that may hold what a client sent."""
    told = f": {error}" if isinstance(error, _TELLING) and not isinstance(error, UnicodeError) else ""
    lines = [*traceback.format_tb(error.__traceback__), f"{type(error).__name__}{told}"]
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return (trace_of(before) + "\nthen\n" if before else "") + "".join(lines)


def _keys(record: logging.LogRecord) -> dict[str, object]:
    found: dict[str, object] = getattr(record, "keys", {})
    return found


class TextLines(logging.Formatter):
    """Time, level, logger, event, then key=value; values with spaces are quoted."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        words = [f"{self.formatTime(record)} {record.levelname} {record.name} {record.getMessage()}"]
        words += [f"{key}={_shown(value)}" for key, value in _keys(record).items()]
        line = " ".join(words)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonLines(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {"time": self.formatTime(record), "level": record.levelname, "logger": record.name}
        line |= {"event": record.getMessage()} | {f"{key}": value for key, value in _keys(record).items()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _shown(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return json.dumps(text) if " " in text or '"' in text else text


def configure(log_format: str) -> None:
    """Send everything to standard error in one format; quieten the libraries."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("httpx", "huggingface_hub", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
