"""Our own errors, in the two shapes that clients parse."""

from __future__ import annotations

import orjson

from iccache.errors import RequestError

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def openai(error: RequestError) -> bytes:
    fields = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return orjson.dumps({"error": fields})


def anthropic(error: RequestError) -> bytes:
    """Its types follow from the status; there is no `param`, so the message has to name it."""
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return orjson.dumps({"type": "error", "error": {"type": kind, "message": error.message}})


def event(data: bytes, name: str | None = None) -> bytes:
    """`data` as the last event of a stream that broke.

    It opens with a blank line: an event that was cut in the middle ends there and cannot swallow this one. Between
    two events a blank line means nothing.
    """
    return b"\n\n" + (b"event: " + name.encode() + b"\n" if name else b"") + b"data: " + data + b"\n\n"
