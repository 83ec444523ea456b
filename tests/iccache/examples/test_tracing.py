"""The test that traces a fall in quality to an example, in worlds whose truth is known."""

from __future__ import annotations

import random

import pytest

from iccache.examples.tracing import ALPHA, Standing, Traced, held_for, suspects


def world(
    seed: int, *, outcomes: int = 1500, poison: float = 0.0, fails_at: int | None = None, kinds: int = 12
) -> list[Traced]:
    """Kinds of request of unlike difficulty, examples that help or harm a little, answers right or wrong.

    `poison`: what showing "poison" costs, from the outcome 500 on, in one kind. `fails_at`: when the model gets worse.
    """
    rng = random.Random(seed)
    ease = [rng.uniform(0.15, 0.95) for _ in range(kinds)]
    ease[1] = 0.9  # where the poison is: an answer that is wrong anyway cannot be spoiled
    helps = {f"{k}-{i}": rng.uniform(-0.08, 0.08) for k in range(kinds) for i in range(10)}
    made = []
    for number in range(outcomes):
        kind = min(int(rng.expovariate(0.4)), kinds - 1)
        nearest = [f"{kind}-{i}" for i in rng.sample(range(10), 6)]
        if poison and number > 500 and kind == 1 and rng.random() < 0.7:
            nearest.insert(rng.randrange(3), "poison")
        shown = nearest[:3]
        chance = ease[kind] + sum(helps.get(id, 0.0) for id in shown) / 3 - poison * ("poison" in shown)
        if fails_at is not None and number >= fails_at:
            chance -= 0.4
        made.append(Traced("small", float(number), float(rng.random() < chance), tuple(shown), tuple(nearest)))
    return made


def test_harmless_examples_are_suspected_no_more_often_than_promised() -> None:
    worlds = [world(seed) for seed in range(8)]
    examples = sum(len({id for o in w for id in o.shown}) for w in worlds)
    assert sum(len(suspects(w)) for w in worlds) <= max(1.0, 3 * ALPHA * examples)


def test_a_model_that_gets_worse_is_blamed_on_no_example() -> None:
    assert sum(len(suspects(world(seed, fails_at=800))) for seed in range(4)) <= 1


@pytest.mark.parametrize("seed", range(4))
def test_poison_is_found_and_nothing_that_was_shown_with_it(seed: int) -> None:
    assert suspects(world(100 + seed, poison=0.9)) == ["poison"]


def test_what_was_cleared_is_judged_by_what_came_after() -> None:
    outcomes = world(101, poison=0.9)
    assert suspects(outcomes, {"poison": outcomes[-1].at + 1}) == []


def test_without_answers_to_compare_with_nobody_is_suspected() -> None:
    alone = [Traced("small", float(n), 0.0, ("e",), ("e", "f")) for n in range(200)]
    assert suspects(alone) == []
    assert suspects([]) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_writer_of_many_bad_examples_is_found_though_each_is_shown_seldom(seed: int) -> None:
    rng = random.Random(seed)
    outcomes = world(200 + seed, poison=0.9)
    spread = {
        id: Standing(n, f"user{n % 40}") for n, id in enumerate(sorted({id for o in outcomes for id in o.nearest}))
    }
    names = [f"poison{n}" for n in range(120)]
    renamed = []
    for outcome in outcomes:
        name = rng.choice(names)
        as_many = {"poison": name}
        renamed.append(
            outcome._replace(
                shown=tuple(as_many.get(id, id) for id in outcome.shown),
                nearest=tuple(as_many.get(id, id) for id in outcome.nearest),
            )
        )
    standings = spread | {name: Standing(10_000 + n, "mallory") for n, name in enumerate(names)}
    assert set(held_for(renamed, standings)) == set(names)
    assert [id for id in suspects(renamed) if id not in names] == []


def test_honest_writers_are_left_alone() -> None:
    for seed in range(3):
        outcomes = world(seed)
        ids = sorted({id for o in outcomes for id in o.nearest})
        assert held_for(outcomes, {id: Standing(n, f"user{n % 15}") for n, id in enumerate(ids)}) == []
