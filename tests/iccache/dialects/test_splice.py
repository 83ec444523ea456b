"""Edits of JSON bytes against edits of what the bytes mean."""

from __future__ import annotations

import json
import time
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iccache.dialects.splice import Document, elements, members, replace_member

SPACE = st.sampled_from(["", "", " ", "\n  ", "\t\r\n"])
TEXT = st.text('ab"\\/[]{}:,\n\x00\u2028é\U0001f600', max_size=8)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.sampled_from(["1E40", "-0", "0.10", "1e-7", "12345678901234567890123"]),
    TEXT,
    st.sampled_from(["]}", '{"a":[', 'a\\"b', "[1,2]"]),
)


@st.composite
def strings(draw: st.DrawFn, text: str) -> str:
    """`text` as JSON, with whatever escapes one may use."""
    plain = json.dumps(text, ensure_ascii=draw(st.booleans()))
    if text and draw(st.booleans()):
        first = text[0]
        escaped = "".join(f"\\u{ord(c):04x}" if ord(c) < 0x10000 else c for c in first)
        plain = f'"{escaped}' + json.dumps(text[1:])[1:]
    return plain


@st.composite
def values(draw: st.DrawFn, depth: int = 2) -> str:
    kind = draw(st.sampled_from(["scalar", "array", "object"] if depth else ["scalar"]))
    if kind == "array":
        return draw(arrays(depth - 1))[0]
    if kind == "object":
        pairs = [(draw(TEXT), draw(values(depth - 1))) for _ in range(draw(st.integers(0, 3)))]
        return draw(objects(pairs))
    value = draw(SCALARS)
    return draw(strings(value)) if isinstance(value, str) and not _number(value) else _plain(value)


@st.composite
def arrays(draw: st.DrawFn, depth: int = 1) -> tuple[str, list[str]]:
    """An array and its elements as they are written."""
    items = [draw(values(depth)) for _ in range(draw(st.integers(0, 4)))]
    spaced = [draw(SPACE) + item + draw(SPACE) for item in items]
    return "[" + (",".join(spaced) or draw(SPACE)) + "]", items


@st.composite
def objects(draw: st.DrawFn, pairs: list[tuple[str, str]]) -> str:
    written = [
        f"{draw(SPACE)}{draw(strings(key))}{draw(SPACE)}:{draw(SPACE)}{value}{draw(SPACE)}" for key, value in pairs
    ]
    return "{" + (",".join(written) or draw(SPACE)) + "}"


@st.composite
def documents(draw: st.DrawFn) -> tuple[bytes, list[tuple[str, str]]]:
    """A document and its members as they are written, names repeating."""
    names = draw(st.lists(st.sampled_from(["model", "iccache", "messages", "x", 'q"\\', "é", ""]), max_size=6))
    pairs = [(name, draw(values())) for name in names]
    return (draw(SPACE) + draw(objects(pairs)) + draw(SPACE)).encode(), pairs


def _number(text: str) -> bool:
    return text in ("1E40", "-0", "0.10", "1e-7", "12345678901234567890123")


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def meaning(pairs: list[tuple[str, str]]) -> list[tuple[str, Any]]:
    return [(key, json.loads(value)) for key, value in pairs]


def read(document: bytes) -> list[tuple[str, Any]]:
    """All members, duplicates included. orjson must agree that it is JSON."""
    orjson.loads(document)
    found: list[tuple[str, Any]] = json.loads(document, object_pairs_hook=_Pairs)
    return [(key, _undo(value)) for key, value in found]


class _Pairs(list[Any]):
    pass


def _undo(value: Any) -> Any:
    if isinstance(value, _Pairs):
        return {key: _undo(inner) for key, inner in value}
    return [_undo(v) for v in value] if isinstance(value, list) else value


@given(documents())
def test_members_are_found(case: tuple[bytes, list[tuple[str, str]]]) -> None:
    source, pairs = case
    found = [(m.key, source[m.value.start : m.value.end].decode()) for m in members(source)]
    assert found == pairs


@given(arrays())
def test_elements_are_found(case: tuple[str, list[str]]) -> None:
    source, items = case[0].encode(), case[1]
    assert [source[s.start : s.end].decode() for s in elements(source, 0)] == items


@given(documents(), st.sampled_from(["model", "x", "absent"]))
def test_replace(case: tuple[bytes, list[tuple[str, str]]], key: str) -> None:
    source, pairs = case
    edited = replace_member(source, key, b'"new"')
    assert read(edited) == [(k, "new" if k == key else v) for k, v in meaning(pairs)]
    rest = source
    for member in reversed([m for m in members(source) if m.key == key]):
        rest = rest[: member.value.start] + b'"new"' + rest[member.value.end :]
    assert edited == rest


@given(documents(), st.sampled_from(["iccache", "model", "absent"]))
def test_remove(case: tuple[bytes, list[tuple[str, str]]], key: str) -> None:
    source, pairs = case
    document = Document(source)
    document.remove(key)
    edited = document.bytes()
    assert read(edited) == [(k, v) for k, v in meaning(pairs) if k != key]
    kept = [source[m.start : m.value.end] for m in members(source) if m.key != key]
    assert [edited[m.start : m.value.end] for m in members(edited)] == kept
    if key not in [k for k, _ in pairs]:
        assert edited is source


@given(documents(), arrays(), st.integers(0, 6), st.integers(1, 3))
def test_insert(
    case: tuple[bytes, list[tuple[str, str]]], array: tuple[str, list[str]], index: int, count: int
) -> None:
    before, pairs = case
    whole = before.decode().rstrip()[:-1] + (", " if pairs else "") + f'"list" : {array[0]} ' + "}"
    source = whole.encode()
    document = Document(source)
    document.insert("list", index, [b'{"new":1}'] * count)
    edited = document.bytes()
    items = [json.loads(v) for v in array[1]]
    expected = [*items[:index], *[{"new": 1}] * count, *items[index:]]
    assert read(edited) == [*meaning(pairs), ("list", expected)]
    inserted = b",".join([b'{"new":1}'] * count)
    assert edited.count(inserted) == 1
    left, right = edited.split(inserted)
    assert source in (left + right, left.removesuffix(b",") + right, left + right.removeprefix(b","))


@given(documents(), arrays(), st.integers(0, 6))
def test_all_at_once(case: tuple[bytes, list[tuple[str, str]]], array: tuple[str, list[str]], index: int) -> None:
    before, pairs = case
    source = (before.decode().rstrip()[:-1] + (", " if pairs else "") + f'"list" : {array[0]} ' + "}").encode()
    document = Document(source)
    document.remove("iccache")
    document.replace("model", b'"m"')
    document.insert("list", index, [b"0"])
    items = [json.loads(v) for v in array[1]]
    kept = [(k, "m" if k == "model" else v) for k, v in meaning(pairs) if k != "iccache"]
    assert read(document.bytes()) == [*kept, ("list", [*items[:index], 0, *items[index:]])]


def test_escaped_keys_are_the_same_keys() -> None:
    assert replace_member(b'{"mod\\u0065l":1, "model":2}', "model", b"3") == b'{"mod\\u0065l":3, "model":3}'


def test_insert_goes_to_the_list_that_counts() -> None:
    source = b'{"a":[1],"a":[2]}'
    document = Document(source)
    document.insert("a", 0, [b"0"])
    assert document.bytes() == b'{"a":[1],"a":[0,2]}'


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (b'{"x":1}', b"{}"),
        (b'{ "x" : 1 }', b"{  }"),
        (b'{"x":1,"a":2}', b'{"a":2}'),
        (b'{"a":2 , "x":1}', b'{"a":2}'),
        (b'{"a":2,"x":1,"b":3}', b'{"a":2,"b":3}'),
        (b'{"x":1,"a":2,"x":3,"x":4,"b":5,"x":6,"x":7}', b'{"a":2,"b":5}'),
    ],
)
def test_removing_takes_one_comma(source: bytes, expected: bytes) -> None:
    document = Document(source)
    document.remove("x")
    assert document.bytes() == expected


@pytest.mark.parametrize("text", ["word " * 40_000, 'say "this"\n' * 18_000, "é\U0001f600" * 30_000])
def test_a_long_prompt_is_jumped_over(text: str) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": text}]
    source = orjson.dumps({"model": "a", "messages": messages, "iccache": {}, "tools": [{"x": [1, 2]}] * 50})
    best = looked_at = 1.0
    for _ in range(5):
        began = time.thread_time()
        assert sum(1 for byte in source if byte == 0) == 0  # what looking at every byte takes, at the least
        looked_at = min(looked_at, time.thread_time() - began)
        began = time.thread_time()
        document = Document(source)
        document.remove("iccache")
        document.replace("model", b'"b"')
        document.insert("messages", 1, [b"{}"])
        document.bytes()
        best = min(best, time.thread_time() - began)
    assert best < 5 * looked_at  # understanding every byte in Python takes many times that
