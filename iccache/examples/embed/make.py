"""From the configuration to an embedder."""

from __future__ import annotations

from pathlib import Path

from iccache import config
from iccache.examples.embed.cached import CachedEmbedder
from iccache.examples.embed.embedder import PACKAGED_MODEL, Embedder
from iccache.examples.embed.hashed import HashEmbedder
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
        case "hash":
            return HashEmbedder()
