"""What replay leaves for serving: trained weights that found the truth of a synthetic world, and sets that stay."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iccache import config
from iccache.examples.selector import THRESHOLD_STATE, restored_threshold
from iccache.examples.shared import SETS_STATE, SharedSets, build_set, unpack
from iccache.examples.store import ExampleStore, open_store
from iccache.examples.training import Scored, calibration, fit
from iccache.examples.traits import application
from iccache.examples.utility import LearnedUtility, Rows, candidate_rows
from iccache.examples.ways import NAMES, PRIOR_STATE, Prior, Shown, Way, features
from iccache.types import Considered, ExampleStats, Feedback, Taken, Usage
from replay import lessons
from tests.factories import AT, make_example, make_exchange

TRUTH = {"constant": 0.3, "own": 0.1, "own_vote": 0.4, "shared": 0.2}


def world(n: int, seed: int = 0, spread: float = 0.2) -> list[Scored]:
    """Answers whose chance to be right is linear in TRUTH, in kinds of which some are hard and look special."""
    rng = np.random.default_rng(seed)
    weights = np.array([TRUTH.get(name, 0.0) for name in NAMES])
    answers = []
    for i in range(n):
        kind = i % 6
        way = list(Way)[int(rng.integers(3))]
        near = 0.2 * kind + 0.05 * rng.random(3)  # hard kinds have the nearest examples, for no reason
        shown = Shown([] if way is Way.NONE else list(near), [0.1] * 3, [float(rng.random())] * 3)
        x = features(40, way, shown)
        chance = np.clip(x @ weights - spread * (kind / 5 - 0.5), 0, 1)
        answers.append(Scored("small", f"k{kind}", x.tolist(), float(rng.random() < chance)))
    return answers


def test_training_finds_what_helps_and_not_what_only_goes_with_it() -> None:
    learned = dict(zip(NAMES, fit(world(6000), Prior({"": np.zeros(len(NAMES))})).weights["small"], strict=True))
    assert learned["own_vote"] == pytest.approx(0.4, abs=0.08)
    assert learned["own"] + 0.5 * learned["own_vote"] == pytest.approx(0.3, abs=0.08)
    assert abs(learned["own_similarity_mean"]) < 0.15
    naive = np.linalg.lstsq(
        np.array([a.x for a in world(6000)]), np.array([a.quality for a in world(6000)]), rcond=None
    )
    assert naive[0][NAMES.index("own_similarity_mean")] < -0.05  # which is what differences within kinds are for


WORLDS = {  # what an example adds to the chance of a right answer, from what is seen of it
    "what is old is stale": lambda seen: 0.5 - 0.8 * seen.age,
    "long answers lead astray": lambda seen: 1.0 - 1.5 * seen.answer_length,
    "what was shown with success helps again": lambda seen: 0.1 + 2.0 * seen.record,
    "what is poor itself harms": lambda seen: 0.2 + 0.8 * seen.source,
    "other instructions harm": lambda seen: 0.4 - 0.5 * seen.other_system,
}


def candidates(n: int) -> Rows:
    """(n, columns): examples equally near to a request, of all ages, lengths, records and origins."""
    rng, nearest = np.random.default_rng(7), []
    for i in range(n):
        judged = float(rng.choice([0, 4, 20]))
        known = ExampleStats(
            credit=judged,
            credited_quality=judged * float(rng.random()),
            own_quality=rng.choice([None, 0.2, 0.7, 1.0]),
        )
        answer = "word " * int(np.exp(rng.uniform(0, 5)))
        system = "Be brief." if rng.random() < 0.5 else "Be kind."
        age = 86_400 * float(np.exp(rng.uniform(0, 6)) - 1)
        nearest.append((make_example(f"e{i}", answer=answer, system=system, stats=known, at=AT - age), 0.6))
    return candidate_rows(nearest, request="a request", system="Be brief.", now=AT)


@pytest.mark.parametrize("world_", WORLDS)
def test_training_finds_what_makes_an_example_useful(world_: str) -> None:
    """Of six candidates the one ranked first is worth nearly what the best is; before training, less."""
    rng, untrained = np.random.default_rng(8), LearnedUtility()
    rows = candidates(600)
    seen = untrained.seen(rows)
    worth = WORLDS[world_](Shown(*seen.T))
    answers = []
    for i, one in enumerate(rng.integers(len(rows), size=2500)):
        chance = np.clip(0.3 + worth[one] - 0.1 * (i % 3), 0, 1)  # some kinds are harder
        x = features(40, Way.OWN, Shown(*[[float(value)] for value in seen[one]]))
        answers.append(Scored("small", f"k{i % 3}", x.tolist(), float(rng.random() < chance)))

    trained = LearnedUtility(fit(answers))

    def chosen(model: LearnedUtility) -> float:
        """Mean worth of what it ranks first, from 0, that of a random one, to 1, that of the best."""
        sixes = rng.integers(len(rows), size=(500, 6))
        first = sixes[np.arange(500), np.argmax(model.predict(rows, "small")[sixes], axis=1)]
        return float((worth[first].mean() - worth.mean()) / (worth[sixes].max(axis=1).mean() - worth.mean()))

    assert chosen(trained) > 0.9
    assert chosen(untrained) < 0.9


def test_a_student_with_few_answers_has_the_weights_of_all() -> None:
    few = [a._replace(student="rare") for a in world(20, seed=1)]
    assert set(fit([*world(500), *few]).weights) == {"", "small"}
    with pytest.raises(ValueError, match="two"):
        fit(few[:1])


def test_calibration_is_measured_on_kinds_that_were_left_out() -> None:
    good = calibration(world(3000, spread=0.0))
    assert good.answers == 3000
    assert good.brier < good.brier_of_mean
    assert all(abs(expected - came) < 0.1 for expected, came, _ in good.bins)
    assert sum(n for _, _, n in good.bins) == 3000
    shuffled = world(3000, spread=0.0)
    qualities = np.random.default_rng(5).permutation([a.quality for a in shuffled])
    noise = calibration([a._replace(quality=float(q)) for a, q in zip(shuffled, qualities, strict=True)])
    assert noise.brier > noise.brier_of_mean - 0.003


@pytest.fixture
def store(tmp_path: Path) -> Any:
    opened = open_store(f"sqlite:///{tmp_path / 'store.db'}")
    yield opened
    opened.close()


def record(store: ExampleStore, answers: list[Scored]) -> None:
    for i, answer in enumerate(answers):
        taken = Taken("own", 0.5, 1.0, x=tuple(answer.x))
        store.record(make_exchange(f"r{i}", system=answer.kind, extra={"way": taken._asdict()}, at=AT + i))
        store.add_feedback(Feedback(f"r{i}", "user", answer.quality, AT + i), tenant="t")


def test_what_was_scored_is_learned_from_and_kept(store: ExampleStore) -> None:
    record(store, world(40))
    assert lessons.train(store) is None
    assert store.load_state(PRIOR_STATE) is None
    record(store, world(120))
    told = lessons.train(store)
    assert told is not None
    assert (told["answers"], told["students"], told["changed"]) == (120, ["small"], True)
    kept = store.load_state(PRIOR_STATE)
    assert kept is not None
    assert set(Prior.restored(kept[1]).weights) == {"", "small"}
    again = lessons.train(store)
    assert again is not None
    assert again["changed"] is False


def fill(store: ExampleStore, system: str, count: int, first: int = 0, **other: Any) -> list[str]:
    return [
        store.admit(
            make_example(f"{system[:3]}{i}", system=system, request=f"{system} {i}", answer=f"l{i % 3}", **other)
        )
        for i in range(first, first + count)
    ]


def sets(store: ExampleStore) -> dict[str, list[str]]:
    kept = store.load_state(SETS_STATE)
    return {} if kept is None else {s.system: s.ids for s in unpack(kept[1])}


def test_every_kind_with_enough_examples_gets_a_set_that_stays(store: ExampleStore) -> None:
    fill(store, "Sort it.", 30)
    fill(store, "Rare.", 5)
    fill(store, "", 20)
    assert lessons.build_sets(store) == 1
    name = f"{application('Sort it.'):016x}"
    before = sets(store)
    assert list(before) == [name]
    assert len(before[name]) == 3
    fill(store, "Sort it.", 20, first=100)
    lessons.build_sets(store)
    assert sets(store) == before


@pytest.mark.parametrize("spoil", ["deleted", "bad", "grown"])
def test_a_set_is_made_anew_when_it_no_longer_stands_for_its_kind(store: ExampleStore, spoil: str) -> None:
    fill(store, "Sort it.", 30)
    lessons.build_sets(store)
    (before,) = sets(store).values()
    if spoil == "deleted":
        store.delete_examples(before[:1])
    elif spoil == "bad":
        store.update_example(before[0], own_quality=0.0)
    else:
        for i in range(60):
            store.admit(make_example(f"new{i}", system="Sort it.", request=f"new {i}", answer="new label"))
    lessons.build_sets(store)
    (after,) = sets(store).values()
    assert after != before
    assert spoil == "grown" or before[0] not in after


def fill_plain(store: ExampleStore, topic: int, count: int, first: int = 0) -> None:
    """Examples without a system prompt, of a topic that their embeddings tell."""
    for i in range(first, first + count):
        vector = np.random.default_rng([topic, i]).normal(0, 0.05, 8).astype(np.float32)
        vector[topic] += 1.0
        vector /= np.linalg.norm(vector)
        name = f"{topic}-{i}"
        store.admit(make_example(name, request=f"{name} is asked", answer=f"{name} is said", embedding=vector))


def test_requests_without_a_system_prompt_get_the_set_of_what_they_ask(store: ExampleStore) -> None:
    for topic in range(3):
        fill_plain(store, topic, 40)
    assert lessons.build_sets(store) == 2  # of 120 examples; not one for each topic, but each topic is in one alone
    in_force = SharedSets()
    kept = store.load_state(SETS_STATE)
    assert kept is not None
    in_force.load(unpack(kept[1]), store)
    direction = np.eye(8, dtype=np.float32)
    shown = [{e.request[0] for e in in_force.of("t", 0, direction[topic])} for topic in range(3)]
    assert all(str(topic) in topics for topic, topics in enumerate(shown))
    assert {"0"} in shown or {"1"} in shown or {"2"} in shown
    assert in_force.of("t", 0, direction[5]) == ()
    assert in_force.of("other", 0, direction[0]) == ()
    assert in_force.of("t", application("Be brief."), direction[0]) == ()
    assert in_force.of("t", 0, np.ones(4, np.float32) / 2) == ()


def test_sets_without_a_system_prompt_stay_until_they_are_out_of_date(store: ExampleStore) -> None:
    for topic in range(2):
        fill_plain(store, topic, 50)
    lessons.build_sets(store)
    before = store.load_state(SETS_STATE)
    fill_plain(store, 0, 40, first=50)
    lessons.build_sets(store)
    assert store.load_state(SETS_STATE) == before
    fill_plain(store, 2, 100)
    assert lessons.build_sets(store) > 2
    assert before is not None
    after = sets(store)
    store.delete_examples(next(iter(after.values()))[:1])
    lessons.build_sets(store)
    assert sets(store) != after


def labelled(store: ExampleStore, name: str, topic: int, label: str, count: int) -> None:
    """Examples of one kind, near to one another where their topic is the same."""
    for i in range(count):
        vector = np.random.default_rng([topic, i, len(name)]).normal(0, 0.2, 8).astype(np.float32)
        vector[topic] += 1.0
        vector /= np.linalg.norm(vector)
        id = f"{name}-{i}"
        store.admit(make_example(id, system="Sort it.", request=f"sort {id}", answer=label, embedding=vector))


def test_an_example_that_its_near_neighbours_contradict_is_in_no_set(store: ExampleStore) -> None:
    for topic in range(3):
        labelled(store, f"right {topic}", topic, f"label {topic}", 20)
    labelled(store, "wrong", 0, "label 9", 2)
    assert {e.answer for e in build_set(list(store.each_example("t")))} == {f"label {n}" for n in (0, 1, 2, 9)}

    lessons.build_sets(store)

    (ids,) = sets(store).values()
    assert {e.answer for e in store.examples(ids)} == {"label 0", "label 1", "label 2"}


def test_a_set_with_an_example_that_is_contradicted_since_is_made_anew(store: ExampleStore) -> None:
    for topic in range(3):
        labelled(store, f"right {topic}", topic, f"label {topic}", 20)
    lessons.build_sets(store)
    (before,) = sets(store).values()
    spoiled = next(e.id for e in store.examples(before) if e.answer == "label 0")
    store.update_example(spoiled, answer="label 2")

    lessons.build_sets(store)

    (after,) = sets(store).values()
    assert spoiled in before
    assert spoiled not in after


def test_known_bad_examples_are_in_no_set(store: ExampleStore) -> None:
    fill(store, "Sort it.", 30, stats=ExampleStats(own_quality=0.1))
    assert lessons.build_sets(store) == 0


BACKENDS = {
    name: config.Backend(
        name=name,
        base_url="http://127.0.0.1:1/v1",
        model=name,
        usd_per_million_input_tokens=price,
        usd_per_million_output_tokens=price,
    )
    for name, price in (("small", 1.0), ("large", 11.0))
}


def test_the_threshold_is_chosen_from_what_was_left_out_and_kept(store: ExampleStore) -> None:
    """Answers are half right; without the example of utility .1 right, and without that of .5 wrong."""
    assert lessons.choose_threshold(store, BACKENDS) is None
    for i in range(240):
        out = None if i % 3 else ("low", "high")[i // 3 % 2]
        considered = [
            Considered(name, 0.5, utility, shown=name != out)
            for name, utility in (("low", 0.1), ("high", 0.5), ("best", 0.9))
        ]
        taken = Taken("own", 0.5, 1.0, left_out=out)
        shown = [c.id for c in considered if c.shown]
        usage = Usage(100 + 50 * len(shown), 10, 50 * len(shown))
        extra = {"way": taken._asdict()}
        store.record(make_exchange(f"r{i}", extra=extra, considered=considered, shown=shown, usage=usage, at=AT + i))
        store.add_feedback(Feedback(f"r{i}", "user", {None: 0.5, "low": 1.0, "high": 0.0}[out], AT + i), tenant="t")
    chosen = lessons.choose_threshold(store, BACKENDS)
    assert chosen is not None
    assert chosen.at == 0.5
    assert (chosen.gain, chosen.left_out) == (pytest.approx(-0.5), 40)
    # 50 tokens at 1 USD a million, of the 110 tokens at 11 less 1 USD that an offload saves
    assert chosen.price == pytest.approx(50 / 1100)
    kept = store.load_state(THRESHOLD_STATE)
    assert kept is not None
    assert restored_threshold(kept[1]) == 0.5


@pytest.mark.parametrize("state", [b"", b"{}", b"[]", b'{"at": "x"}', b'{"at": NaN}', b"\xff"])
def test_a_threshold_that_cannot_be_read_is_refused(state: bytes) -> None:
    with pytest.raises(ValueError, match="threshold"):
        restored_threshold(state)
