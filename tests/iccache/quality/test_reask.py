from __future__ import annotations

from typing import Any

from iccache.quality.reask import Reasks
from tests.iccache.quality.test_checks import exchange

QUESTION = "How do I reverse a list in Python without changing the original one?"


def asked(number: int, at: float, task: str = QUESTION, **changes: Any) -> Any:
    who = {"session": "s"} | changes
    return exchange(request_id=f"r{number}", at=at, task=task, latency_s=1.0, **who)


def noticed(*exchanges: Any) -> list[str | None]:
    reasks = Reasks()
    found = [reasks.notice(e) for e in exchanges]
    return [None if f is None else f.request_id for f in found]


def test_the_same_again_soon_says_that_the_answer_before_did_not_do() -> None:
    again = "how do I reverse a list in Python, without changing the original one"
    assert noticed(asked(1, 0.0), asked(2, 20.0, again)) == [None, "r1"]


def test_what_is_no_sign_of_it() -> None:
    assert noticed(asked(1, 0.0), asked(2, 20.0, "And how do I sort it?")) == [None, None]
    assert noticed(asked(1, 0.0), asked(2, 500.0)) == [None, None], "much later"
    assert noticed(asked(1, 0.0), asked(2, 1.5)) == [None, None], "a program's retry"
    assert noticed(asked(1, 0.0, session=None), asked(2, 20.0, session=None)) == [None, None], "nobody knows who asks"
    assert noticed(asked(1, 0.0), asked(2, 20.0, session="other")) == [None, None]
    assert noticed(asked(1, 0.0, complete=False), asked(2, 20.0)) == [None, None], "there was no answer to like"
    assert noticed(asked(1, 0.0), asked(2, 20.0, tenant="another")) == [None, None]


def test_a_program_that_keeps_asking_is_told_once() -> None:
    assert noticed(*(asked(i, 20.0 * i) for i in range(6))) == [None, "r0", None, None, None, None]


def test_a_subject_is_a_user_too() -> None:
    mine = {"session": None, "subject": "u"}
    assert noticed(asked(1, 0.0, **mine), asked(2, 9.0, **mine)) == [None, "r1"]
