from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iccache import config
from iccache.examples.traits import USUAL_QUALITY
from iccache.types import ExampleStats
from replay.calls import Pace
from replay.job import GREEDY, TEMPERATURE, Stop, temperature
from replay.ledger import LEASE_S, Ledger
from replay.prices import NUSD
from replay.store import Recovery
from tests.factories import make_example, make_exchange, make_feedback
from tests.fakes import Script
from tests.postgres import Server
from tests.replay.world import (
    BUDGET_USD,
    World,
    bad,
    examples_of,
    fill,
    make_settings,
    opened,
    replayed,
    run_once,
)


async def test_a_better_answer_replaces_and_the_report_equals_the_upstreams_bill(world: World, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(n, system="Be brief.") for n in range(4)])

    report = await replayed(settings)

    assert report.stopped is Stop.NOTHING_LEFT
    assert (report.considered, report.replayed, report.improved, report.kept) == (4, 4, 4, 0)
    assert (report.answers, report.judgements, report.unconfirmed_calls) == (4, 8, 0)
    assert report.answers == len(world.asked("teacher")) and report.judgements == len(world.asked("judge"))
    assert report.input_tokens == sum(call.input for call in world.billed)
    assert report.output_tokens == sum(call.output for call in world.billed)
    assert report.confirmed_nusd == world.billed_nusd(settings) > 0
    assert report.unconfirmed_nusd == 0
    for id, example in examples_of(settings).items():
        assert example.answer == f"q9 to {example.request}", id
        assert (example.backend, example.stats.replays, example.stats.gain) == ("large", 1, 0.0)
        assert example.tokens < 40


async def test_the_old_system_prompt_and_request_are_what_the_teacher_is_asked(world: World, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(0, system="Be brief.", request="2 + 2?")])

    await replayed(settings)

    asked = world.upstream.requests[0].json
    assert asked["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    assert asked["temperature"] == TEMPERATURE  # the same model gave the old answer
    assert asked["max_tokens"] >= 1024


@pytest.mark.parametrize(
    ("same_model", "round", "sample", "expected"),
    [(True, 1, 0, TEMPERATURE), (False, 1, 0, GREEDY), (False, 1, 1, TEMPERATURE), (False, 2, 0, TEMPERATURE)],
)
def test_only_the_first_answer_of_another_model_is_greedy(
    same_model: bool, round: int, sample: int, expected: float
) -> None:
    assert temperature(same_model, round, sample) == expected


async def test_a_worse_answer_never_replaces(world: World, tmp_path: Path) -> None:
    world.says = lambda question: f"q1 to {question}"
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(0)])

    report = await replayed(settings)

    assert (report.improved, report.kept) == (0, 1)
    (example,) = examples_of(settings).values()
    assert example.answer == "q3 of 0"
    assert example.stats.replays == 1 and example.stats.gain == pytest.approx(0.5)


async def test_the_best_of_old_and_several_samples_is_kept(world: World, tmp_path: Path) -> None:
    answers = iter(["q5 a", "q8 b", "q2 c", "q8 b", "q3 of 0"])
    world.says = lambda question: next(answers)
    settings = make_settings(tmp_path, world.upstream.base_url, replay={"samples": 5})
    fill(settings, [bad(0)])

    report = await replayed(settings)

    assert [e.answer for e in examples_of(settings).values()] == ["q8 b"]
    assert (report.answers, report.judgements) == (5, 6), "repeated answers are not judged again"


async def test_the_same_answer_needs_no_judge(world: World, tmp_path: Path) -> None:
    world.says = lambda question: "q3 of 0"
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(0)])

    report = await replayed(settings)

    assert (report.judgements, report.kept) == (0, 1)


@pytest.mark.parametrize(
    ("says", "answer", "quality"),
    [
        (["q9 a", "q9 a", "q9 a"], "q9 a", USUAL_QUALITY + 0.15 * (2 * 2 / 2.7 - 1)),  # the old one has 0.7 of a vote
        (["q3 of 0", "q3 of 0", "q3 of 0"], "q3 of 0", USUAL_QUALITY + 0.15),
        (["q9 a", "q8 b", "q7 c"], "q9 a", None),  # they do not agree, and a judge's word says nothing new
    ],
)
async def test_an_answer_that_the_samples_agree_on_is_as_good_as_a_teachers(
    world: World, tmp_path: Path, says: list[str], answer: str, quality: float | None
) -> None:
    """An example that was bettered begins its record anew, and those nobody looked at should not take its place."""
    answers = iter(says)
    world.says = lambda question: next(answers)
    settings = make_settings(tmp_path, world.upstream.base_url, replay={"samples": 3})
    fill(settings, [bad(0, backend="import")])

    await replayed(settings)

    (example,) = examples_of(settings).values()
    assert example.answer == answer
    assert example.stats.own_quality == (None if quality is None else pytest.approx(quality))


async def test_what_the_neighbours_agree_on_keeps_a_good_answer_from_a_teacher_that_errs(
    world: World, tmp_path: Path
) -> None:
    """Of two labels, the teacher says the wrong one twice and the right one once."""
    answers = iter(["no", "yes", "no"])
    world.says = lambda question: next(answers)
    settings = make_settings(tmp_path, world.upstream.base_url, replay={"samples": 3})
    peers = [make_example(f"p{n:02}", system="Yes or no?", answer="yes", backend="import") for n in range(30)]
    fill(settings, [*peers, bad(0, system="Yes or no?", answer="yes", backend="import")])

    report = await replayed(settings)

    assert (report.kept, report.judgements) == (1, 0), "1 + 0.7 or more for the old answer, and 1 for the neighbours"
    assert examples_of(settings)["e000"].answer == "yes"


@pytest.mark.parametrize("verdict", ["", "A", "B", "I like both", "ignore that. A is best"])
async def test_a_judge_that_is_junk_or_looks_at_the_place_changes_nothing(
    world: World, tmp_path: Path, verdict: str
) -> None:
    world.judges = lambda first, second: verdict
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(0)])

    report = await replayed(settings)

    assert (report.improved, report.kept) == (0, 1)
    assert report.as_json()["judge"]["position_bias"] == {"A": 1.0, "B": -1.0}.get(verdict)


@pytest.mark.parametrize(
    "script",
    [
        Script(answer="q9", finish_reason="length"),
        Script(answer="q9", finish_reason="content_filter"),
        Script(answer=" "),
        Script(answer="q9 <|im_end|>"),
        Script(answer="x" * 40_000),
    ],
)
async def test_an_answer_that_could_not_be_admitted_is_not_kept(world: World, tmp_path: Path, script: Script) -> None:
    world.upstream.by_model["teacher"] = script
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(0)])

    report = await replayed(settings)

    assert (report.refused, report.replayed, report.judgements) == (1, 0, 0)
    (example,) = examples_of(settings).values()
    assert example.answer == "q3 of 0" and example.stats.replays == 1


async def test_new_answers_are_redacted_before_they_are_written(world: World, tmp_path: Path) -> None:
    world.says = lambda question: "q9 write to jane.doe@example.com"
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(0)])

    await replayed(settings)

    assert [e.answer for e in examples_of(settings).values()] == ["q9 write to [EMAIL]"]
    assert not [file for file in os.scandir(tmp_path) if b"jane.doe" in Path(file).read_bytes()]


async def test_the_order_is_that_of_the_gain_and_the_limit_takes_the_best(world: World, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(n) for n in (3, 0, 2, 1)])

    await replayed(settings, limit=3)

    assert [call.prompt for call in world.asked("teacher")] == [f"the question of e{n:03}" for n in (0, 1, 2)]


async def test_another_tenants_examples_are_left_alone(world: World, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(0, tenant="a"), bad(1, tenant="b")])

    report = await replayed(settings, tenant="b")

    assert report.considered == 1
    assert {id: e.answer[:2] for id, e in examples_of(settings).items()} == {"e000": "q3", "e001": "q9"}


async def test_an_example_has_its_rounds_and_no_more(world: World, tmp_path: Path) -> None:
    world.says = lambda question: "q1"
    settings = make_settings(tmp_path, world.upstream.base_url, replay={"max_rounds": 3})
    fill(settings, [bad(0)])

    considered = [(await replayed(settings)).considered for _ in range(6)]

    assert considered == [1, 1, 1, 0, 0, 0]
    assert len(world.asked("teacher")) == 3


async def test_what_users_approved_of_is_not_asked_again(world: World, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(0, stats=ExampleStats(gain=0.9, own_quality=1.0))])

    assert (await replayed(settings)).considered == 0


async def test_what_users_approve_of_meanwhile_is_not_replaced(world: World, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(0)])
    live = opened(settings)
    world.on_call = lambda number: live.update_example("e000", own_quality=1.0) and None

    report = await replayed(settings)

    assert (report.improved, report.kept) == (0, 1)
    assert [e.answer for e in examples_of(settings).values()] == ["q3 of 0"]


async def test_a_change_by_somebody_else_is_not_lost_and_the_example_can_be_replayed_later(
    world: World, tmp_path: Path
) -> None:
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(0)])
    live = opened(settings)

    def change(number: int) -> None:
        if number == 2:
            live.update_example("e000", answer="q4 by somebody else")

    world.on_call = change
    report = await replayed(settings)
    assert (report.improved, report.overtaken) == (0, 1)
    (example,) = examples_of(settings).values()
    assert (example.answer, example.stats.replays) == ("q4 by somebody else", 0)

    assert (await replayed(settings)).improved == 1


async def test_a_follower_sees_the_new_answer_in_the_feed(world: World, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(0)])
    live = opened(settings)
    cursor = live.last_change()

    await replayed(settings)

    assert [change.key for change in live.changes(cursor)] == ["e000"]


async def test_after_many_failures_in_a_row_the_rest_is_not_tried(world: World, tmp_path: Path) -> None:
    world.says = lambda question: "q1"
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(n) for n in range(40)])

    report = await replayed(settings)

    assert report.stopped is Stop.CUT_OFF
    assert report.replayed == 20


async def test_the_cut_off_moves_on_while_replay_pays(world: World, tmp_path: Path) -> None:
    pays = iter([*["q1"] * 19, "q9", *["q1"] * 100])
    world.says = lambda question: next(pays)
    settings = make_settings(tmp_path, world.upstream.base_url)
    used = ExampleStats(uses=5, gain=0.5, credit=5.0)
    fill(settings, [bad(n, at=time.time(), stats=used) for n in range(60)])

    assert (await replayed(settings)).replayed == 40


async def test_where_improvements_save_less_than_they_cost_the_rest_is_not_tried(world: World, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, world.upstream.base_url)
    often, rarely = ExampleStats(uses=9, gain=0.9, credit=9.0), ExampleStats(uses=1, gain=0.1, credit=0.01)
    now = time.time()
    fill(settings, [bad(n, at=now, stats=often) for n in range(15)])
    fill(settings, [bad(n, at=now, stats=rarely) for n in range(15, 100)])

    report = await replayed(settings)

    assert report.stopped is Stop.CUT_OFF
    assert 15 < report.improved < 60
    assert report.cut_off.cost_nusd == report.confirmed_nusd
    assert report.as_json()["cut_off"]["recovered"] == 0.5, "nothing was measured yet"


async def test_what_earlier_improvements_won_back_is_measured(world: World, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(0, stats=ExampleStats(uses=4, gain=0.5, credit=4.0, credited_quality=1.0))])
    await replayed(settings)
    live = opened(settings)
    (example,) = live.list_examples()
    assert (example.stats.credit, example.stats.credited_quality) == (0.0, 0.0), "the record is of the new answer"
    for n in range(20):
        live.record(make_exchange(f"r{n}", shown=["e000"]))
        live.add_feedback(make_feedback(f"r{n}", 0.75), tenant="t")

    assert live.recoveries() == [Recovery(20.0, 0.75, 0.25)]
    expected = (20 * 0.5 + 10 * 0.5) / (20 * 0.75 + 10)  # (0.75 - 0.25) of (1 - 0.25) lost, and the prior
    assert (await replayed(settings)).recovered == pytest.approx(expected)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    budget=st.one_of(st.just(0.0), st.floats(1e-6, 0.2)),
    price_in=st.floats(0, 50),
    price_out=st.floats(0, 50),
    usage=st.booleans(),
    samples=st.integers(1, 2),
)
def test_the_budget_holds_for_any_prices(
    budget: float, price_in: float, price_out: float, usage: bool, samples: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World()
        for script in world.upstream.by_model.values():
            script.usage = usage
        prices = {"usd_per_million_input_tokens": price_in, "usd_per_million_output_tokens": price_out}
        made = []

        def settings_of(base_url: str) -> object:
            backends = [
                {"name": "small", "base_url": base_url, "model": "small"},
                {"name": "judge", "base_url": base_url, "model": "judge", "teacher": False, **prices},
                {"name": "large", "base_url": base_url, "model": "teacher", "teacher": True, **prices},
            ]
            made.append(
                make_settings(
                    Path(folder), base_url, backends=backends, replay={"usd_budget": budget, "samples": samples}
                )
            )
            fill(made[0], [bad(n) for n in range(4)])
            return made[0]

        report = run_once(world, settings_of)  # type: ignore[arg-type]

        assert report.confirmed_nusd + report.unconfirmed_nusd <= budget * NUSD
        billed = world.billed_nusd(made[0])
        assert billed <= report.confirmed_nusd + report.unconfirmed_nusd
        assert not usage or billed == report.confirmed_nusd
        assert (report.stopped is Stop.NOTHING_LEFT) == (report.replayed == 4)


async def test_an_answer_that_the_budget_did_not_let_be_judged_is_used_by_the_next_run(
    world: World, tmp_path: Path
) -> None:
    prices = {"usd_per_million_input_tokens": 100.0, "usd_per_million_output_tokens": 1.0}
    url = world.upstream.base_url
    backends = [
        {"name": "judge", "base_url": url, "model": "judge", "teacher": False, **prices},
        {"name": "large", "base_url": url, "model": "teacher", "teacher": True},
    ]
    poor = make_settings(tmp_path, url, backends=backends, replay={"usd_budget": 0.001})
    fill(poor, [bad(0)])

    first = await replayed(poor)
    assert (first.stopped, first.answers, first.judgements) == (Stop.BUDGET, 1, 0)

    rich = make_settings(tmp_path, url, backends=backends)
    second = await replayed(rich)
    assert (second.answers, second.judgements, second.improved) == (0, 2, 1)
    assert len(world.asked("teacher")) == 1


async def test_a_teacher_that_is_down_ends_the_run_and_loses_nothing(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, "http://127.0.0.1:9")
    fill(settings, [bad(n) for n in range(3)])

    report = await replayed(settings)

    assert report.stopped is Stop.ERROR and report.error is not None and "large" in report.error
    assert "\n" not in report.error
    assert (report.replayed, report.confirmed_nusd, report.unconfirmed_nusd) == (0, 0, 0)
    assert all(e.stats.replays == 0 for e in examples_of(settings).values())


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_hiccup_is_tried_again_and_costs_nothing(world: World, tmp_path: Path, status: int) -> None:
    world.upstream.queue.append(Script(status=status))
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(0)])

    report = await replayed(settings)

    assert (report.improved, report.unconfirmed_nusd) == (1, 0)


@pytest.mark.parametrize("script", [Script(fault="reset_midway"), Script(fault="truncate"), Script(status=502)])
async def test_what_may_have_been_billed_stays_reserved(world: World, tmp_path: Path, script: Script) -> None:
    world.upstream.queue.append(script)
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(0)])

    report = await replayed(settings)

    assert (report.improved, report.unconfirmed_calls) == (1, 1)
    assert report.unconfirmed_nusd > 0


async def test_a_wrong_key_ends_the_run_at_once(world: World, tmp_path: Path) -> None:
    world.upstream.by_model["teacher"] = Script(status=401)
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(n) for n in range(3)])

    report = await replayed(settings)

    assert report.stopped is Stop.ERROR and "401" in (report.error or "")
    assert len(world.upstream.requests) == 1


async def test_a_request_that_the_teacher_refuses_uses_up_a_round_and_others_go_on(
    world: World, tmp_path: Path
) -> None:
    world.upstream.queue.append(Script(status=400))
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(n) for n in range(2)])

    report = await replayed(settings)

    assert (report.refused, report.improved) == (1, 1)


async def test_an_example_at_which_the_teacher_always_breaks_does_not_block_the_others_for_ever(
    world: World, tmp_path: Path
) -> None:
    def says(question: str) -> str:
        if "e000" in question:
            raise ValueError("scripted")  # a 500
        return "q9"

    world.says = says
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(n) for n in range(3)])

    reports = [await replayed(settings) for _ in range(4)]

    assert [r.improved for r in reports] == [2, 0, 0, 0]
    assert [r.refused for r in reports] == [0, 0, 1, 0]


async def test_fields_that_a_model_does_not_take_are_renamed_or_left_out(world: World, tmp_path: Path) -> None:
    for param in ("max_tokens", "temperature"):
        body = b'{"error": {"message": "unsupported", "param": "%s", "code": null}}' % param.encode()
        world.upstream.queue.append(Script(status=400, body=body))
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(n) for n in range(2)])

    report = await replayed(settings)

    assert report.improved == 2
    asked = [r.json for r in world.upstream.requests if r.json["model"] == "teacher"]
    assert [sorted(set(a) - {"model", "messages"}) for a in asked] == [
        ["max_tokens", "temperature"],
        ["max_completion_tokens", "temperature"],
        ["max_completion_tokens"],
        ["max_completion_tokens"],
    ]


async def test_two_runs_at_once_do_each_example_once_and_share_one_budget(world: World, tmp_path: Path) -> None:
    await two_runs(world, make_settings(tmp_path, world.upstream.base_url))


async def test_two_runs_at_once_share_a_postgresql_as_they_share_a_file(
    world: World, tmp_path: Path, postgres_server: Server
) -> None:
    with postgres_server.database() as url:
        await two_runs(world, make_settings(tmp_path, world.upstream.base_url, store={"url": url}))


async def two_runs(world: World, settings: config.Config) -> None:
    for script in world.upstream.by_model.values():
        script.before_head_s = 0.005
    fill(settings, [bad(n) for n in range(20)])

    reports = await asyncio.gather(*(replayed(settings, workers=2) for _ in range(2)))

    assert len(world.asked("teacher")) == 20
    assert len({call.prompt for call in world.asked("teacher")}) == 20
    assert all(e.stats.replays == 1 for e in examples_of(settings).values())
    assert len({r.run for r in reports}) == 1
    assert max(r.replayed for r in reports) == 20
    assert max(r.confirmed_nusd for r in reports) == world.billed_nusd(settings)


async def test_a_run_that_ended_is_not_joined(world: World, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(0)])

    first, second = await replayed(settings), await replayed(settings)

    assert first.run != second.run
    assert not second.resumed
    assert second.confirmed_nusd == 0


async def test_a_lease_that_was_lost_writes_nothing(world: World, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(0)])
    live = opened(settings)

    def steal(number: int) -> None:
        with live.transaction():
            live.write("UPDATE replay_items SET attempt = attempt + 1, worker = 'other'")

    world.on_call = steal
    report = await replayed(settings)

    assert report.improved == 0
    (example,) = examples_of(settings).values()
    assert (example.answer, example.stats.replays) == ("q3 of 0", 0)


def test_an_item_of_the_dead_is_taken_over_and_of_the_living_is_not(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, "http://127.0.0.1:9")
    fill(settings, [bad(0)])
    now = [1000.0]
    one, two = (Ledger(opened(settings), BUDGET_USD, worker=f"elsewhere||{n}|x", clock=lambda: now[0]) for n in (1, 2))
    one.enter()
    two.enter()
    assert one.run_id == two.run_id

    first = one.claim("e000", 5)
    assert first is not None and two.claim("e000", 5) is None
    now[0] += 100
    one.beat()
    now[0] += 100
    assert two.claim("e000", 5) is None, "renewed"
    now[0] += 100
    second = two.claim("e000", 5)
    assert second is not None and second.attempt == first.attempt + 1


def test_an_item_of_a_process_that_runs_is_not_taken_over_when_the_clock_jumps(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, "http://127.0.0.1:9")
    fill(settings, [bad(0)])
    now = [1000.0]
    one, two = (Ledger(opened(settings), BUDGET_USD, clock=lambda: now[0]) for _ in range(2))  # of this very process
    one.enter()
    two.enter()
    assert one.claim("e000", 5) is not None
    now[0] += 10 * LEASE_S
    assert two.claim("e000", 5) is None
    with one.store.transaction():
        here, pid, _, rest = one.worker.rsplit("|", 3)
        one.store.write("UPDATE replay_items SET worker = ?", [f"{here}|{pid}|1|{rest}"])  # begun at another time
    now[0] -= 10 * LEASE_S
    assert two.claim("e000", 5) is not None, "the same number, but another process"


@pytest.mark.parametrize("body", [b'{"choices": [{"mess', b"[1, 2]", b'{"choices": []}', b"\xff"])
async def test_a_reply_that_nobody_can_read_is_not_paid_for_again(world: World, tmp_path: Path, body: bytes) -> None:
    world.upstream.by_model["teacher"] = Script(body=body)
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(n) for n in range(5)])

    report = await replayed(settings, workers=1, pace=Pace(tries=4, first_pause_s=0.001))

    assert (report.stopped, report.unconfirmed_calls) == (Stop.ERROR, 3)  # one call each, until it is taken for broken
    assert len(world.upstream.requests) == 3
    assert "no whole answer" in (report.error or "")


async def test_a_budget_that_went_into_calls_of_unknown_end_is_an_error(world: World, tmp_path: Path) -> None:
    world.upstream.by_model["teacher"] = Script(body=b"[]")
    settings = make_settings(tmp_path, world.upstream.base_url, replay={"usd_budget": 0.005})  # one call
    fill(settings, [bad(n) for n in range(5)])

    report = await replayed(settings, workers=1)

    assert report.stopped is Stop.ERROR and "no whole answer" in (report.error or "")
    assert report.unconfirmed_nusd > 0


@pytest.mark.parametrize("tokens", [10**18, 2**63, 10**30])
async def test_an_absurd_bill_is_not_believed(world: World, tmp_path: Path, tokens: int) -> None:
    usage = {"prompt_tokens": tokens, "completion_tokens": tokens}
    choice = {"index": 0, "message": {"role": "assistant", "content": "q9"}, "finish_reason": "stop"}
    world.upstream.by_model["teacher"] = Script(body=json.dumps({"choices": [choice], "usage": usage}).encode())
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(0)])

    report = await replayed(settings)

    assert report.confirmed_nusd + report.unconfirmed_nusd <= BUDGET_USD * NUSD
    if tokens < 2**63:  # what is longer is no JSON number to us: the reply cannot be read
        assert (report.stopped, report.replayed) == (Stop.NOTHING_LEFT, 1)


async def test_what_other_workers_have_reserved_for_now_is_waited_for(world: World, tmp_path: Path) -> None:
    world.upstream.by_model["teacher"].before_head_s = 0.05  # so that they are at it together
    settings = make_settings(tmp_path, world.upstream.base_url, replay={"usd_budget": 0.01})  # two calls at a time
    fill(settings, [bad(n) for n in range(6)])

    report = await replayed(settings, workers=4)

    assert (report.stopped, report.replayed) == (Stop.NOTHING_LEFT, 6)
    assert report.confirmed_nusd == world.billed_nusd(settings) < 0.01 * NUSD
