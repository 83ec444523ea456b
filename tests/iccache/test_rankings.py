"""A ranking that is kept is the one that would be worked out now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import settings as settings_
from hypothesis import strategies as st

from iccache.dialects.dialect import DIALECTS
from iccache.examples.selector import Selector
from iccache.examples.shared import SetOf
from iccache.examples.traits import USUAL_QUALITY, application
from iccache.examples.utility import NAMES as COLUMNS
from iccache.examples.utility import LearnedUtility
from iccache.examples.ways import NAMES, NOTHING_KNOWN, WAYS, Prior, Shown, Way, Ways, features
from iccache.select import RANKINGS_KEPT, Choice, Job, Select
from iccache.types import ExampleStats, Form, Query, Recalled
from tests.e2e.world import World, world
from tests.factories import make_example

SYSTEM = "Be brief."
CHAT = DIALECTS["/v1/chat/completions"]


def job(w: World, text: str = "what is the colour of grass", system: str = SYSTEM, **more: Any) -> Job:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    ask = CHAT.read(orjson.dumps({"model": "auto", "messages": messages} | more))
    return Job("default", ask, tuple(w.proxy.settings.students()), 20, w.proxy.wall())


async def filled(w: World, **about: Any) -> None:
    embedder = w.proxy.select.retriever.embedder
    words = ("grass", "snow", "coal", "a lemon", "the sea", "a brick")
    texts = [f"what is the colour of {word}" for word in words]
    for i, (text, vector) in enumerate(zip(texts, embedder.embed(texts), strict=True)):
        example = make_example(
            f"e{i}", tenant="default", at=w.proxy.wall(), request=text, answer=f"It is of colour {i}.", system=SYSTEM,
            embedder=embedder.identity, embedding=vector, **about,
        )  # fmt: skip
        await w.proxy.learner.access.write(lambda store, example=example: store.admit(example))
    await w.proxy.learner.catch_up()


def told(choices: Any) -> Any:
    """All that a draw goes by, to compare."""

    def of(choice: Choice) -> Any:
        offers = {way: (o.price, [(m.example.id, m.utility) for m in o.shown]) for way, o in choice.offers.items()}
        own = [(m.example.id, m.similarity, m.utility) for m in choice.own]
        e = choice.estimate
        return offers, own, list(e.quality), list(e.sd), list(e.prior), e.answers, [list(f) for f in e.features]

    return {student: of(choice) for student, choice in choices.items()}


def anew(select: Select, asked: Job, recalled: Recalled) -> Any:
    tokens = {student.name: select._request_tokens(student, asked) for student in asked.students}
    return told(select._worked_out(asked, recalled, tokens))


def learn(w: World, select: Select) -> None:
    vector = select.retriever.embed(["what is the colour of grass"])[0]
    for i in range(5):
        select.ways.learn("default", f"r{i}", "small", vector, SYSTEM, Way.OWN, 0.0, 0.9)


def share(w: World, select: Select) -> None:
    store = w.proxy.learner.access.store
    kind = f"{application(SYSTEM):016x}"
    select.shared.load([SetOf("default", kind, ["e4", "e5"])], store)


def take_over(w: World, select: Select) -> None:
    other = Ways(select.ways.prior)
    vector = select.retriever.embed(["what is the colour of grass"])[0]
    for i in range(5):
        other.learn("default", f"r{i}", "small", vector, SYSTEM, Way.OWN, 0.0, 0.9)
    select.ways.take_over(other)


def threshold(w: World, select: Select) -> None:
    select.use_threshold(0.5)


def prior(w: World, select: Select) -> None:
    select.use_prior(Prior({"": [0.1 * i for i in range(len(NAMES))]}))


def settings(w: World, select: Select) -> None:
    fewer = msgspec.structs.replace(select.settings.selection, max_examples=1)
    now = msgspec.structs.replace(select.settings, selection=fewer)
    select.use(now, Selector(select.selector.utility, fewer), select.tokenizers)


def judged(w: World, select: Select) -> None:
    select.selector.utility.partial_fit(np.zeros((1, len(COLUMNS))), [0.0])
    select.learned()


LESSONS = [learn, share, take_over, threshold, prior, settings, judged]


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda f: f.__name__)
async def test_what_was_learned_or_set_meanwhile_counts_at_once(
    tmp_path: Path, lesson: Callable[[World, Select], None]
) -> None:
    async with world(tmp_path) as w:
        await filled(w, stats=ExampleStats(uses=3, credit=3, credited_quality=2))
        select, asked = w.proxy.select, job(w)
        recalled = await select.thread.run(lambda: select.retriever.recall([_query(asked, select)], asked.now)[0])
        assert select._choices(asked, recalled) is not select._choices(asked, recalled)  # only what comes again is kept
        first = select._choices(asked, recalled)
        assert select._choices(asked, recalled) is first
        await select.thread.run(lambda: lesson(w, select))
        assert told(select._choices(asked, recalled)) == anew(select, asked, recalled) != told(first)


async def test_each_way_of_asking_has_its_own(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await filled(w)
        select, asked = w.proxy.select, job(w)
        recalled = await select.thread.run(lambda: select.retriever.recall([_query(asked, select)], asked.now)[0])
        form = replace(asked.ask, form=Form())
        others = [
            asked._replace(ask=replace(asked.ask, controls=asked.ask.controls._replace(examples=1))),
            asked._replace(ask=replace(asked.ask, system="Say it in JSON.")),
            asked._replace(ask=replace(asked.ask, stop=("colour 0",))),
            asked._replace(ask=form),
            asked._replace(request_tokens=asked.students[0].context_window_tokens - 700),
            asked._replace(students=()),
        ]
        for other in [asked, *others, asked]:
            assert told(select._choices(other, recalled)) == anew(select, other, recalled)
        assert len({str(anew(select, other, recalled)) for other in [asked, *others]}) >= 4  # some see none
        assert len(recalled.__dict__["rankings"]) <= RANKINGS_KEPT


async def test_where_others_wrote_nothing_is_kept(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await filled(w, subject="somebody")
        select, asked = w.proxy.select, job(w)
        recalled = await select.thread.run(lambda: select.retriever.recall([_query(asked, select)], asked.now)[0])
        for _ in range(3):
            select._choices(asked, recalled)
        assert not recalled.__dict__["rankings"]


async def test_a_deleted_example_is_shown_no_more(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await filled(w)
        select, asked = w.proxy.select, job(w)
        assert select.at_once(asked) is None
        first = await select(asked)
        assert "e0" in {m.example.id for m in first.shown["small"]}
        again = select.at_once(asked)
        assert again is not None and (again.shown, again.considered, again.taken) == first[1:]
        assert select.at_once(asked._replace(tenant="another")) is None
        await w.proxy.learner.delete_examples(["e0"])
        assert select.at_once(asked) is None
        assert "e0" not in {m.example.id for m in (await select(asked)).considered["small"]}


async def test_another_example_leaves_what_it_has_no_part_in(tmp_path: Path) -> None:
    async with world(tmp_path, selection={"recall_k": 2}) as w:
        await filled(w)
        select, asked, other = w.proxy.select, job(w), job(w, "what is the colour of a lemon")
        for each in (asked, other):
            await select(each)
        await w.proxy.learner.access.write(
            lambda store: store.admit(
                make_example(
                    "nearer", tenant="default", at=w.proxy.wall(), request="what is the colour of a sour lemon",
                    embedder=select.retriever.embedder.identity,
                    embedding=select.retriever.embedder.embed(["what is the colour of a sour lemon"])[0],
                )
            )
        )  # fmt: skip
        await w.proxy.learner.catch_up()
        assert select.at_once(asked) is not None
        assert select.at_once(other) is None
        await select(other)
        assert "nearer" in {e.id for e, _ in select.recalls.get(*_query(other, select)).nearest}


async def test_a_verdict_counts_for_all_that_it_is_about(tmp_path: Path) -> None:
    """The examples that were shown, and what was ranked for others by what is now known."""
    async with world(tmp_path, selection={"recall_k": 1, "exploration": 0}) as w:
        await filled(w)
        select, asked, other = w.proxy.select, job(w), job(w, "what is the colour of a lemon")
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "what is the colour of grass"}]
        answered = await w.ask("", "small-model", messages=messages)
        assert answered.header("examples") != "0"
        for each in (asked, other, asked, other):
            await select(each)
        kept = select.recalls.get(*_query(other, select))
        before = select._choices(other, kept)
        assert select._choices(other, kept) is before
        await w.feedback(answered.id, score=0.0)
        await w.proxy.learner.catch_up()
        assert select.at_once(asked) is None
        assert select.recalls.get(*_query(other, select)) is kept
        assert select._choices(other, kept) is not before


def _query(asked: Job, select: Select) -> Any:
    return Query(asked.tenant, asked.ask.task, select.settings.selection.recall_k)


numbers = st.floats(-2, 2)
rows = st.lists(st.lists(st.floats(0, 1), min_size=len(COLUMNS), max_size=len(COLUMNS)), min_size=1, max_size=8)


@settings_(max_examples=40, deadline=None)
@given(rows, st.lists(numbers, min_size=len(NAMES), max_size=len(NAMES)))
def test_utility_is_its_formula(rows: list[list[float]], weights: list[float]) -> None:
    model, x = LearnedUtility(Prior({"": weights})), np.array(rows)
    c = {name: x[:, i] for i, name in enumerate(COLUMNS)}  # views
    c["credited_quality"] *= c["credit"]  # it is at most that
    c["own_quality_known"].round(out=c["own_quality_known"])
    c["own_quality"][c["own_quality_known"] == 0] = 0.5
    w = dict(zip(NAMES, weights, strict=True))
    m0 = model.mean_
    record = (c["credited_quality"] + model.kappa * m0) / (c["credit"] + model.kappa) - m0
    source = (c["own_quality"] - USUAL_QUALITY) * c["own_quality_known"]
    utility = (
        w["own"]
        + max(w["own_similarity_mean"] + w["own_similarity_max"], 0) * c["similarity"]
        + max(w["own_overlap"], 0) * c["overlap"]
        + max(w["own_vote"], 0) * c["vote"]
        + min(w["own_other_system"], 0) * (1 - c["same_system"])
        + w["own_request_length"] * c["request_length"] / 8
        + w["own_answer_length"] * c["answer_length"] / 8
        + min(w["own_age"], 0) * c["age"] / 8
        + max(w["own_record"], 0) * record
        + max(w["own_source"], 0) * source
    )
    np.testing.assert_allclose(model.predict(x), utility, atol=1e-12)
    seen = Shown(*model.seen(x).T)
    columns = (c["similarity"], c["overlap"], c["vote"], 1 - c["same_system"])
    columns += (c["request_length"] / 8, c["answer_length"] / 8, c["age"] / 8, record, source)
    np.testing.assert_allclose(seen, columns, atol=1e-12)


@settings_(max_examples=40, deadline=None)
@given(st.lists(numbers, min_size=len(NAMES), max_size=len(NAMES)), st.lists(st.floats(0, 1), max_size=5))
def test_what_is_expected_of_a_way_is_the_prior_of_its_features(weights: list[float], seen: list[float]) -> None:
    ways = Ways(Prior({"": weights}))
    shown = {Way.OWN: Shown(*[seen] * len(Shown._fields)), Way.SHARED: Shown(seen)}
    estimate = ways.estimate(NOTHING_KNOWN, "small", 33, shown)
    x = np.array([features(33, way, shown.get(way, Shown(()))) for way in WAYS])
    np.testing.assert_allclose(estimate.features, x)
    np.testing.assert_allclose(estimate.prior, ways.prior.predict(x, "small"), atol=1e-12)
    np.testing.assert_allclose(estimate.quality, estimate.prior)
