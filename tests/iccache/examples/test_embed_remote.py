"""An embeddings endpoint: a small real server on loopback that can be told to misbehave."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import orjson
import pytest

from iccache.errors import ConfigError, SelectionError
from iccache.examples.embed.hashed import HashEmbedder
from iccache.examples.embed.remote import BATCH, BLANK, CHARS_SENT, PAUSE_S, RemoteEmbedder


class Endpoint(ThreadingHTTPServer):
    """Embeds by hash, in any order; `answer` replaces what it says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.connections = 0
        self.answer: tuple[int, bytes] | None = None
        self.close_after = False
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def do_POST(self) -> None:
        asked = orjson.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked | {"path": self.path})
        self.server.keys.append(self.headers["Authorization"])
        vectors = HashEmbedder(32).embed(asked["input"]) * 3.0
        data = [{"index": i, "embedding": v.tolist()} for i, v in enumerate(vectors)][::-1]
        status, body = self.server.answer or (200, orjson.dumps({"data": data}))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = self.server.close_after  # without saying so: the next request finds it closed

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_vectors_come_in_order_and_at_unit_length(endpoint: Endpoint) -> None:
    embedder = RemoteEmbedder(endpoint.url + "/", "m", "secret")
    texts = ["one", "two words", "three more words"]
    np.testing.assert_allclose(embedder.embed(texts), HashEmbedder(32).embed(texts), atol=1e-6)
    assert (embedder.dim, embedder.identity) == (32, f"remote:{endpoint.url}#m")
    assert endpoint.asked[-1] == {
        "model": "m", "input": texts, "encoding_format": "float", "path": "/v1/embeddings",
    }  # fmt: skip
    assert set(endpoint.keys) == {"Bearer secret"}


def test_many_texts_are_several_calls_on_one_connection(endpoint: Endpoint) -> None:
    embedder = RemoteEmbedder(endpoint.url, "m")
    texts = [f"text {i}" for i in range(2 * BATCH + 1)]
    np.testing.assert_allclose(embedder.embed(texts), HashEmbedder(32).embed(texts), atol=1e-6)
    assert [len(asked["input"]) for asked in endpoint.asked] == [1, BATCH, BATCH, 1]
    assert endpoint.connections == 1
    assert endpoint.keys == [None] * 4


def test_no_text_is_sent_empty_or_endless(endpoint: Endpoint) -> None:
    RemoteEmbedder(endpoint.url, "m").embed(["", " \n", "a" * 100_000, "\ud800"])
    sent = endpoint.asked[-1]["input"]
    assert sent[:2] == [BLANK, BLANK]
    assert [len(text) for text in sent[2:]] == [CHARS_SENT + 1, 1]


def test_a_connection_that_was_closed_meanwhile_is_opened_again(endpoint: Endpoint) -> None:
    endpoint.close_after = True
    embedder = RemoteEmbedder(endpoint.url, "m")
    for _ in range(3):
        assert embedder.embed(["a"]).shape == (1, 32)
    assert endpoint.connections == 4


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((500, b"broken"), "500: broken"),
        ((401, b"no such key: secret"), "no such key: \\*\\*\\*"),
        ((200, b"not json"), "did not answer with"),
        ((200, b"[]"), "did not answer with"),
        ((200, b'{"data": []}'), "for 1 texts"),
        ((200, b'{"data": [{"index": 0, "embedding": [1, 2]}]}'), "for 1 texts"),
        ((200, b'{"data": [{"index": 0, "embedding": "AAAA"}]}'), "did not answer with"),
        ((200, orjson.dumps({"data": [{"index": 0, "embedding": [0.0] * 32}]})), "without a direction"),
        ((200, b'{"data": [{"index": 0, "embedding": [1e39' + b", 1" * 31 + b"]}]}"), "without a direction"),
    ],
)
def test_a_failure_is_soft_and_the_endpoint_is_left_alone_for_a_while(
    endpoint: Endpoint, answer: tuple[int, bytes], said: str
) -> None:
    now = 100.0
    embedder = RemoteEmbedder(endpoint.url, "m", "secret", clock=lambda: now)
    endpoint.answer = answer
    with pytest.raises(SelectionError, match=said):
        embedder.embed(["a"])
    asked = len(endpoint.asked)
    with pytest.raises(SelectionError, match="failed less than"):
        embedder.embed(["a"])
    assert len(endpoint.asked) == asked
    endpoint.answer = None
    now += PAUSE_S
    assert embedder.embed(["a"]).shape == (1, 32)


def test_nobody_there_is_one_line_of_configuration_error(endpoint: Endpoint) -> None:
    endpoint.answer = (404, b"no model\nhere")
    with pytest.raises(ConfigError, match=r"^embedder.base_url: .* answered 404: no model"):
        RemoteEmbedder(endpoint.url, "m")
    with pytest.raises(ConfigError, match=r"^embedder.base_url: "):
        RemoteEmbedder("http://127.0.0.1:1/v1", "m")
