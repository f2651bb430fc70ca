"""The daemon's log: one line an event on standard error, as text or JSON."""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import time

from crishim.config.settings import LogSettings

operation: contextvars.ContextVar[str] = contextvars.ContextVar("operation", default="")
"""What is being done, such as ``RunPodSandbox kube-system/dns``: in every line logged meanwhile."""


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        doing = f" [{operation.get()}]" if operation.get() else ""
        line = f"{stamp}.{int(record.msecs):03d}Z {record.levelname.lower():7}{doing} {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "operation": operation.get(),
            "message": record.getMessage(),
            "error": self.formatException(record.exc_info) if record.exc_info else "",
        }
        return json.dumps({name: value for name, value in fields.items() if value != ""})


def set_up(settings: LogSettings) -> None:
    """Send all logging of this process to standard error as ``settings`` say."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if settings.format == "json" else _Text())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level.upper())
    for chatty in ("asyncio", "grpc", "grpc._cython.cygrpc"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
