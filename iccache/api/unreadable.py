"""What is no HTTP, or more of it than is read: refused in OpenAI's shape, since its path is not known."""

from __future__ import annotations

import uuid

from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web import BaseRequest, RequestHandler, Response, StreamResponse

from iccache.api.refusal import CHAT, headers_of
from iccache.dialects.dialect import DIALECTS
from iccache.errors import RequestError


class Handler(RequestHandler):
    """aiohttp's reader of one connection, but for what it says where it cannot read on. The connection is closed."""

    __slots__ = ()

    def handle_error(
        self, request: BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> StreamResponse:
        plain = super().handle_error(request, status, exc, message)
        if not isinstance(exc, HttpProcessingError):
            return plain
        error = RequestError(status, f"the request cannot be read: {_kind(message or exc.message)}")
        response = Response(
            status=status,
            body=DIALECTS[CHAT].error(error),
            content_type="application/json",
            headers=headers_of(error, f"req_{uuid.uuid4().hex}"),
        )
        response.force_close()
        return response


def _kind(message: str) -> str:
    """What is wrong, without the client's bytes that it quotes."""
    return message.split(": b'")[0].split("\n")[0].rstrip(" :.")
