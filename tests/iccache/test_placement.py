"""Where examples go, and what a request is expected to cost because of it."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iccache import config
from iccache.dialects.dialect import DIALECTS, Dialect
from iccache.plan import Directory, Plan
from iccache.price import EXPECTED_OUTPUT_TOKENS, cost, expected
from iccache.types import Ask, Exchange, Match, Shot, Usage
from iccache.warm import Warm
from router.load import load_bias
from router.policy import Threshold
from router.reward import load_prices, relative_cost
from router.types import Arm, price_order, request_order
from tests.factories import make_example, make_exchange

CHAT, RESPONSES, MESSAGES = (DIALECTS[p] for p in ("/v1/chat/completions", "/v1/responses", "/v1/messages"))
SHOT = Shot("shown?", "shown.")
U, A, S = "user", "assistant", "system"


@pytest.fixture(params=list(DIALECTS.values()), ids=lambda d: d.name)
def dialect(request: pytest.FixtureRequest) -> Dialect:
    found: Dialect = request.param
    return found


def key(dialect: Dialect) -> str:
    return "input" if dialect is RESPONSES else "messages"


def ask(dialect: Dialect, messages: list[Any], **fields: Any) -> Ask:
    return dialect.read(orjson.dumps({"model": "auto", key(dialect): messages, **fields}))


def composed(dialect: Dialect, messages: list[Any], placement: config.Placement) -> list[Any]:
    """The messages that go upstream; None where an example's turn is."""
    body = dialect.compose(ask(dialect, messages), model="m", shots=[SHOT], placement=placement)
    return [None if m.get("content") in SHOT else m for m in json.loads(body)[key(dialect)]]


def say(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]


def tools(dialect: Dialect) -> list[Any]:
    """A tool is called and answers."""
    if dialect is CHAT:
        calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
        return [
            {"role": A, "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "c", "content": "sunny"},
        ]
    if dialect is RESPONSES:
        return [
            {"type": "reasoning", "id": "r", "summary": []},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "sunny"},
        ]
    return [
        {"role": A, "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {}}]},
        {"role": U, "content": [{"type": "tool_result", "tool_use_id": "c", "content": "sunny"}]},
    ]


@pytest.mark.parametrize(
    ("roles", "start", "end"),
    [
        ([U], 0, 0),
        ([S, U], 1, 1),
        ([S, "developer", U], 2, 2),
        ([S, U, A, U], 1, 3),
        ([U, A, U, A, U], 0, 4),
        ([U, A, U, U], 0, 2),  # one question in two messages
        ([U, A, S, U], 0, 3),
        ([S, U, A, U, S], 1, 3),  # an instruction after the question
        ([S, U, U], 1, 1),
    ],
)
def test_where(dialect: Dialect, roles: list[str], start: int, end: int) -> None:
    given = say(*roles)
    assert composed(dialect, given, "start") == [*given[:start], None, None, *given[start:]]
    assert composed(dialect, given, "end") == [*given[:end], None, None, *given[end:]]


def test_never_between_a_tools_call_and_its_result(dialect: Dialect) -> None:
    before = [*say(U), *tools(dialect)]
    for last in (say(U), say(A, U)):
        assert composed(dialect, [*before, *last], "end") == [*before, *last[:-1], None, None, last[-1]]


@pytest.mark.parametrize("known", list(DIALECTS.values()), ids=lambda d: d.name)
@given(turns=st.lists(st.sampled_from([S, "developer", U, A, "tools"]), max_size=8))
def test_any_conversation(known: Dialect, turns: list[str]) -> None:
    """What was said before the last question is sent as it was, to the byte; and nothing follows the question."""
    given: list[Any] = []
    for turn in turns:
        given += tools(known) if turn == "tools" else say(turn)
    given += say(U)
    asked = ask(known, given)
    assert asked.bypass is None
    for placement in ("start", "end"):
        sent = composed(known, given, placement)
        assert [m for m in sent if m is not None] == given
        at = sent.index(None)
        assert sent[at + 1] is None and sent.count(None) == 2
        assert sent[-1] == given[-1]
        if at:
            calls = given[at - 1].get("tool_calls") or given[at - 1].get("type") == "function_call"
            blocks = given[at - 1].get("content")
            assert not calls and not (isinstance(blocks, list) and blocks[0]["type"] == "tool_use")
    with_end = known.compose(asked, model=None, shots=[SHOT], placement="end")
    first = with_end.index(b"shown?") - 60
    assert with_end[: max(0, first)] == asked.body[: max(0, first)]


def test_text_input_is_one_turn() -> None:
    asked = RESPONSES.read(b'{"model":"auto","input":"hi"}')
    bodies = {RESPONSES.compose(asked, model=None, shots=[SHOT], placement=p) for p in ("start", "end")}
    assert len(bodies) == 1


def test_what_was_said_before(dialect: Dialect) -> None:
    assert ask(dialect, say(S, U)).before == ""
    assert ask(dialect, say(S, U, A, U)).before == "system 0\nuser 1\nassistant 2"
    assert ask(dialect, say(U, A, U, U)).before == "user 0\nassistant 1"
    assert ask(dialect, say(S, U)).long_before_chars == 0
    assert ask(dialect, say(S, U, A, U)).long_before_chars == len("system 0")
    assert ask(dialect, say(S, U, A, U, A, U)).long_before_chars == len("system 0\nuser 1\nassistant 2")


# ---- who may have the conversation in its prompt cache


def answered(backend: str, answer: str, complete: bool = True) -> Exchange:
    return make_exchange(backend=backend, answer=answer, complete=complete)


def test_the_backend_that_answered_the_turn_before_is_known(dialect: Dialect) -> None:
    warm = Warm()
    first = ask(dialect, say(S, U))
    assert warm.backend("t", first) is None
    warm.remember("t", first, answered("small", "assistant 2"))
    second = ask(dialect, say(S, U, A, U))
    assert warm.backend("t", second) == "small"
    assert warm.backend("another", second) is None
    quiet = ask(dialect, say(S, U), iccache={"store": "no"}, odd=1)
    fresh = Warm()
    fresh.remember("t", quiet, answered("small", "assistant 2"))
    assert fresh.backend("t", second) is None
    assert warm.backend("t", ask(dialect, [*say(S, U), {"role": A, "content": "edited"}, *say(U)])) is None
    warm.remember("t", second, answered("large", "broken", complete=False))
    assert warm.backend("t", ask(dialect, [*say(S, U, A, U), {"role": A, "content": "broken"}, *say(U)])) is None


def test_old_conversations_are_forgotten() -> None:
    warm = Warm(kept=4)
    asks = [CHAT.read(orjson.dumps({"model": "m", "messages": [{"role": U, "content": str(i)}]})) for i in range(5)]
    messages = [[{"role": U, "content": str(i)}, {"role": A, "content": "yes"}, *say(U)] for i in range(5)]
    known = []
    for asked in asks:
        warm.remember("t", asked, answered("small", "yes"))
        known.append("".join(str(i) for i, m in enumerate(messages) if warm.backend("t", ask(CHAT, m))))
    assert known == ["0", "01", "012", "23", "234"]
    warm.remember("t", asks[2], answered("large", "yes"))
    assert warm.backend("t", ask(CHAT, messages[2])) == "large"


# ---- what a request costs

PRICES = st.floats(0, 100, allow_nan=False)


def backend(name: str = "b", given: float = 1.0, made: float = 4.0, again: float | None = None) -> config.Backend:
    return config.Backend(
        name=name,
        base_url="http://127.0.0.1:1/v1",
        model=name,
        usd_per_million_input_tokens=given,
        usd_per_million_output_tokens=made,
        usd_per_million_cached_input_tokens=again,
    )


def test_the_cost_of_an_answer_by_hand() -> None:
    assert cost(backend(), Usage(1000, 10)) == pytest.approx((1000 * 1 + 10 * 4) / 1e6)
    assert cost(backend(), Usage(1000, 10, cached=600)) == pytest.approx((1000 * 1 + 10 * 4) / 1e6)
    assert cost(backend(again=0.1), Usage(1000, 10, cached=600)) == pytest.approx((400 + 60 + 40) / 1e6)
    assert cost(backend(again=0.1), Usage(10, 0, cached=600)) == pytest.approx(1 / 1e6)


@given(
    given=PRICES,
    made=PRICES,
    discount=st.none() | st.floats(0, 1),
    tokens=st.integers(0, 10_000),
    example=st.integers(0, 5_000),
    covered=st.integers(0, 20_000),
    most=st.none() | st.integers(1, 5_000),
)
def test_what_a_request_is_expected_to_cost(
    given: float, made: float, discount: float | None, tokens: int, example: int, covered: int, most: int | None
) -> None:
    it = backend(given=given, made=made, again=None if discount is None else given * discount)

    def usd(**changes: int) -> float:
        said = {"request_tokens": tokens, "example_tokens": example, "covered_tokens": covered} | changes
        return expected(it, **said, most_output=most)

    output = min(EXPECTED_OUTPUT_TOKENS, most or EXPECTED_OUTPUT_TOKENS)
    plain = usd(example_tokens=0, covered_tokens=0)
    assert plain == pytest.approx(cost(it, Usage(tokens, output)))
    assert usd(covered_tokens=0) - plain == pytest.approx(example * given / 1e6, abs=1e-12)  # the full price
    assert 0 <= usd() <= usd(covered_tokens=0) + 1e-12
    assert usd() >= usd(covered_tokens=tokens) - 1e-12  # no more is spared than the request is long
    if discount is None:
        assert usd() == usd(covered_tokens=0)


def plan(warm: str | None = None, shown: int = 0, **more: Any) -> Plan:
    settings = config.Config(backends=[backend("small", 1, 4, 0.1), backend("large", 10, 40, 1)])
    turns = [{"role": S, "content": "s" * 100}, *say(U, A, U, A), {"role": U, "content": "q" * 100}]
    made = Directory(settings).plan(ask(CHAT, turns, max_tokens=10), None, 1000, warm)
    matches = tuple(Match(make_example(f"e{i}", tokens=100), 0.5, 0.5) for i in range(shown))
    return made if not shown else Plan(**{f: getattr(made, f) for f in made.__slots__} | {"shown": {"small": matches}})


def test_a_warm_prompt_cache_is_priced_by_where_the_examples_go() -> None:
    small = backend("small", 1, 4, 0.1)
    cold = plan(shown=2).expected_usd(small, "end")
    assert cold == pytest.approx((1000 + 2 * 108 + 10 * 4) / 1e6)
    start, end = (plan("small", shown=2).expected_usd(small, p) for p in ("start", "end"))
    assert end < start < cold  # start: the system prompt alone is where it was
    plain = [plan("small").expected_usd(small, p) for p in ("start", "end")]
    assert plain[0] == plain[1] < end - 2 * 108 / 1e6  # without examples all of the conversation is
    assert plan("large", shown=2).expected_usd(small, "end") == cold
    assert plan("small").covered == {
        "none": int(138 * 1000 / 239),
        "start": int(100 * 1000 / 239),
        "end": int(119 * 1000 / 239),
    }


# ---- what the router makes of it

ARMS = st.lists(st.tuples(PRICES, PRICES, st.booleans()), min_size=1, max_size=5).map(
    lambda rows: [Arm(str(i), p, t, list_price=listed) for i, (p, listed, t) in enumerate(rows)]
)


@given(ARMS)
def test_the_dearest_is_the_dearest_by_list_and_ties_go_by_list(arms: list[Arm]) -> None:
    order = price_order(arms)
    assert [arms[i].list_price for i in order] == sorted(a.list_price or 0.0 for a in arms)
    tried = request_order(arms)
    assert [arms[i].price for i in tried] == sorted(a.price for a in arms)
    for a, b in pairwise(tried):
        if arms[a].price == arms[b].price:
            assert order.index(a) < order.index(b)


@given(ARMS)
def test_under_load_nobody_counts_as_dearer_than_what_is_dearer_by_list_or_now(arms: list[Arm]) -> None:
    costs = relative_cost(load_prices(arms))
    assert list(costs[request_order(arms)]) == sorted(costs)
    assert costs[price_order(arms)[-1]] == costs.max()
    plain = [Arm(a.name, a.listed, a.is_teacher) for a in arms]
    assert load_prices(plain) == [a.price for a in plain]
    bias = load_bias(2.0, costs, 0.8, 0.5, 2.0)
    assert (bias >= 0).all() and bias.max() <= 0.5


def test_a_request_that_its_examples_make_dearer_than_the_teacher_goes_to_the_teacher() -> None:
    good = Threshold(lambda arm, row: 0.9, 0.5)
    x, none = np.zeros((2, 1)), np.zeros(2)
    cheap = [Arm("small", 1.0, list_price=1.0), Arm("large", 2.0, True, list_price=2.0)]
    dear = [Arm("small", 3.0, list_price=1.0), Arm("large", 2.0, True, list_price=2.0)]
    assert good.probabilities(x, cheap, none, 0.7).tolist() == [1.0, 0.0]
    assert good.probabilities(x, dear, none, 0.7).tolist() == [0.0, 1.0]
