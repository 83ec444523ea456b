"""What a client is told of what went wrong, whichever way its request came in."""

from __future__ import annotations

import logging
import math

from iccache.backends.fleet import SHOULD_RETRY
from iccache.dialects.dialect import DIALECTS, Dialect
from iccache.errors import BackendError, RequestError, StoreError
from iccache.pipeline import broken_stream

log = logging.getLogger(__name__)

NOBODY = "none"  # the backend and decision of a request that we answered ourselves
CHAT = "/v1/chat/completions"


def told(exc: Exception, request_id: str) -> RequestError:
    """What the client is told of `exc`; of what nobody foresaw, nothing."""
    match exc:
        case RequestError():
            return exc
        case BackendError():
            return broken_stream(exc)
        case StoreError():
            return RequestError(503, str(exc), type="server_error", code="store_unavailable")
    log.error("%s: unexpected", request_id, exc_info=exc)
    return RequestError(500, "internal error", type="server_error", code="internal_error")


def headers_of(error: RequestError, request_id: str) -> dict[str, str]:
    """The headers of an answer that is `error`."""
    headers = {"x-request-id": request_id}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if not error.should_retry:
        headers[SHOULD_RETRY] = "false"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def dialect_of(path: str) -> Dialect:
    """The dialect of a path or of one above it; OpenAI's where there is none."""
    path = path if path.startswith("/v1/") else "/v1" + path
    return next((d for p, d in DIALECTS.items() if path == p or path.startswith(p + "/")), DIALECTS[CHAT])
