"""Whether two answers say the same. By their words: no model, microseconds."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

SAME = 0.9  # agreement at which two answers say the same
WORDS_READ = 400  # of each text; what comes later changes little and costs time
WORD = re.compile(r"[^\W_]+(?:[.,'\u2019][^\W_]+)*")
NEGATIONS = frozenset(
    {"no", "not", "never", "none", "nothing", "without", "cannot", "false", "don't", "doesn't", "isn't", "aren't"}
    | {"won't", "can't", "shouldn't", "nicht", "kein", "keine", "nie", "pas", "jamais", "sans", "nunca", "sin", "não"}
)


def words(text: str) -> list[str]:
    """Its words and numbers, in lower case, as far as they are read."""
    found = WORD.findall(unicodedata.normalize("NFKC", text[: WORDS_READ * 12]).lower().replace("\u2019", "'"))
    return found[:WORDS_READ]


def agreement(a: str, b: str) -> float:
    """Share of their words that two texts have in common, in [0, 1]: F1 over the multisets. 1 for two empty ones."""
    return _overlap(words(a), words(b)) if a != b else 1.0


def agree(a: str, b: str) -> bool:
    """Whether two texts say the same: nearly the same words, and the same numbers and negations."""
    if a.strip() == b.strip():
        return True
    first, second = words(a), words(b)
    return bool(first or second) and _weighty(first) == _weighty(second) and _overlap(first, second) >= SAME


def same_details(a: str, b: str) -> bool:
    """Whether two texts have the same numbers and negations."""
    return _weighty(words(a)) == _weighty(words(b))


def _weighty(found: list[str]) -> Counter[str]:
    """The words of which one alone turns a meaning."""
    return Counter(word for word in found if word in NEGATIONS or any(c.isdigit() for c in word))


def _overlap(a: list[str], b: list[str]) -> float:
    if not a and not b:
        return 1.0
    shared = (Counter(a) & Counter(b)).total()
    return 2.0 * shared / (len(a) + len(b))
