"""Log lines as JSON: one object a line, control characters escaped, no bodies and no keys."""

from __future__ import annotations

import logging
import time

import orjson

OF_CLIENTS = ("aiohttp.http_exceptions", "aiohttp.web_protocol")  # where aiohttp's names for their mistakes are


class FromClients(logging.Filter):
    """Of what a client did wrong or broke off, aiohttp's server says the kind alone: its error would quote the client's
    bytes, keys among them, and a traceback for every such request would fill a disk."""

    def filter(self, record: logging.LogRecord) -> bool:
        exc = record.exc_info[1] if record.exc_info else None
        if exc is not None and (isinstance(exc, ConnectionError) or type(exc).__module__ in OF_CLIENTS):
            record.levelno, record.levelname = logging.INFO, "INFO"
            record.msg, record.args = f"a client's request could not be served: {type(exc).__name__}", ()
            record.exc_info = record.exc_text = None
        return True


class JsonFormatter(logging.Formatter):
    """{"at", "level", "logger", "message"}, and "error" with the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"at": at, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode("utf-8", "replace")
