"""What every embedder does."""

import socket
from collections.abc import Callable
from functools import cache
from typing import Literal

import numpy as np
import pytest

from iccache import config
from iccache.examples.embed import Embedder, make_embedder
from iccache.examples.embed.cached import CachedEmbedder
from iccache.examples.embed.hashed import HashEmbedder
from iccache.examples.embed.onnx import OnnxEmbedder
from iccache.examples.embed.sentence_transformer import SentenceTransformerEmbedder
from iccache.examples.embed.static import StaticEmbedder


@cache
def static() -> StaticEmbedder:
    """The packaged table."""
    return StaticEmbedder()


@cache
def minilm() -> SentenceTransformerEmbedder:
    """The packaged model, loaded once and without a network."""
    connect = socket.socket.connect
    socket.socket.connect = refuse  # type: ignore[method-assign]
    try:
        return SentenceTransformerEmbedder()
    finally:
        socket.socket.connect = connect  # type: ignore[method-assign]


@cache
def onnx(precision: Literal["fp32", "int8"]) -> OnnxEmbedder:
    """The packaged model, exported on the first run of a machine."""
    return OnnxEmbedder(precision=precision)


def refuse(*_: object) -> None:
    raise AssertionError("an embedder reached for the network")


MAKERS: dict[str, Callable[[], Embedder]] = {
    "hash": HashEmbedder,
    "hash, 64": lambda: HashEmbedder(64),
    "static": static,
    "minilm": minilm,
    "onnx": lambda: onnx("fp32"),
    "onnx-int8": lambda: onnx("int8"),
    "cached static": lambda: CachedEmbedder(static(), 100),
    "cached hash": lambda: CachedEmbedder(HashEmbedder(), 100),
    "cached minilm": lambda: CachedEmbedder(minilm(), 2),
    "uncached": lambda: CachedEmbedder(HashEmbedder(), 0),
    "as configured": lambda: make_embedder(config.Embedder()),
}
ODD = [
    "",
    " ",
    "\n\t",
    "a",
    "\ud800",
    "x \udfff y",
    "\0",
    "é" * 300,
    "😀" * 5,
    "word " * 40_000,
    "a" * 200_000,
    "[CLS]",
]


@pytest.fixture(params=MAKERS)
def embedder(request: pytest.FixtureRequest) -> Embedder:
    return MAKERS[request.param]()


def test_rows_are_unit_vectors_in_order(embedder: Embedder) -> None:
    texts = ["what is the capital of France", "bake a cake", "what is the capital of France"]
    vectors = embedder.embed(texts)
    assert vectors.shape == (3, embedder.dim)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-5)
    for text, vector in zip(texts, vectors, strict=True):
        np.testing.assert_allclose(embedder.embed([text])[0], vector, atol=1e-5)


def test_no_texts_are_no_rows(embedder: Embedder) -> None:
    assert embedder.embed([]).shape == (0, embedder.dim)


def test_any_text_is_embedded(embedder: Embedder) -> None:
    vectors = embedder.embed(ODD)
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)


def test_a_paraphrase_is_nearer_than_another_topic(embedder: Embedder) -> None:
    asked, same, other = embedder.embed(
        [
            "How do I reset my account password?",
            "Please help me reset the password of my account",
            "Which wine goes with grilled salmon?",
        ]
    )
    assert asked @ same > asked @ other + 0.2


def test_a_long_template_in_front_does_not_make_requests_equal(embedder: Embedder) -> None:
    template = "Read the instructions below with care and answer in one word only, without any explanation. " * 100
    refund, refund_again, poem = embedder.embed(
        [
            template + "I want my money back for the broken kettle",
            template + "I want the money back for my broken kettle",
            template + "Write a poem about autumn leaves",
        ]
    )
    assert refund @ refund_again > refund @ poem


def test_identity_is_stable_and_tells_models_apart(embedder: Embedder) -> None:
    assert embedder.identity
    assert len({HashEmbedder(64).identity, HashEmbedder().identity, minilm().identity, static().identity}) == 4
    assert onnx("fp32").identity != onnx("int8").identity
    assert SentenceTransformerEmbedder.__name__ not in embedder.identity


def test_the_exported_model_says_what_the_model_says() -> None:
    texts = [
        "How do I reset my password?",
        "",
        "word " * 400,
        "Ignore the list. " * 40 + "What is 2 + 3?",
        "¿Cómo estás?",
    ]
    given = minilm().embed(texts)
    np.testing.assert_allclose(onnx("fp32").embed(texts), given, atol=1e-4)
    assert (np.sum(onnx("int8").embed(texts) * given, axis=1) > 0.97).all()


def test_the_default_configuration_makes_one() -> None:
    embedder = make_embedder(config.Embedder())
    assert embedder.identity == static().identity
    assert embedder.embed(["hello"]).shape == (1, static().dim)
