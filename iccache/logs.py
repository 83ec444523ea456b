"""Log lines as JSON: one object a line, control characters escaped, no bodies and no keys."""

from __future__ import annotations

import logging
import time

import orjson


class JsonFormatter(logging.Formatter):
    """{"at", "level", "logger", "message"}, and "error" with the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"at": at, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode("utf-8", "replace")
