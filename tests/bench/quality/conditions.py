"""What is compared: how examples are chosen, in which framing, from which cache. A condition is written

    way[@framing][/cache]        as "nearest3", "nearest3@system", "learned/wrong"

way      none, random3, nearestN (the nearest last), first3 (the 3 nearest, the nearest first), fixed3 (the nearest
         of at least FIXED cosine), only1 ... only4 (the nth nearest alone), shared, utility3 (ranked by the trained
         utility), learned (the choice among none, own and shared)
framing  turns (the default), system, paper: see `prompts.messages`
cache    of 300 examples of the request's own task unless named: 1%, 5%, 25% of them; wrong (of a fifth, another
         answer); other (those of another task); all (those of all six tasks)
"""

from __future__ import annotations

import random
from functools import cache
from typing import NamedTuple, Self

import numpy as np

from iccache.examples.showing import ENOUGH
from iccache.examples.ways import WAYS, Prior, Shown, Way, Ways
from iccache.types import Example
from tests.bench.quality.answers import Answers
from tests.bench.quality.learn import PRIOR
from tests.bench.quality.prompts import (
    Cache,
    Request,
    by_utility,
    chosen,
    described,
    example,
    messages,
    pool,
    requests,
    shots,
)
from tests.bench.quality.tasks import TASKS, correct

TENANT = "t"
TOKEN_PRICE = 0.00002  # quality that a prompt token has to bring: a tenth of a point for fifty tokens
FIXED = 0.7  # cosine that "fixed3" asks for
WRONG_SHARE = 0.2
TRIED = 4  # recalled examples that the oracle tries one by one


class Condition(NamedTuple):
    """One way of asking."""

    way: str
    framing: str = "turns"
    cache: str = ""

    @classmethod
    def read(cls, text: str) -> Self:
        text, _, of = text.partition("/")
        way, _, framing = text.partition("@")
        return cls(way, framing or "turns", of)


def prompt(ways: Ways, student: str, request: Request, condition: Condition) -> list[dict[str, str]]:
    """The messages that `student` is asked."""
    return messages(request, shots(examples_for(ways, student, request, condition)), condition.framing)


def examples_for(ways: Ways, student: str, request: Request, condition: Condition) -> list[Example]:
    """What a condition shows for a request."""
    cache_ = cache_of(request.item.task, condition.cache)
    if condition.way == "utility3":
        return by_utility(cache_, request, prior(), student)
    if condition.way == "learned":
        return choose(ways, student, request, cache_)[1]
    if condition.way == "first3":
        return chosen(cache_, request, "nearest3")[::-1]
    if condition.way == "fixed3":
        return [e for e, cosine in cache_.recall(request, 3) if cosine >= FIXED][::-1]
    if condition.way.startswith("only"):
        place = int(condition.way.removeprefix("only"))
        return [e for e, _ in cache_.recall(request)[place - 1 : place]]
    return chosen(cache_, request, condition.way)


@cache
def cache_of(task: str, name: str) -> Cache:
    """The cache that requests of `task` find."""
    whole = pool(task)
    if name == "":
        return whole
    if name.endswith("%"):
        return Cache(whole.examples[: len(whole.examples) * int(name.removesuffix("%")) // 100])
    if name == "other":
        names = list(TASKS)
        return pool(names[(names.index(task) + 1) % len(names)])
    if name == "all":
        return Cache([e for other in TASKS for e in pool(other).examples])
    if name == "wrong":
        return Cache([_perhaps_wrong(task, place) for place in range(len(whole.examples))])
    raise ValueError(f"no cache is called {name!r}")


def _perhaps_wrong(task: str, place: int) -> Example:
    """The example, with the answer of another request in WRONG_SHARE of the cases."""
    rng = random.Random(f"wrong {task} {place}")
    others = [e.answer for e in pool(task).examples if e.answer != pool(task).examples[place].answer]
    return example(task, place, rng.choice(others) if rng.random() < WRONG_SHARE else None)


@cache
def prior() -> Prior:
    """As trained on the train split."""
    return Prior.restored(PRIOR.read_bytes())


def taught(student: str, answers: Answers) -> Ways:
    """The ways after the train split was scored, as serving would know it; nothing of the test split is in it."""
    ways = Ways(prior())
    for task in TASKS.values():
        cache_ = pool(task.name)
        for request in requests(task.name, "train"):
            for way, name in ((Way.NONE, "none"), (Way.OWN, "utility3"), (Way.SHARED, "shared")):
                examples = examples_for(ways, student, request, Condition(name))
                asked = messages(request, shots(examples))
                if answers.knows(asked, task.max_tokens):
                    right = correct(answers.get(asked, task.max_tokens).text, request.item)
                    note(ways, student, request, f"{request.seed} {name}", way, cache_, examples, right)
    return ways


def note(
    ways: Ways,
    student: str,
    request: Request,
    name: str,
    way: Way,
    cache_: Cache,
    examples: list[Example],
    right: bool,
) -> None:
    """One scored answer."""
    system = request.task.system
    expected = ways.estimate(
        ways.near(TENANT, student, request.vector, system),
        student,
        len(request.item.prompt),
        {way: described(cache_, request, examples)},
    ).prior[WAYS.index(way)]
    ways.learn(TENANT, name, student, request.vector, system, way, float(right), float(expected))


def choose(ways: Ways, student: str, request: Request, cache_: Cache) -> tuple[Way, list[Example]]:
    """The way with the best expected quality less the price of its tokens, and what it shows; no exploration."""
    system = request.task.system
    offers = {
        Way.NONE: list[Example](),
        Way.OWN: by_utility(cache_, request, ways.prior, student),
        Way.SHARED: cache_.shared(system),
    }
    local = ways.near(TENANT, student, request.vector, system)
    if local.answers < ENOUGH:
        return (Way.OWN, offers[Way.OWN]) if offers[Way.OWN] else (Way.NONE, [])
    seen = {way: described(cache_, request, shown) if shown else Shown(()) for way, shown in offers.items()}
    estimate = ways.estimate(local, student, len(request.item.prompt), seen)
    price = [TOKEN_PRICE * sum(e.tokens + 8 for e in offers[way]) for way in WAYS]
    way = WAYS[int(np.argmax(estimate.quality - np.array(price)))]
    return way, offers[way]
