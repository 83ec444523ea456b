"""What is logged of what clients do wrong."""

from __future__ import annotations

import logging

from aiohttp.http_exceptions import BadStatusLine
from aiohttp.web import RequestPayloadError

from iccache.logs import FromClients


def test_of_a_clients_mistake_the_kind_alone_is_logged() -> None:
    for exc in (BadStatusLine("POST /?key=secret"), RequestPayloadError("secret"), ConnectionResetError("gone")):
        record = logging.LogRecord("aiohttp.server", logging.ERROR, "", 0, "Unhandled", (), (type(exc), exc, None))
        assert FromClients().filter(record)
        assert (record.levelname, record.exc_info) == ("INFO", None)
        assert type(exc).__name__ in record.getMessage() and "secret" not in record.getMessage()


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    exc = ValueError("ours")
    record = logging.LogRecord("aiohttp.server", logging.ERROR, "", 0, "Unhandled", (), (ValueError, exc, None))
    assert FromClients().filter(record)
    assert record.levelname == "ERROR" and record.exc_info is not None
