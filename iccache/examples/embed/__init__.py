"""Text to vector: the seam, and the function that makes what the configuration asks for."""

from iccache.examples.embed.embedder import Embedder
from iccache.examples.embed.make import make_embedder

__all__ = ["Embedder", "make_embedder"]
