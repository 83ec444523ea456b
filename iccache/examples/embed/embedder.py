"""What everything that embeds has in common.

What identifies a model is its files (of a remote one, its address and name): embeddings of different identities are
never compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from iccache.types import Matrix

CHARS_READ = 16_384  # of a long text, so much is tokenised: half from its beginning, half from its end
PACKAGED_MODEL = "all-MiniLM-L6-v2"  # in its own package, as a static table in ours


class Embedder(Protocol):
    """Texts to unit vectors. Belongs to the thread that uses it."""

    identity: str  # changes when the model's files do
    dim: int
    quick: bool  # a short text takes well below a millisecond, and nothing is waited for

    def embed(self, texts: Sequence[str]) -> Matrix:
        """(n, dim) float32, rows of unit norm, in the order of `texts`. Takes any text: empty, huge, malformed."""
        ...


def digest(folder: Path) -> str:
    """16 hex digits that follow the names and contents of a model's files; documentation apart."""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and not name.startswith(".") and file.suffix.lower() != ".md":
            with file.open("rb") as opened:
                total.update(f"{name}\0{hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()[:16]


def well_formed(text: str) -> str:
    """`text` with lone surrogates, which no encoder takes, replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")


def ends(text: str, chars: int) -> str:
    """`text`, or where it is longer than `chars`, its beginning and its end."""
    return text if len(text) <= chars else f"{text[: chars // 2]}\n{text[-(chars // 2) :]}"


def first_line(exc: BaseException) -> str:
    """What an error of a library says, in one line."""
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]
