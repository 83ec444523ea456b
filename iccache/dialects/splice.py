"""Surgery on JSON bytes: whatever is not edited survives byte for byte.

Nothing here validates. A document comes from whoever has parsed it already, so the scanner only has to find where
values end: it jumps over strings and scalars in C and stops at brackets alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import orjson

_SPACE = re.compile(rb"[ \t\n\r]*+")
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_SCALAR = re.compile(rb"[^ \t\n\r,\]}]++")
_TO_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+', re.DOTALL)
_OPENING = b"[{"
_WITHIN = rb'(?:[^"\[\]{}]++|"[^"\\]*+(?:\\.[^"\\]*+)*+"%s)*+'
_FLAT = rb"[\[{]" + _WITHIN % b"" + rb"[\]}]"  # holds no other
_SHALLOW = re.compile(
    rb"[\[{]" + _WITHIN % (b"|" + _FLAT) + rb"[\]}]", re.DOTALL
)  # holds flat ones: a list of messages
_SIMPLE = re.compile(  # a member whose key has no escapes and whose value is not deep, and the comma that follows
    rb'"([^"\\]*+)"[ \t\n\r]*+:[ \t\n\r]*+('
    + rb"|".join([_STRING.pattern, rb'[^ \t\n\r,\]}\[{"]++', _SHALLOW.pattern])
    + rb")[ \t\n\r]*+(?:,[ \t\n\r]*+)?+",
    re.DOTALL,
)
_NEXT = re.compile(rb"[ \t\n\r]*+(?:,[ \t\n\r]*+)?+")  # what is between one element and the next, or the end
_COLON = re.compile(rb"[ \t\n\r]*+:[ \t\n\r]*+")


class Span(NamedTuple):
    """Where one value stands: document[start:end]."""

    start: int
    end: int


class Member(NamedTuple):
    """One member of an object, from the quote that opens its key."""

    key: str
    start: int
    value: Span


class Document:
    """A valid JSON object, with edits. An edit of a member that is not there does nothing.

    Where a key occurs more than once, parsers disagree about which one counts: replacing and removing treat all of
    them, inserting treats the last, which is the one that orjson reads. Edits must not touch the same member twice.
    """

    def __init__(self, source: bytes) -> None:
        self.source = source
        self.members = list(members(source))
        self._edits: list[tuple[Span, bytes]] = []

    def value(self, key: str) -> Span | None:
        """Where the value of the last member of that name stands."""
        return next((m.value for m in reversed(self.members) if m.key == key), None)

    def replace(self, key: str, value: bytes) -> None:
        self._edits += [(m.value, value) for m in self.members if m.key == key]

    def remove(self, key: str) -> None:
        """Take out every member of that name, each with one comma."""
        if key not in [m.key for m in self.members]:
            return
        kept = [i for i, m in enumerate(self.members) if m.key != key]
        last_kept = kept[-1] if kept else -1
        for i, member in enumerate(self.members[: last_kept + 1]):
            if member.key == key:
                self._edits.append((Span(member.start, self.members[i + 1].start), b""))
        tail = self.members[last_kept + 1 :]
        if tail:
            start = self.members[last_kept].value.end if kept else tail[0].start
            self._edits.append((Span(start, tail[-1].value.end), b""))

    def insert(self, key: str, index: int, items: Sequence[bytes]) -> None:
        """Put `items` into the array `key` before its element `index`, or at its end when it is shorter."""
        array = self.value(key)
        if array is None or not items:
            return
        joined = b",".join(items)
        at, i = array.start + 1, 0
        for i, element in enumerate(elements(self.source, array.start), 1):
            if i > index:
                self._edits.append((Span(element.start, element.start), joined + b","))
                return
            at = element.end
        self._edits.append((Span(at, at), b"," + joined if i else joined))

    def bytes(self) -> bytes:
        """The edited document; the very same object when there was no edit."""
        if not self._edits:
            return self.source
        pieces: list[bytes] = []
        at = 0
        for span, new in sorted(self._edits):
            pieces += (self.source[at : span.start], new)
            at = span.end
        pieces.append(self.source[at:])
        return b"".join(pieces)


def replace_member(source: bytes, key: str, value: bytes) -> bytes:
    """`source`, a valid JSON object, with another value for `key`."""
    document = Document(source)
    document.replace(key, value)
    return document.bytes()


def members(source: bytes) -> Iterator[Member]:
    """The members of the object that `source` is."""
    start = _skip_space(source, _skip_space(source, 0) + 1)
    while True:
        simple = _SIMPLE.match(source, start)
        if simple is not None:
            yield Member(simple[1].decode("utf-8", "surrogatepass"), start, Span(*simple.span(2)))
            start = simple.end()
            continue
        if source[start : start + 1] != b'"':
            return
        end = _end(source, start)
        value = _match(_COLON, source, end)
        member = Member(orjson.loads(source[start:end]), start, Span(value, _end(source, value)))
        yield member
        start = _match(_NEXT, source, member.value.end)


def elements(source: bytes, at: int) -> Iterator[Span]:
    """The elements of the array that begins at `at`."""
    start = _skip_space(source, at + 1)
    while source[start : start + 1] not in (b"]", b""):
        span = Span(start, _end(source, start))
        yield span
        start = _match(_NEXT, source, span.end)


def array(items: Iterable[bytes]) -> bytes:
    return b"[" + b",".join(items) + b"]"


def _skip_space(source: bytes, at: int) -> int:
    return _match(_SPACE, source, at)


def _end(source: bytes, at: int) -> int:
    """Where the value that begins at `at` ends."""
    first = source[at : at + 1]
    if first == b'"':
        return _match(_STRING, source, at)
    if first not in (b"[", b"{"):
        return _match(_SCALAR, source, at)
    shallow = _SHALLOW.match(source, at)
    if shallow is not None:
        return shallow.end()
    depth = 0
    while True:
        if source[at] in _OPENING:
            depth += 1
        else:
            depth -= 1
        at += 1
        if not depth:
            return at
        at = _match(_TO_BRACKET, source, at)


def _match(pattern: re.Pattern[bytes], source: bytes, at: int) -> int:
    """Where a match at `at` ends. Raises ValueError where there is none: the document was not valid."""
    found = pattern.match(source, at)
    if found is None:
        raise ValueError(f"not valid JSON at byte {at}")
    return found.end()
