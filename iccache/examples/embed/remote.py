"""An OpenAI-compatible `/v1/embeddings` endpoint."""

from __future__ import annotations

import http.client
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import orjson

from iccache.errors import ConfigError, SelectionError
from iccache.examples.embed.embedder import ends, first_line, well_formed
from iccache.types import Matrix

CHARS_SENT = 6_000  # of a long text; endpoints refuse what exceeds their window, often 8,192 tokens
BATCH = 128  # texts a call
PAUSE_S = 5.0  # after a failure the endpoint is left alone for so long: waiting for it would hold up every request
BLANK = "(blank)"  # endpoints refuse empty texts
MAX_BYTES = 64 << 20  # of an answer


class RemoteEmbedder:
    """Texts go out in batches, on one kept connection. Every failure is a SelectionError: the request goes on without.

    The model is known by its address and name. What is behind them may change unseen; a new name is a new model.
    """

    quick = False

    def __init__(
        self,
        base_url: str,
        model: str,
        key: str | None = None,
        timeout_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Asks once for the number of dimensions. Raises ConfigError where the endpoint does not answer."""
        self.base_url = base_url.rstrip("/")
        self.model = model
        self.key = key
        self.timeout_s = timeout_s
        self.clock = clock
        self.identity = f"remote:{self.base_url}#{model}"
        self.dim = 0
        self._connection: http.client.HTTPConnection | None = None
        self._refused_until = -np.inf
        try:
            self.dim = self._call([BLANK]).shape[1]
        except SelectionError as exc:
            raise ConfigError(f"embedder.base_url: {exc}") from exc

    def embed(self, texts: Sequence[str]) -> Matrix:
        """Raises SelectionError, at once while the endpoint has just failed."""
        if not texts:
            return np.empty((0, self.dim), np.float32)
        if self.clock() < self._refused_until:
            raise SelectionError(f"{self.base_url} failed less than {PAUSE_S:.0f} s ago")
        sent = [_sendable(text) for text in texts]
        try:
            return np.concatenate([self._call(sent[i : i + BATCH]) for i in range(0, len(sent), BATCH)])
        except SelectionError:
            self._refused_until = self.clock() + PAUSE_S
            raise

    def _call(self, texts: Sequence[str]) -> Matrix:
        body = orjson.dumps({"model": self.model, "input": list(texts), "encoding_format": "float"})
        status, answer = self._post(body)
        if status != 200:
            said = " ".join(answer[:300].decode("utf-8", "replace").split())
            said = said.replace(self.key, "***") if self.key else said  # some repeat the key that they refuse
            raise SelectionError(f"{self.base_url}/embeddings answered {status}: {said}")
        return self._vectors(answer, len(texts))

    def _post(self, body: bytes) -> tuple[int, bytes]:
        """Once more on a fresh connection where the kept one proves to be closed."""
        kept = self._connection is not None
        try:
            return self._exchange(body)
        except (http.client.RemoteDisconnected, ConnectionError, BrokenPipeError) as exc:
            if not kept:
                raise SelectionError(f"{self.base_url}: {first_line(exc)}") from exc
        except (OSError, http.client.HTTPException) as exc:
            raise SelectionError(f"{self.base_url}: {first_line(exc)}") from exc
        try:
            return self._exchange(body)
        except (OSError, http.client.HTTPException) as exc:
            raise SelectionError(f"{self.base_url}: {first_line(exc)}") from exc

    def _exchange(self, body: bytes) -> tuple[int, bytes]:
        connection, self._connection = self._connection or self._connect(), None
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        try:
            connection.request("POST", f"{urlsplit(self.base_url).path}/embeddings", body, headers)
            response = connection.getresponse()
            answer = response.read(MAX_BYTES)
            ended = response.isclosed()
        except BaseException:
            connection.close()
            raise
        if ended:
            self._connection = connection
        else:
            connection.close()
        return response.status, answer

    def _connect(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.base_url)
        if parts.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(parts.netloc, timeout=self.timeout_s, context=context)
        return http.client.HTTPConnection(parts.netloc, timeout=self.timeout_s)

    def _vectors(self, answer: bytes, n: int) -> Matrix:
        """(n, dim) unit rows, in the order of their "index"."""
        try:
            data: list[dict[str, Any]] = orjson.loads(answer)["data"]
            ordered = sorted(data, key=lambda item: int(item["index"]))
            with np.errstate(over="ignore"):  # becomes infinite, and is refused below
                vectors = np.array([item["embedding"] for item in ordered], np.float32)
        except (ValueError, TypeError, KeyError) as exc:
            raise SelectionError(f"{self.base_url}/embeddings did not answer with embeddings: {exc!r}") from exc
        if vectors.ndim != 2 or len(vectors) != n or vectors.shape[1] != (self.dim or vectors.shape[1]):
            raise SelectionError(f"{self.base_url}/embeddings: an array of {vectors.shape} for {n} texts")
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not (np.isfinite(norms).all() and (norms > 0).all()):
            raise SelectionError(f"{self.base_url}/embeddings: a vector without a direction")
        unit: Matrix = vectors / norms
        return unit


def _sendable(text: str) -> str:
    return ends(well_formed(text), CHARS_SENT).strip() or BLANK
