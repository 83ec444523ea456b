"""From the configuration to an embedder."""

from __future__ import annotations

import os
from pathlib import Path

from iccache import config
from iccache.errors import ConfigError
from iccache.examples.embed.cached import CachedEmbedder
from iccache.examples.embed.embedder import PACKAGED_MODEL, Embedder
from iccache.examples.embed.hashed import HashEmbedder
from iccache.examples.embed.onnx import OnnxEmbedder
from iccache.examples.embed.remote import RemoteEmbedder
from iccache.examples.embed.sentence_transformer import SentenceTransformerEmbedder
from iccache.examples.embed.static import StaticEmbedder


def make_embedder(settings: config.Embedder) -> Embedder:
    """The embedder that `settings` asks for, with its cache. Raises ConfigError."""
    return CachedEmbedder(_model(settings), settings.cache_entries)


def _model(settings: config.Embedder) -> Embedder:
    folder = None if settings.model == PACKAGED_MODEL else Path(settings.model)
    match settings.backend:
        case "static":
            return StaticEmbedder(folder)
        case "sentence-transformers":
            return SentenceTransformerEmbedder(folder, settings.threads)
        case "onnx":
            return OnnxEmbedder(folder, "fp32", settings.threads)
        case "onnx-int8":
            return OnnxEmbedder(folder, "int8", settings.threads)
        case "remote":
            return _remote(settings)
        case "hash":
            return HashEmbedder()


def _remote(settings: config.Embedder) -> RemoteEmbedder:
    if settings.base_url is None or settings.model == PACKAGED_MODEL:
        raise ConfigError("embedder: the backend remote needs base_url and model")
    key = config.secret(os.environ, settings.key_env, "embedder.key_env") if settings.key_env else None
    return RemoteEmbedder(settings.base_url, settings.model, key, settings.timeout_s)
