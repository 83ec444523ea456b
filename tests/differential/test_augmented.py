"""With examples in the cache: what they are put between, and that nothing else is touched."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.differential.answers import scripts
from tests.differential.bodies import Body, Raw, bodies, exact
from tests.differential.pair import STORE_NOTHING, Pair, check_answer, pair
from tests.differential.test_differential import PATHS, steady
from tests.differential.wire import Received, Script

TAUGHT = {
    "What is the capital of France?": "Paris",
    "What is the capital of Spain?": 'Madrid, "the" city\n\u2028\\ data: [DONE]',
    "日本語のテキスト": "はい",
    "Write the number one hundred and twenty-three.": "123 🦙",
}
JSON = [("Content-Type", "application/json")]


@pytest.fixture(scope="module")
def p() -> Iterator[Pair]:
    with pair() as made:
        made.run(_teach(made))
        yield made


async def _teach(p: Pair) -> None:
    for i, (request, answer) in enumerate(TAUGHT.items(), 1):
        choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
        p.upstream.script = Script(200, JSON, [json.dumps({"choices": [choice]}).encode()])
        body = json.dumps({"model": "large", "messages": [{"role": "user", "content": request}]}).encode()
        await p.through("POST", "/v1/chat/completions", JSON, body)
        await p.world.until(p.world.examples, lambda count, wanted=i: count == wanted)
    await p.world.proxy.learner.catch_up()


@pytest.mark.parametrize("path", PATHS)
def test_examples_are_inserted_and_nothing_else_changes(p: Pair, path: str) -> None:
    seen: Counter[str] = Counter()

    @settings(steady, max_examples=80)
    @given(bodies(path), scripts(path), st.sampled_from(["small", "auto"]), st.sampled_from(["1", "2", "3"]))
    def compare(body: Body, script: Script, model: str, most: str) -> None:
        seen[p.run(_compare(p, path, body, script, model, most))] += 1

    compare()
    assert sum(seen[n] for n in "123") >= 8, seen
    assert seen["0"] > 0


async def _compare(p: Pair, path: str, body: Body, script: Script, model: str, most: str) -> str:
    """How many examples were shown."""
    p.upstream.script = script
    direct, _ = await p.direct("POST", path, JSON, body.text("small-model"))
    asked = [*JSON, ("x-iccache-examples", most), STORE_NOTHING]
    proxied, received = await p.through("POST", path, asked, body.text(model))
    check_answer(direct, proxied, script)
    shown = proxied.one("x-iccache-examples") or ""
    assert int(shown) <= int(most)
    assert len((proxied.one("x-iccache-example-ids") or "").split(",")) == max(int(shown), 1)
    for one in received:
        _check_request(path, body, one, int(shown) if one is received[-1] else None)
    await p.settled()
    return shown


def _check_request(path: str, body: Body, received: Received, shown: int | None) -> None:
    if b'"large-model"' in received.body:
        assert received.body == body.text("large-model")
        return
    original = body.text("small-model")
    if shown == 0 or received.body == original:
        assert received.body == original and not shown
        return
    key = "input" if path == "/v1/responses" else "messages"
    before, after = exact(original), exact(received.body)
    assert [name for name, _ in before] == [name for name, _ in after]
    for (name, was), (_, now) in zip(before, after, strict=True):
        if name != key:
            assert was == now
            continue
        was = was if isinstance(was, list) else [(("role", "user"), ("content", was))]
        inserted = (len(now) - len(was)) // 2
        assert inserted == shown if shown is not None else inserted >= 0
        first = _opening(was)
        assert now == was[:first] + now[first : first + 2 * inserted] + was[first:]
        _check_turns([dict(turn) for turn in now[first : first + 2 * inserted]])
    if not isinstance(dict(before)[key], str):
        _check_bytes(original, received.body)


def _opening(items: list[Any]) -> int:
    """The system and developer messages that open the conversation."""
    roles = [dict(item).get("role") if isinstance(item, tuple) else None for item in items]
    return next((i for i, role in enumerate(roles) if role not in ("system", "developer")), len(roles))


def _check_turns(turns: list[dict[str, Any]]) -> None:
    for asked, answered in zip(turns[::2], turns[1::2], strict=True):
        assert (asked["role"], answered["role"]) == ("user", "assistant")
        assert TAUGHT[asked["content"]] == answered["content"]
        assert set(asked) | set(answered) <= {"role", "content", "type"}


def _check_bytes(original: bytes, received: bytes) -> None:
    """One insertion, at one place."""
    assert _alike(original, received) + _alike(original[::-1], received[::-1]) >= len(original)


def _alike(a: bytes, b: bytes) -> int:
    """How many bytes they have in common, from the first on."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_the_checks_see_what_they_are_for() -> None:
    with pytest.raises(AssertionError):
        _check_bytes(b'{"a":1, "b":[]}', b'{"a":1,"b":[1]}')
    assert exact(b'{"a":1.50}') != exact(b'{"a":1.5}')
    assert exact(b'{"a":1,"a":2}') != exact(b'{"a":2}')
    assert exact(b'{"a":"\\u00e9"}') == exact('{"a":"é"}'.encode())
    assert exact(b"[12]") == [Raw("12")]
