"""The measurement of a judge, on judges that are known."""

from __future__ import annotations

from collections.abc import Callable

from iccache.backends.judge import Verdict, position_bias
from tests.bench.judge import Pair, judged, kept, lines
from tests.bench.quality.answers import Messages, Said


class Known:
    """A judge that is a function of its prompt."""

    def __init__(self, say: Callable[[str], str]) -> None:
        self.say = say

    def knows(self, messages: Messages, max_tokens: int) -> bool:
        return True

    def get(self, messages: Messages, max_tokens: int) -> Said:
        return Said(self.say(messages[0]["content"]), 0, 0, 0, 0.0, 0.0)


def fair(pairs: list[Pair]) -> Callable[[str], str]:
    right = {p.right for p in pairs}

    def say(prompt: str) -> str:
        first = prompt.partition("--- answer A ")[2].partition("\n")[2].partition("\n--- answer B ")[0]
        return "A" if first in right else "B"

    return say


def test_a_judge_that_is_right_is_found_to_be_and_one_that_takes_the_first_to_decide_nothing() -> None:
    pairs = [Pair("occupations", f"Request {i}", f"right {i}", f"wrong {i}", i % 3 == 0, False) for i in range(9)]
    found, preferred, tally = judged(Known(fair(pairs)), pairs, ask=False)  # type: ignore[arg-type]
    assert found == pairs and preferred == [1.0] * 9 and position_bias(tally) == 0.0
    assert "| all | 9 | 9 | 0 | 0 | 1.00 [0.70, 1.00] |" in list(lines("judge", found, preferred, tally))
    found, preferred, tally = judged(Known(lambda _: "A"), pairs, ask=False)  # type: ignore[arg-type]
    assert preferred == [0.5] * 9 and tally == {Verdict.FIRST: 18} and position_bias(tally) == 1.0
    assert any("not believed" in line for line in lines("judge", found, preferred, tally))


def test_the_pairs_on_file_have_one_right_answer_each() -> None:
    pairs = kept()
    assert len(pairs) == 60 and all(p.right != p.wrong for p in pairs)
    assert 15 <= sum(p.right_first for p in pairs) <= 45
