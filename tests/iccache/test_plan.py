"""Where the number of tokens is not counted, it would have decided nothing."""

from __future__ import annotations

from dataclasses import fields

import pytest

from iccache import config
from iccache.plan import Directory, Plan
from iccache.types import Ask, Controls

SETTINGS = config.parse(
    {
        "backends": [
            {"name": "small", "base_url": "http://h/v1", "model": "s", "context_window_tokens": 300},
            {"name": "large", "base_url": "http://h/v1", "model": "l", "usd_per_million_output_tokens": 1.0},
        ]
    }
)


def asking(model: str, prompt: str, **controls: str) -> Ask:
    return Ask("chat", b"{}", model, False, prompt, prompt=prompt, controls=Controls(**controls))  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [0, 1, 299])
def test_what_is_not_counted_decides_nothing(tokens: int) -> None:
    directory = Directory(SETTINGS)
    for ask in (asking("l", "x" * 49), asking("large", "x"), asking("auto", "x", backend="large")):
        assert directory.needs_no_count(ask)
        made = directory.plan(ask, None, tokens)
        assert (made.order, made.kind, made.reason, made.students) == (("large",), "pinned", None, ())


def test_what_may_be_too_long_or_is_shown_examples_is_counted() -> None:
    directory = Directory(SETTINGS)
    for ask in (
        asking("l", "x" * 51),  # 51 characters can be 204 tokens, and a margin
        asking("auto", "x"),
        asking("small", "x"),
        asking("l", "x", backend="small"),
        asking("nobody", "x"),
        asking("l", "x", backend="nobody"),
    ):
        assert not directory.needs_no_count(ask)


def test_a_plan_made_again_is_the_same_but_for_what_is_put_into_it() -> None:
    """Every field is told apart by its value, so that none takes another's place."""
    plan = Plan(*map(str, range(len(fields(Plan)))))  # type: ignore[arg-type]
    again = plan.again()
    assert again == plan and again is not plan
    again.decision = None
    assert plan.decision is not None
