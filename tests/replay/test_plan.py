from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iccache import config
from iccache.errors import ConfigError
from iccache.examples.credit import GAIN_STEP
from replay import plan
from replay.doubt import Doubt
from replay.plan import Models
from replay.prices import Message, Prompt, most_nusd, nusd
from replay.store import Record, open_replay_store
from tests.factories import AT, make_example
from tests.replay.world import make_settings

TEACHER = config.Backend(
    name="large",
    base_url="http://x",
    model="m",
    usd_per_million_input_tokens=1,
    usd_per_million_output_tokens=4,
)
FREE = config.Backend(name="free", base_url="http://x", model="m")
MODELS = Models(TEACHER, TEACHER)


def record(id: str = "e1", **given: Any) -> Record:
    """An example of which nothing is known."""
    fields: dict[str, Any] = {
        **{"tokens": 100, "system_bytes": 0, "request_bytes": 200, "answer_bytes": 200},
        **{"credit": 0.0, "credited_quality": 0.0, "gain": 0.0, "own_quality": None, "replays": 0, "uses": 0},
        "at": AT,
    }
    return Record(id=id, **{**fields, **given})


def ranked(*records: Record, models: Models = MODELS, **settings: Any) -> list[str]:
    return [c.id for c in plan.rank(records, config.Replay(**settings), models, now=AT)]


def test_the_order_is_descending_gain() -> None:
    gains = {"a": 0.2, "b": 0.9, "c": 0.5}
    assert ranked(*(record(id, gain=g) for id, g in gains.items())) == ["b", "c", "a"]


def test_for_the_same_gain_the_cheaper_one_goes_first_unless_all_is_free() -> None:
    long, short = record("long", gain=0.5, answer_bytes=2000), record("short", gain=0.5)
    assert ranked(long, short) == ["short", "long"]
    assert ranked(long, short, models=Models(FREE, FREE)) == ["long", "short"]  # by name


def test_of_two_that_go_as_badly_the_doubted_one_goes_first() -> None:
    rows = [record("trusted", gain=0.5), record("doubted", gain=0.4), record("unknown", gain=0.5)]
    doubts = {"trusted": Doubt(0.1), "doubted": Doubt(0.9)}

    found = plan.rank(rows, config.Replay(), MODELS, now=AT, doubts=doubts)

    assert [c.id for c in found] == ["doubted", "unknown", "trusted"]
    assert found[0].doubt == Doubt(0.9)


def test_an_example_that_was_shown_is_asked_again_once_on_doubt_alone() -> None:
    rows = [record("shown", uses=3), record("unused"), record("again", uses=3, replays=1), record("good", uses=3)]
    doubts = {row.id: Doubt(0.9) for row in rows} | {"good": Doubt(0.4)}

    assert [c.id for c in plan.rank(rows, config.Replay(), MODELS, now=AT, doubts=doubts)] == ["shown"]


def test_rounds_that_found_nothing_lower_the_hope() -> None:
    assert ranked(record("tried", gain=0.5, replays=2), record("new", gain=0.3)) == ["new", "tried"]


@pytest.mark.parametrize(
    "known",
    [
        {},  # never used, nothing known
        {"own_quality": 0.5},
        {"own_quality": 0.8},
        {"own_quality": 1.0, "gain": 0.9},  # users approved
        {"gain": 0.9, "replays": 5},
        {"credit": 3.0, "credited_quality": 3.0},  # never did harm
        {"gain": 0.0005},
        {"gain": 0.9, "tokens": 8192},  # leaves no room in the window
    ],
)
def test_what_is_not_worth_asking_again(known: dict[str, Any]) -> None:
    assert ranked(record(**known)) == []


@pytest.mark.parametrize(
    ("known", "need"),
    [
        ({"gain": 0.4}, 0.4),
        ({"own_quality": 0.2}, 0.1 * 0.8),  # never used, but known to be bad
        ({"credit": 1.0, "credited_quality": 0.25}, 0.1 * 0.75 * GAIN_STEP),
        ({"credit": 1.0, "credited_quality": 0.0, "gain": 0.3, "own_quality": 0.0}, 0.3),
    ],
)
def test_need(known: dict[str, Any], need: float) -> None:
    assert plan.need(record(**known)) == pytest.approx(need)
    assert ranked(record(**known)) == ["e1"]


def test_where_the_student_is_the_cheapest_its_failures_still_count() -> None:
    """Its relative cost is 0, and so is the gain."""
    failed = record("failed", credit=2.0, credited_quality=0.0)
    went_well = record("well", credit=2.0, credited_quality=1.8)
    assert ranked(went_well, failed) == ["failed", "well"]


def test_the_rounds_of_a_life_are_the_settings() -> None:
    assert ranked(record(gain=0.9, replays=1), max_rounds=1) == []
    assert ranked(record(gain=0.9, replays=1), max_rounds=2) == ["e1"]


def test_a_limit_takes_the_best() -> None:
    records = [record(f"e{n}", gain=n / 10) for n in range(1, 10)]
    assert [c.id for c in plan.rank(records, config.Replay(), MODELS, limit=2, now=AT)] == ["e9", "e8"]
    assert plan.rank(records, config.Replay(), MODELS, limit=0, now=AT) == []


@given(
    system=st.text(max_size=50),
    request=st.text(min_size=1, max_size=200),
    old=st.text(max_size=200),
    tokens=st.integers(1, 4000),
    samples=st.integers(1, 3),
)
def test_the_most_covers_every_reservation_of_a_round(
    system: str, request: str, old: str, tokens: int, samples: int
) -> None:
    """With new answers of at most four bytes a token: what is planned is reserved, and no more."""
    sizes = [len(text.encode()) for text in (system, request, old)]
    output = plan.output_tokens(tokens, sizes[0], TEACHER)
    assert output is not None
    row = record(tokens=tokens, system_bytes=sizes[0], request_bytes=sizes[1], answer_bytes=sizes[2])
    answer = Prompt((Message("system", system), Message("user", request)), output, 0.0)
    new = "x" * (4 * output)
    longest = max((old, new), key=len)
    question = Message("user", plan.judge.prompt(f"{system}\n\n{request}", longest, new))
    judged = Prompt((question,), plan.judge.VERDICT_TOKENS, 0.0)
    reserved = samples * (most_nusd(TEACHER, answer) + 2 * most_nusd(TEACHER, judged))
    assert reserved <= plan.most_nusd(row, samples, MODELS, output)


@given(st.floats(0, 1000), st.floats(0, 1000), st.integers(0, 10**6), st.integers(0, 10**6))
def test_prices_are_rounded_up_and_by_less_than_a_nanodollar(p_in: float, p_out: float, given: int, made: int) -> None:
    backend = config.Backend(
        name="b", base_url="http://x", model="m", usd_per_million_input_tokens=p_in, usd_per_million_output_tokens=p_out
    )
    exact = (p_in * given + p_out * made) * 1000
    assert exact <= nusd(backend, given, made) <= exact + 1


def test_what_a_budget_covers() -> None:
    candidates = plan.rank([record(f"e{n}", gain=0.5) for n in range(5)], config.Replay(), MODELS, now=AT)
    most = candidates[0].most_nusd
    assert [plan.covered(candidates, budget) for budget in (0, most - 1, most, 3 * most, 99 * most)] == [0, 0, 1, 3, 5]


def make_backends(**dialects: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "base_url": "http://x",
            "model": name,
            "usd_per_million_output_tokens": price,
            "dialects": spoken,
        }
        for price, (name, spoken) in enumerate(dialects.items())
    ]


def test_the_dearest_teacher_is_asked_and_the_dearest_backend_judges() -> None:
    spoken = ["chat", "messages"]
    settings = config.parse({"backends": make_backends(a=spoken, b=spoken, c=spoken)})
    assert [b.name for b in plan.models(settings)[:2]] == ["c", "c"]
    settings = config.parse({"backends": make_backends(a=spoken, b=spoken), "judge": {"backend": "a"}})
    assert [b.name for b in plan.models(settings)[:2]] == ["b", "a"]


@pytest.mark.parametrize(
    ("backends", "judge"),
    [
        (make_backends(a=["messages"]), None),
        (make_backends(a=["chat"], b=["messages"]), None),  # b is the teacher
        (make_backends(a=["messages"], b=["chat"]), "a"),
    ],
)
def test_who_does_not_speak_chat_cannot_be_asked(backends: list[dict[str, Any]], judge: str | None) -> None:
    with pytest.raises(ConfigError, match="chat"):
        plan.models(config.parse({"backends": backends, "judge": {"backend": judge} if judge else {}}))


def test_records_come_from_the_store_without_those_of_which_nothing_bad_is_known(tmp_path: Path) -> None:
    store = open_replay_store(make_settings(tmp_path, "http://127.0.0.1:9"))
    stats = make_example().stats
    store.admit(make_example("bad", system="é", request="req", answer="ans", stats=stats._replace(gain=0.5)))
    store.admit(make_example("low", stats=stats._replace(own_quality=0.1)))
    store.admit(make_example("new"))
    store.admit(make_example("other", tenant="u", stats=stats._replace(gain=0.5)))

    found = {r.id: r for r in store.records("t")}

    assert sorted(found) == ["bad", "low"]
    assert found["bad"][1:5] == (12, 2, 3, 3)
    assert sorted(r.id for r in store.records()) == ["bad", "low", "other"]
