"""What is no HTTP, or more of it than is read: refused in OpenAI's shape, since its path is not known."""

from __future__ import annotations

import uuid

from aiohttp.http_exceptions import ContentEncodingError, HttpProcessingError
from aiohttp.web import BaseRequest, RequestHandler, Response, StreamResponse

from iccache.api.refusal import CHAT, headers_of
from iccache.dialects.dialect import DIALECTS
from iccache.errors import RequestError

NOT_INSTALLED = "Please install"  # what aiohttp says to whoever runs it; a client can do nothing of the kind
CODINGS = "gzip, deflate"


class Handler(RequestHandler):
    """aiohttp's reader of one connection, but for what it says where it cannot read on. The connection is closed."""

    __slots__ = ()

    def handle_error(
        self, request: BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> StreamResponse:
        plain = super().handle_error(request, status, exc, message)
        if not isinstance(exc, HttpProcessingError):
            return plain
        kind = _kind(message or exc.message)
        if isinstance(exc, ContentEncodingError) and NOT_INSTALLED in kind:
            error = RequestError(415, f"the body's Content-Encoding is not understood; send it plain, or as {CODINGS}")
        else:
            error = RequestError(status, f"the request cannot be read: {kind}")
        response = Response(
            status=error.status,
            body=DIALECTS[CHAT].error(error),
            content_type="application/json",
            headers=headers_of(error, f"req_{uuid.uuid4().hex}"),
        )
        if error.status == 415:
            response.headers["Accept-Encoding"] = CODINGS
        response.force_close()
        return response


def _kind(message: str) -> str:
    """What is wrong, without the client's bytes that it quotes."""
    return message.split(": b'")[0].split("\n")[0].rstrip(" :.")
