"""The stages of the demo against a scripted client: what is asked of whom, and in which way."""

import io
import threading
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from iccache import config
from iccache.demo.client import DemoError, conversation
from iccache.demo.outcome import Outcome
from iccache.demo.report import CONDITIONS
from iccache.demo.run import Demo, Options, Upstream, configuration, in_turn
from iccache.demo.screen import Screen
from iccache.demo.tasks import TASKS, Item, Sizes, Task

SIZES = Sizes(warm_up=20, held_out=4, routed=6)
REPLAYED: dict[str, Any] = {
    "examples": {"replayed": 3, "improved": 1, "kept": 2},
    "usd": {"confirmed": 0.001},
    "evicted": {"evicted": 0},
}


@dataclass
class Asked:
    """A request as the scripted client got it."""

    prompt: str
    model: str
    stream: bool
    headers: Mapping[str, str]
    turns: Sequence[tuple[str, str]]

    @property
    def stored(self) -> bool:
        return "x-iccache-store" not in self.headers


@dataclass
class Scripted:
    """Answers like a proxy whose student is right where it is shown examples."""

    asked: list[Asked] = field(default_factory=list)
    feedback_for: list[str] = field(default_factory=list)
    fails_at: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(
        self,
        task: Task,
        item: Item,
        *,
        model: str,
        stream: bool,
        headers: Mapping[str, str],
        turns: Sequence[tuple[str, str]] = (),
    ) -> Outcome:
        with self.lock:
            self.asked.append(Asked(item.prompt, model, stream, headers, turns))
            if len(self.asked) == self.fails_at:
                raise DemoError("the proxy went away")
        shown = 2 if model != "teacher" and "x-iccache-examples" not in headers else 0
        return Outcome(
            answer=f"answer to {item.prompt}",
            correct=model == "teacher" or shown > 0,
            backend="student" if model == "auto" else model,
            examples=shown,
            latency_s=0.01,
            overhead_ms=2.0,
            input_tokens=10,
            output_tokens=1,
            cost_usd=1.0 if model == "teacher" else 0.1,
            request_id=item.prompt,
        )

    def feedback(self, outcome: Outcome) -> None:
        self.feedback_for.append(outcome.request_id)

    def close(self) -> None:
        pass


def play(client: Scripted) -> tuple[Demo, str]:
    said = io.StringIO()
    screen = Screen(Console(file=said, width=100))
    demo = Demo(SIZES, Options(full=True), screen, lambda: client)  # type: ignore[arg-type,return-value]
    demo.run(lambda: REPLAYED)
    return demo, said.getvalue()


def prompts(demo: Demo, part: str) -> set[str]:
    return {item.prompt for run in demo.runs for item in getattr(run.split, part)}


def test_every_condition_is_scored_on_every_request_of_its_slice() -> None:
    demo, _ = play(Scripted())

    for outcomes in demo.report().tasks.values():
        assert {condition: len(outcomes[condition]) for condition in CONDITIONS} == {
            condition: SIZES.routed if condition == "routed" else SIZES.held_out for condition in CONDITIONS
        }


def test_nothing_about_a_held_out_request_is_ever_stored() -> None:
    client = Scripted()
    demo, _ = play(client)

    stored = {asked.prompt for asked in client.asked if asked.stored}
    assert stored == prompts(demo, "warm_up") | prompts(demo, "routed")
    assert not stored & prompts(demo, "held_out")


def test_as_many_random_examples_are_sent_as_were_chosen_and_none_is_added() -> None:
    client = Scripted()
    demo, _ = play(client)

    at_random = [asked for asked in client.asked if asked.turns]
    assert len(at_random) == SIZES.held_out * len(TASKS)
    known = prompts(demo, "warm_up")
    for asked in at_random:
        assert len(asked.turns) == 2
        assert asked.headers["x-iccache-examples"] == "0"
        assert all(request in known and answer == f"answer to {request}" for request, answer in asked.turns)


def test_each_routed_request_gets_its_feedback() -> None:
    client = Scripted()
    demo, said = play(client)

    assert set(client.feedback_for) == prompts(demo, "routed")
    assert "of requests 10 to 12 the student answered: intent_recognition 100%" in " ".join(said.split())


def test_each_task_is_asked_streaming_and_not() -> None:
    client = Scripted()
    demo, _ = play(client)

    for run in demo.runs:
        mine = {item.prompt for item in run.split.held_out}
        assert {asked.stream for asked in client.asked if asked.prompt in mine} == {True, False}


def test_the_same_question_is_shown_before_and_after() -> None:
    demo, said = play(Scripted())

    assert demo.runs[0].split.held_out[0].prompt in " ".join(said.split())
    assert "shown 2 of the teacher's answers" in said


def test_replay_is_told() -> None:
    _, said = play(Scripted())

    assert "3 examples: 1 got a better answer, 2 kept theirs" in " ".join(said.split())


@pytest.mark.parametrize("at", [1, 30, 50])
def test_the_first_failure_ends_it(at: int) -> None:
    with pytest.raises(DemoError, match="the proxy went away"):
        play(Scripted(fails_at=at))


def test_the_tasks_take_turns() -> None:
    demo, _ = play(Scripted())

    mixed = in_turn([(run, run.split.held_out) for run in demo.runs])

    assert [run.task.name for run, _ in mixed[:4]] == [task.name for task in TASKS] * 2
    assert len(mixed) == SIZES.held_out * len(TASKS)


def test_the_configuration_is_one_that_serve_takes() -> None:
    upstreams = {
        "student": Upstream("http://127.0.0.1:1/v1", 'a "small" model'),
        "teacher": Upstream("http://127.0.0.1:2/v1", "large"),
    }

    read = config.parse(tomllib.loads(configuration(8123, Path("/tmp/a folder/cache.db"), upstreams)))

    assert read.server.port == 8123
    assert read.store.url == "sqlite:////tmp/a folder/cache.db"
    assert [backend.model for backend in read.backends] == ['a "small" model', "large"]
    assert [backend.name for backend in read.teachers()] == ["teacher"]
    assert [backend.name for backend in read.students()] == ["student"]


def test_turns_come_between_the_system_prompt_and_the_question() -> None:
    assert conversation("be brief", [("q", "a")], "question") == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "question"},
    ]
