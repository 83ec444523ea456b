"""How many tokens a text has, where the model itself does not say."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from iccache.errors import ConfigError
from iccache.examples.encoding import MERGED_BYTES, Encoding

if TYPE_CHECKING:
    import tokenizers

MESSAGE_TOKENS = 4  # role and delimiters around the text of each message
REPLY_TOKENS = 3  # the opening of the answer
REMEMBERED = 1024  # texts that often come again: examples, and prompts that repeat
REMEMBERED_CHARS = 4096  # of such a text
WHOLE_CHARS = 65_536  # a longer text is counted at SAMPLES places, evenly spread, and taken to be alike in between
SAMPLES = 16


class Tokenizer(Protocol):
    def count(self, text: str) -> int:
        """Tokens of `text`, which is plain text whatever it looks like. Takes any text, and never raises."""
        ...


def count_prompt(tokenizer: Tokenizer, texts: Iterable[str]) -> int:
    """Tokens of a prompt with `texts` as its messages: their own, MESSAGE_TOKENS for each, REPLY_TOKENS at the end."""
    return sum(tokenizer.count(text) + MESSAGE_TOKENS for text in texts) + REPLY_TOKENS


def count_pair(tokenizer: Tokenizer, request: str, answer: str) -> int:
    """Tokens of an example's text."""
    return tokenizer.count(request) + tokenizer.count(answer)


@cache
def make_tokenizer(name_or_path: str) -> Tokenizer:
    """An encoding by its name (o200k_base), or a tokenizer.json by its path. Raises ConfigError."""
    if name_or_path.endswith(".json"):
        return FileTokenizer(Path(name_or_path))
    return EncodingTokenizer(name_or_path)


class EncodingTokenizer:
    """One of OpenAI's encodings."""

    def __init__(self, name: str) -> None:
        self._encoding = Encoding(name)
        self._remembered = lru_cache(maxsize=REMEMBERED)(self._encoding.count)

    def count(self, text: str) -> int:
        if len(text) <= REMEMBERED_CHARS:
            return self._remembered(text)
        share = MERGED_BYTES // SAMPLES if len(text) > WHOLE_CHARS else MERGED_BYTES
        return _sampled(text, partial(self._encoding.count, may_merge=share))


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
        self._remembered = lru_cache(maxsize=REMEMBERED)(self._counted)

    def count(self, text: str) -> int:
        return self._remembered(text) if len(text) <= REMEMBERED_CHARS else self._counted(text)

    def _counted(self, text: str) -> int:
        return _sampled(text.encode("utf-8", "replace").decode("utf-8"), self._count)

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False))


def _sampled(text: str, count: Callable[[str], int]) -> int:
    """The whole count of a text, or where that would hold up others, of some places in it, as a share."""
    if len(text) <= WHOLE_CHARS:
        return count(text)
    length = WHOLE_CHARS // SAMPLES
    step = (len(text) - length) / (SAMPLES - 1)
    counted = sum(count(text[at : at + length]) for at in (round(i * step) for i in range(SAMPLES)))
    return round(counted * len(text) / (SAMPLES * length))
