"""Logs: one JSON object per line, or text. No record holds a key, nor a prompt unless the settings ask for it."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["json", "text"]
_LIBRARIES = ("alembic", "dbos", "httpx2", "uvicorn")  # their notices say nothing about this server
_CLIENT_FAULTS = (
    "Invalid UTF-8 sequence received from client.",  # a WebSocket message
    "ASGI callable returned without completing handshake.",  # a WebSocket that is refused, which has its own line
)
_ENCODER = json.JSONEncoder(default=str, ensure_ascii=False)
_KNOWN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


class JsonFormatter(logging.Formatter):
    """Formats UTC time, level, logger, message, and the fields of the record's `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        extra = {name: value for name, value in vars(record).items() if name not in _KNOWN}
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **extra,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _ENCODER.encode(line)


def is_server_fault(record: logging.LogRecord) -> bool:
    """Whether a record of uvicorn is not an error for what a client did."""
    return record.msg not in _CLIENT_FAULTS


def configure(log_format: LogFormat | Literal["auto"], level: str) -> None:
    """Send all logs and Python's warnings to standard error; `auto` is text on a terminal, else JSON.

    The server's own lines for its start and for each request replace uvicorn's.
    """
    if log_format == "auto":
        log_format = "text" if sys.stderr.isatty() else "json"
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(True)
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of malformed forms, which get an error
    logging.getLogger("uvicorn.error").addFilter(is_server_fault)
