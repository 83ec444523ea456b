"""The key of an encrypted store: 256 bits, written as 64 hexadecimal digits."""

from __future__ import annotations

import re
from collections.abc import Mapping

from iccache import config
from iccache.errors import ConfigError

FORM = re.compile(r"[0-9A-Fa-f]{64}")
LEAST_DISTINCT_BYTES = 16  # 32 random bytes have fewer once in 1e10 times


class Key:
    """It is nowhere printed: neither its repr nor a message about it says what it is."""

    __slots__ = ("_digits",)

    def __init__(self, text: str, wanted_by: str = "key") -> None:
        """Raises ConfigError where `text` is no key, or none that is random."""
        if not FORM.fullmatch(text):
            raise ConfigError(f"{wanted_by}: is not 64 hexadecimal digits: make a key with `openssl rand -hex 32`")
        if len(set(bytes.fromhex(text))) < LEAST_DISTINCT_BYTES:
            raise ConfigError(f"{wanted_by}: is not random: make a key with `openssl rand -hex 32`")
        self._digits = text.lower()

    def __repr__(self) -> str:
        return "Key(***)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and other._digits == self._digits

    def __hash__(self) -> int:
        return hash(self._digits)

    def reveal(self) -> str:
        """The digits, for SQLCipher and for a process of our own."""
        return self._digits


def key_in(environ: Mapping[str, str], name: str, wanted_by: str) -> Key:
    """The key in the environment variable `name`, or in the file that `name`_FILE names. Raises ConfigError."""
    text = config.key_in(environ, name)
    if text is None:
        raise ConfigError(f"{wanted_by}: the environment variable {name} is not set, nor is {name}_FILE")
    return Key(text, f"{wanted_by}: the key in {name}")


def key_of(store: config.Store, environ: Mapping[str, str]) -> Key | None:
    """The key that the configuration names; None where the store is not to be encrypted. Raises ConfigError."""
    if store.key_env is None:
        return None
    return key_in(environ, store.key_env, "store.key_env")
