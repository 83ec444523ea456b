"""How many tokens a text has in one of OpenAI's encodings: byte-pair encoding, counted in 5 MB.

The vocabulary is the file in the package `bpe-openai`, read without that package: it encodes and decodes, which takes
135 MB, and counting takes a table of hashes. The test of this file holds the two against each other.

A text is split by the encoding's expression into pieces, about words. One that is in the vocabulary is one token; of
any other, neighbouring parts are merged, those of the lowest rank first, until no two together are in the vocabulary.
What would hold up others is merged in part and extrapolated (`MERGED_BYTES`).
"""

from __future__ import annotations

import gzip
import importlib.util
import re
import unicodedata
from binascii import a2b_base64
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import groupby, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from iccache.errors import ConfigError

LINES_AT_ONCE = 8192  # of the vocabulary's file while it is read
SLOTS = 1 << 19  # of the table: the largest vocabulary, 200,000 tokens, fills two in five
RANK_BITS = 18
PIECES_REMEMBERED = 16_384
LONGEST_PIECE = 128  # bytes; a longer run without a break is merged in parts of this size
MERGED_BYTES = 4_096  # of pieces that are neither known nor in the vocabulary; the rest of them is taken to be alike
SCANNED = 0x20000  # code points whose category is looked up; beyond, all are letters of Chinese
NONE = 1 << RANK_BITS  # no rank

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
EXPRESSIONS: Mapping[
    str, str
] = {  # with classes for L(etter), u(pper or unclear), l(ower or unclear), N(umber), S(pace)
    "o200k_base": "|".join(
        [
            rf"[^\r\nLN]?[u]*[l]+{_CONTRACTION}",
            rf"[^\r\nLN]?[u]+[l]*{_CONTRACTION}",
            r"[N]{1,3}",
            r" ?[^SLN]+[\r\n/]*",
            r"[S]*[\r\n]+",
            r"[S]+(?![^S])",
            r"[S]+",
        ]
    ),
    "cl100k_base": "|".join(
        [
            r"'(?i:[sdmt]|ll|ve|re)",
            r"[^\r\nLN]?+[L]++",
            r"[N]{1,3}+",
            r" ?[^SLN]++[\r\n]*+",
            r"[S]++\Z",
            r"[S]*[\r\n]",
            r"[S]+(?![^S])",
            r"[S]",
        ]
    ),
}
_ASCII = {"L": "A-Za-z", "u": "A-Z", "l": "a-z", "N": "0-9", "S": r"\t-\r "}
_SPACE = "\\t-\\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


class Encoding:
    """Counts tokens. Any thread may ask: what two ask at once is worked out twice."""

    def __init__(self, name: str) -> None:
        """Raises ConfigError for a name that is not in `EXPRESSIONS`, or where the package is missing."""
        if name not in EXPRESSIONS:
            raise ConfigError(f"tokenizer: {name!r} is neither a tokenizer.json nor one of {', '.join(EXPRESSIONS)}")
        self._table = _table(_vocabulary(name)).data
        self._ascii = re.compile(_with_classes(EXPRESSIONS[name], _ASCII))
        self._any = re.compile(_with_classes(EXPRESSIONS[name], _classes()))
        self._known: dict[str, int] = {}  # tokens of a piece

    def count(self, text: str, may_merge: int = MERGED_BYTES) -> int:
        """Tokens of `text`. Exact unless more than `may_merge` bytes of it are neither known nor in the vocabulary."""
        pieces = (self._ascii if text.isascii() else self._any).findall(text)
        known = self._known
        try:
            return sum(map(known.__getitem__, pieces))
        except KeyError:
            return self._with_new(pieces, may_merge)

    def _with_new(self, pieces: list[str], may_merge: int) -> int:
        """The sum over pieces some of which have not been seen lately; no more than `may_merge` bytes are merged."""
        known, total = self._known, 0
        merged = tokens = unseen = 0  # bytes that were merged, what they became, and bytes for which that is too much
        for piece in pieces:
            count = known.get(piece)
            if count is None:
                data = piece.encode("utf-8", "replace")
                if self._rank(data) < NONE:
                    count = 1
                elif merged >= may_merge:
                    unseen += len(data)
                    continue
                else:
                    data, rest = data[:may_merge], data[may_merge:]
                    count = sum(map(self._merged, _parts(data)))
                    merged, tokens, unseen = merged + len(data), tokens + count, unseen + len(rest)
                    if rest:
                        total += count
                        continue
                if len(piece) <= LONGEST_PIECE:
                    known[piece] = count
            total += count
        if len(known) > PIECES_REMEMBERED:
            self._known = dict(islice(known.items(), PIECES_REMEMBERED // 2, None))
        return total + round(unseen * tokens / max(merged, 1))

    def _rank(self, data: bytes) -> int:
        """Of a token in the vocabulary; NONE where `data` is none."""
        code = hash(data) & 0xFFFF_FFFF_FFFF_FFFF
        slot, mark = code % SLOTS, code >> RANK_BITS
        table = self._table
        while entry := table[slot]:
            if entry >> RANK_BITS == mark:
                return int(entry & (NONE - 1))
            slot += 1
        return NONE

    def _merged(self, data: bytes) -> int:
        """Into how many tokens the bytes of one piece are merged."""
        rank = self._rank
        if rank(data) < NONE:
            return 1
        bounds = list(range(len(data) + 1))
        ranks = [rank(data[i : i + 2]) for i in range(len(data) - 1)]  # of each part together with the next
        while ranks and (least := min(ranks)) < NONE:
            at = ranks.index(least)
            del bounds[at + 1], ranks[at]
            if at < len(ranks):
                ranks[at] = rank(data[bounds[at] : bounds[at + 2]])
            if at:
                ranks[at - 1] = rank(data[bounds[at - 1] : bounds[at + 1]])
        return len(bounds) - 1


def _parts(data: bytes) -> Iterator[bytes]:
    """At most LONGEST_PIECE bytes each, whole characters."""
    start = 0
    while start < len(data):
        end = start + LONGEST_PIECE
        while end < len(data) and data[end] & 0xC0 == 0x80:
            end -= 1
        yield data[start:end]
        start = end


# the vocabulary


def _vocabulary(name: str) -> Iterator[tuple[list[bytes], NDArray[np.uint64]]]:
    """Tokens and their ranks, some at a time. Raises ConfigError."""
    spec = importlib.util.find_spec("bpe_openai")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    files = [file for folder in folders if (file := Path(folder) / "data" / f"{name}.tiktoken.gz").is_file()]
    if not files:
        raise ConfigError(f"tokenizer: {name} needs the package bpe-openai")
    with gzip.open(files[0]) as lines:
        while some := list(islice(lines, LINES_AT_ONCE)):
            fields = b"".join(some).split()
            yield [a2b_base64(token) for token in fields[::2]], np.array(fields[1::2]).astype(np.uint64)


def _table(vocabulary: Iterator[tuple[list[bytes], NDArray[np.uint64]]]) -> NDArray[np.uint64]:
    """An open hash table with linear probing: in each slot 46 bits of a token's hash and its rank, or 0.

    Entries are in the order of the slots they belong to, each in its own or the next that is free; there is always a
    free one at the end. Tokens with the same 46 bits near each other would be one, and 46 bits that are all 0 none: the
    chance of either is below 1 in 100 million.
    """
    codes, ranks = [], []
    for tokens, of_rank in vocabulary:
        codes.append(np.fromiter(map(hash, tokens), np.int64, len(tokens)).view(np.uint64))
        ranks.append(of_rank)
    code, rank = np.concatenate(codes), np.concatenate(ranks)
    own = (code % np.uint64(SLOTS)).astype(np.int64)
    order = np.argsort(own, kind="stable")
    number = np.arange(len(order))
    slots = number + np.maximum.accumulate(own[order] - number)
    table = np.zeros(max(SLOTS, int(slots[-1]) + 1) + 1, np.uint64)
    bits = np.uint64(RANK_BITS)
    table[slots] = (code[order] >> bits << bits) | rank[order]
    return table


# classes of characters


def _with_classes(expression: str, classes: Mapping[str, str]) -> str:
    """`expression` with the names of classes, inside brackets, replaced by what is in them."""
    return re.sub(
        r"(\[\^?(?:\\r\\n)?)([LulNS]+)\]",
        lambda found: found[1] + "".join(classes[name] for name in found[2]) + "]",
        expression,
    )


@cache
def _classes() -> Mapping[str, str]:
    """The classes of Unicode's characters, as what stands inside brackets; by this Python's edition of Unicode."""
    runs: dict[str, list[str]] = {name: [] for name in "LulN"}
    at = 0
    for category, group in groupby(unicodedata.category(chr(code)) for code in range(SCANNED)):
        start, at = at, at + sum(1 for _ in group)
        for name, categories in _CATEGORIES.items():
            if category in categories:
                runs[name].append(f"{re.escape(chr(start))}-{re.escape(chr(at - 1))}")
    han = f"{chr(SCANNED)}-{chr(0x3FFFF)}"
    classes = {name: "".join(found) + ("" if name == "N" else han) for name, found in runs.items()}
    return classes | {"S": _SPACE}


_CATEGORIES = {
    "L": ("Lu", "Lt", "Lm", "Lo", "Ll"),
    "u": ("Lu", "Lt", "Lm", "Lo", "Mn", "Mc", "Me"),
    "l": ("Ll", "Lm", "Lo", "Mn", "Mc", "Me"),
    "N": ("Nd", "Nl", "No"),
}
