"""The router's promise, on a few of the worlds and runs of `tests/bench/routing.py`, which has many."""

import pytest

from iccache import config
from iccache.examples.embed import make_embedder
from router.linear import LinearThompson
from tests.bench.routing import Texts, holds, run, worlds


@pytest.mark.parametrize("name", ["plain", "bernoulli", "late", "three", "stars"])
def test_two_kinds_are_told_apart_and_a_student_that_breaks_is_dropped(name):
    world, texts = worlds()[name], Texts(make_embedder(config.Embedder(backend="hash")))
    texts.embed([*world.mastered.texts, *world.other.texts])
    shares = run(world, texts, LinearThompson(), seed=31)
    assert holds(shares) == (True, True, True), shares
