"""How many tokens a text has, where the model itself does not say."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from iccache.errors import ConfigError

if TYPE_CHECKING:
    import bpe_openai
    import tokenizers

MESSAGE_TOKENS = 4  # role and delimiters around the text of each message
REPLY_TOKENS = 3  # the opening of the answer
REMEMBERED = 1024  # texts that often come again: examples, and prompts that repeat
REMEMBERED_CHARS = 4096  # of such a text
PIECE = 50_000  # characters counted at once; the encodings refuse 200,000 tokens, and one character has at most four


class Tokenizer(Protocol):
    def count(self, text: str) -> int:
        """Tokens of `text`, which is plain text whatever it looks like. Takes any text, and never raises."""
        ...


def count_prompt(tokenizer: Tokenizer, texts: Iterable[str]) -> int:
    """Tokens of a prompt with `texts` as its messages: their own, MESSAGE_TOKENS for each, REPLY_TOKENS at the end."""
    return sum(tokenizer.count(text) + MESSAGE_TOKENS for text in texts) + REPLY_TOKENS


@cache
def make_tokenizer(name_or_path: str) -> Tokenizer:
    """An encoding by its name (o200k_base), or a tokenizer.json by its path. Raises ConfigError."""
    if name_or_path.endswith(".json"):
        return FileTokenizer(Path(name_or_path))
    return EncodingTokenizer(name_or_path)


class EncodingTokenizer:
    """One of OpenAI's encodings, its table from a package. The import takes half a second, so it happens here."""

    def __init__(self, name: str) -> None:
        try:
            import bpe_openai  # noqa: PLC0415
        except ImportError as exc:
            raise ConfigError(f"tokenizer: {name} needs the package bpe-openai") from exc
        known = bpe_openai.list_encoding_names()
        if name not in known:
            raise ConfigError(f"tokenizer: {name!r} is neither a tokenizer.json nor one of {', '.join(known)}")
        self._encoding: bpe_openai.Encoding = bpe_openai.get_encoding(name)
        self._remembered = lru_cache(maxsize=REMEMBERED)(self._count)

    def count(self, text: str) -> int:
        return self._remembered(text) if len(text) <= REMEMBERED_CHARS else self._count(text)

    def _count(self, text: str) -> int:
        return sum(len(self._encoding.encode_ordinary(piece)) for piece in _pieces(text))


class FileTokenizer:
    """A model's own tokenizer.json."""

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers  # noqa: PLC0415 - comes with the embedding model; only needed here
        except ImportError as exc:
            raise ConfigError(f"tokenizer: {path} needs the package tokenizers") from exc
        try:
            self._tokenizer: tokenizers.Tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as exc:  # the library raises bare Exception
            raise ConfigError(f"tokenizer: {path} cannot be read: {exc}") from exc
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True

    def count(self, text: str) -> int:
        pieces = _pieces(text.encode("utf-8", "replace").decode("utf-8"))
        return sum(len(self._tokenizer.encode(piece, add_special_tokens=False)) for piece in pieces)


def _pieces(text: str) -> Iterable[str]:
    return (text[i : i + PIECE] for i in range(0, len(text), PIECE))
