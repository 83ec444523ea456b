"""Which examples are worth asking again, in which order, and what that can cost. Nothing here calls anybody.

A replay is worth its price where an example is used, what it is used for goes badly, and a better answer can still be
hoped for. Examples are taken in descending order of expected gain per dollar,

    score(e) = chance(e) * need(e) * demand(e) / cost(e)

    demand(e) = (1 + uses(e)) / (1 + age in days): how often what is gained is gained
    chance(e) = 2 * D(e) / (2 + rounds(e))   that a round finds a better answer, after so many that did not
    need(e)   = max(G(e), 0.1 * S(e), 0.1 * O(e), 0.1 * D(e) where it was shown, never asked again, and D(e) > 0.5)
    G(e)      the EMA of (1 - quality) * relative cost over the answers it was shown for (credit.gain)
    S(e)      (1 - mean quality of those answers) * (1 - 0.8 ** credit(e))
    O(e)      1 - the quality of its own answer, where that is known and below 0.5; else 0
    D(e)      the probability that its answer is wrong, by what is on file; see doubt.py. What answers with it were like
              tells little of that: a weak student fails with good examples too, and with three of them at a time
    cost(e)   expected USD of a round: `samples` answers of the teacher, each compared with the best in both orders;
              1 where that is free

S is what G would be if every backend cost the same. It is there because the cheapest backend has relative cost 0, so
that G stays 0 where it is the only student. O is there for an example that was never used: nothing is known of what it
leads to, so it is asked again only if its answer is known to be bad. Never asked again: an example after `max_rounds`
rounds, one whose own answer is known to be perfect (quality 1: users approved it, or wrote it), and one with
need < WORTH, for which there is nothing to gain.

While it runs, the order has an end too: see cutoff.py.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from iccache import config
from iccache.backends import judge
from iccache.errors import ConfigError
from iccache.examples.credit import GAIN_STEP, GOOD_ENOUGH
from replay import cutoff
from replay.doubt import NOTHING_KNOWN, Doubt
from replay.prices import NUSD, most_input_tokens, nusd
from replay.store import Record

EQUAL_COST = 0.1  # the relative cost that S and O are given
WORTH = 0.001
BYTES_PER_TOKEN = 4
LEAST_OUTPUT_TOKENS = 16
USUAL_OUTPUT_TOKENS = 1024  # room for any answer; longer ones get twice their length
JUDGE_PROMPT_BYTES = len(judge.prompt("", "", ""))


class Models(NamedTuple):
    """Who is asked again, and who compares; and whose answers a good example saves, by whom."""

    teacher: config.Backend
    judge: config.Backend
    dearest: config.Backend | None = None
    student: config.Backend | None = None  # the cheapest

    @property
    def pays_in_money(self) -> bool:
        """Whether a good answer of the student costs less than the dearest backend's."""
        if self.student is None or self.dearest is None:
            return False
        return _price(self.student) < _price(self.dearest)


class Candidate(NamedTuple):
    """An example that is worth asking again."""

    id: str
    need: float
    score: float
    rounds: int  # so far
    expected_nusd: int
    most_nusd: int
    lost_nusd: float = 0.0  # what answers that go wrong with it cost within `payback_days`; see cutoff.py
    doubt: Doubt = NOTHING_KNOWN


def models(settings: config.Config) -> Models:
    """The dearest teacher, and `judge.backend` or else the dearest backend. Raises ConfigError where there is none."""
    speaking = [b for b in settings.by_price() if "chat" in b.dialects]
    if not speaking:
        raise ConfigError("backends: replay needs one that speaks chat completions")
    teachers = {b.name for b in settings.teachers()}
    teacher = next((b for b in reversed(speaking) if b.name in teachers), None)
    if teacher is None:
        raise ConfigError(f"backends: no teacher speaks chat completions ({', '.join(sorted(teachers))})")
    named = settings.judge.backend
    chosen = next((b for b in reversed(speaking) if named in (None, b.name)), None)
    if chosen is None:
        raise ConfigError(f"judge.backend: {named} does not speak chat completions")
    return Models(teacher, chosen, settings.by_price()[-1], next(iter(settings.students()), None))


def rank(
    rows: Iterable[Record],
    settings: config.Replay,
    asked: Models,
    limit: int | None = None,
    *,
    now: float,
    shown: int = 3,
    doubts: Mapping[str, Doubt] = MappingProxyType({}),
    usual: Doubt = NOTHING_KNOWN,
) -> list[Candidate]:
    """The examples worth asking again, best first; at most `limit`. Ties go to the greater need, then by id.

    `shown`: examples that a student is usually shown. `doubts`: by id; `usual` where there are none.
    """
    candidates = (
        c for row in rows if (c := candidate(row, settings, asked, now, shown, doubts.get(row.id, usual))) is not None
    )
    if limit is not None:
        return heapq.nsmallest(limit, candidates, key=_order)
    return sorted(candidates, key=_order)


def candidate(
    row: Record, settings: config.Replay, asked: Models, now: float, shown: int = 3, doubt: Doubt = NOTHING_KNOWN
) -> Candidate | None:
    """`row` with its score; None when it is not to be asked again."""
    wanted = need(row, doubt.wrong)
    output = output_tokens(row.tokens, row.system_bytes, asked.teacher)
    if row.replays >= settings.max_rounds or row.own_quality == 1.0 or wanted < WORTH or output is None:
        return None
    expected = expected_nusd(row, settings.samples, asked)
    return Candidate(
        id=row.id,
        need=wanted,
        score=chance(row.replays, doubt.wrong) * wanted * demand(row, now) / (expected / NUSD or 1.0),
        rounds=row.replays,
        expected_nusd=expected,
        most_nusd=most_nusd(row, settings.samples, asked, output),
        lost_nusd=cutoff.lost(row, settings.payback_days, now)
        * cutoff.gap_nusd(row, asked.student, asked.dearest, shown),
        doubt=doubt,
    )


def need(row: Record, doubt: float = NOTHING_KNOWN.wrong) -> float:
    """max(G, 0.1 * S, 0.1 * O), and 0.1 * `doubt` where that alone is reason enough, in [0, 1]."""
    shown = own = 0.0
    if row.credit > 0:
        mean = min(1.0, max(0.0, row.credited_quality / row.credit))
        shown = (1.0 - mean) * (1.0 - (1.0 - GAIN_STEP) ** row.credit)
    if row.own_quality is not None and row.own_quality < GOOD_ENOUGH:
        own = 1.0 - row.own_quality
    alone = doubt if doubt > 0.5 and row.uses > 0 and row.replays == 0 else 0.0
    return max(row.gain, EQUAL_COST * max(shown, own, alone))


def demand(row: Record, now: float) -> float:
    """Uses per day, smoothed: (1 + uses) / (1 + days since it was admitted)."""
    return (1.0 + row.uses) / (1.0 + max(0.0, now - row.at) / cutoff.DAY_S)


def chance(rounds: int, doubt: float) -> float:
    """After `rounds` failures: the mean of a Beta(2 * doubt, 2 * (1 - doubt)) that has seen them.

    Laplace's rule of succession where doubt is 1/2. A success sets the gain to 0 and is asked no more.
    """
    return 2.0 * doubt / (2.0 + rounds)


def output_tokens(tokens: int, system_bytes: int, teacher: config.Backend) -> int | None:
    """How long a new answer may be, where request and old answer have `tokens`; None where the window has no room."""
    prompt = tokens + system_bytes // BYTES_PER_TOKEN + most_input_tokens((0, 0))
    room = teacher.context_window_tokens - prompt
    return min(room, max(USUAL_OUTPUT_TOKENS, 2 * tokens)) if room >= LEAST_OUTPUT_TOKENS else None


def most_nusd(row: Record, samples: int, asked: Models, output: int) -> int:
    """The most that one round can cost."""
    answer = nusd(asked.teacher, most_input_tokens((row.system_bytes, row.request_bytes)), output)
    new, question = output * BYTES_PER_TOKEN, row.system_bytes + row.request_bytes + 2  # a line between them
    longest = max(row.answer_bytes, new)
    shown = most_input_tokens((JUDGE_PROMPT_BYTES + question + longest + new,))
    return samples * (answer + 2 * nusd(asked.judge, shown, judge.VERDICT_TOKENS))


def expected_nusd(row: Record, samples: int, asked: Models) -> int:
    """What one round will cost if the new answers are as long as the old."""
    question, old = row.system_bytes + row.request_bytes, row.answer_bytes // BYTES_PER_TOKEN
    answer = nusd(asked.teacher, question // BYTES_PER_TOKEN, old)
    shown = (JUDGE_PROMPT_BYTES + question) // BYTES_PER_TOKEN + 2 * old
    return samples * (answer + 2 * nusd(asked.judge, shown, 1))


def covered(candidates: Sequence[Candidate], budget_nusd: int) -> int:
    """How many of them a budget covers even if each costs the most it can, skipping those that do not fit."""
    count = 0
    for one in candidates:
        if one.most_nusd <= budget_nusd:
            budget_nusd -= one.most_nusd
            count += 1
    return count


def _price(backend: config.Backend) -> float:
    return backend.usd_per_million_input_tokens + backend.usd_per_million_output_tokens


def _order(one: Candidate) -> tuple[float, float, str]:
    return -one.score, -one.need, one.id
