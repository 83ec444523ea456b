"""Events out of bytes, however they are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iccache.dialects.sse import Event, Tap

ENDS = st.sampled_from([("\n", "\r\n"), ("\r\n", "\r"), ("\n",), ("\r",)])  # CR, then LF, would be one end
# what other parsers take for line ends, and what one might take for structure
TEXT = st.text(st.sampled_from(list("ab :{}é\u2028\u2029\x85\x0b\x0c\x1c\U0001f600")), max_size=8)


def fed(*chunks: bytes, max_bytes: int = 1 << 20) -> list[Event]:
    tap = Tap(max_bytes)
    return [event for chunk in chunks for event in tap.feed(chunk)]


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[Event]]:
    """A stream as the standard allows it, and the events it means."""
    written, events = draw(st.sampled_from(["", "\ufeff"])), []
    ends = st.sampled_from(draw(ENDS))
    for _ in range(draw(st.integers(0, 4))):
        lines, name = [], None
        data = draw(st.lists(TEXT, max_size=3))
        for line in data:
            space = " " if line.startswith(" ") or draw(st.booleans()) else ""
            lines.append(f"data:{space}{line}" if line or draw(st.booleans()) else "data")
        if draw(st.booleans()):
            name = draw(st.sampled_from(["ping", "response.created", ""]))
            lines.insert(draw(st.integers(0, len(lines))), f"event: {name}")
        for noise in draw(st.lists(st.sampled_from([": comment", ":", "id: 1", "retry: 10", "unknown"]), max_size=2)):
            lines.insert(draw(st.integers(0, len(lines))), noise)
        written += "".join(line + draw(ends) for line in lines) + draw(ends)
        if data:
            events.append(Event(name or "message", "\n".join(data).encode()))
    return written.encode(), events


@given(streams(), st.data())
def test_every_way_to_cut(case: tuple[bytes, list[Event]], data: st.DataObject) -> None:
    stream, events = case
    assert fed(stream) == events
    assert fed(*(stream[i : i + 1] for i in range(len(stream)))) == events
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert fed(*pieces) == events


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_line_ends(end: bytes) -> None:
    assert fed(b"data: a" + end + b"data: b" + end + end) == [Event("message", b"a\nb")]


def test_an_event_ends_as_soon_as_its_last_cr_is_here() -> None:
    tap = Tap()
    assert tap.feed(b"data: a\r\n\r") == [Event("message", b"a")]
    assert tap.feed(b"\ndata: b\r\n\r\n") == [Event("message", b"b")]


def test_one_space_is_the_formats_the_rest_is_text() -> None:
    assert fed(b"data:  a\n\ndata:b\n\n") == [Event("message", b" a"), Event("message", b"b")]


def test_what_is_cut_off_is_no_event() -> None:
    assert fed(b"data: a\n\ndata: b\n") == [Event("message", b"a")]


def test_too_long_an_event_is_given_up() -> None:
    tap = Tap(max_bytes=100)
    assert tap.feed(b"data: a\n\ndata: " + b"x" * 50) == [Event("message", b"a")]
    for _ in range(10):
        assert tap.feed(b"x" * 50) == []
    assert tap.gave_up
    assert tap.feed(b"\n\ndata: b\n\n") == []
    assert not tap._pieces
    assert not tap._data


def test_many_lines_of_one_event_are_counted_together() -> None:
    tap = Tap(max_bytes=100)
    for _ in range(30):
        tap.feed(b"data: 123456\n")
    assert tap.gave_up


def test_heartbeats_are_not_held() -> None:
    tap = Tap(max_bytes=100)
    for _ in range(1000):
        tap.feed(b": still here\n")
    assert not tap.gave_up
    assert tap.feed(b"data: a\n\n") == [Event("message", b"a")]
