"""Server-sent events, listened to while they pass.

Bytes are forwarded by others, untouched; this only understands them. Lines end at CR, LF or CRLF and nowhere else: the
other things that `str.splitlines` splits at (U+2028, NEL, form feed) are text.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_EVENT_BYTES = 16 * 1024 * 1024
_LINE_END = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"


class Event(NamedTuple):
    name: str  # "message" unless the stream names it
    data: bytes  # lines joined by LF


class Tap:
    """Events out of bytes, however they are cut.

    An event longer than `max_bytes` makes it give up: `gave_up` is then True and no more events come.
    """

    def __init__(self, max_bytes: int = MAX_EVENT_BYTES) -> None:
        self.gave_up = False
        self._max_bytes = max_bytes
        self._pieces: list[bytes] = []  # of the line that has not ended yet
        self._started = False
        self._skip_lf = False  # the last line ended at a CR: an LF right after it belongs to that end
        self._size = 0  # bytes held, of the event so far
        self._name = ""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that `chunk` completes."""
        if self.gave_up or not chunk:
            return []
        if self._started and not self._skip_lf and not self._size and len(chunk) <= self._max_bytes:
            whole = _whole_events(chunk)
            if whole is not None:
                return whole
        if self._skip_lf:
            self._skip_lf = False
            chunk = chunk.removeprefix(b"\n")
        events: list[Event] = []
        at = 0
        for end in _LINE_END.finditer(chunk):
            self._hold(chunk[at : end.start()])
            at = end.end()
            if self.gave_up:
                return events
            event = self._line(self._take())
            if event:
                events.append(event)
        self._skip_lf = at == len(chunk) and chunk.endswith(b"\r")
        self._hold(chunk[at:])
        return events

    def _hold(self, piece: bytes) -> None:
        if not piece:
            return
        self._size += len(piece)
        self._pieces.append(piece)
        if self._size > self._max_bytes:
            self.gave_up = True
            self._pieces, self._data = [], []

    def _take(self) -> bytes:
        line = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces = []
        if not self._started:
            self._started = True
            line = line.removeprefix(_BOM)
        return line

    def _line(self, line: bytes) -> Event | None:
        if not line:
            return self._dispatch()
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
        elif field == b"event":
            self._name = value.decode("utf-8", "replace")
        else:
            self._size -= len(line)  # comments (an empty field), id, retry: not kept
        return None

    def _dispatch(self) -> Event | None:
        event = Event(self._name or "message", b"\n".join(self._data)) if self._data else None
        self._name, self._data, self._size = "", [], 0
        return event


def _whole_events(chunk: bytes) -> list[Event] | None:
    """The events in `chunk` where it is what nearly all are: unnamed events of one line each, none of them cut."""
    if not chunk.endswith(b"\n\n") or b"\r" in chunk:
        return None
    events = []
    for block in chunk[:-2].split(b"\n\n"):
        if not block.startswith(b"data: ") or b"\n" in block:
            return None
        events.append(Event("message", block[6:]))
    return events
