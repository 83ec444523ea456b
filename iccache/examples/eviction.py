"""What the cache keeps when it is full: a 0/1 knapsack.

    weight(e) = bytes of text + 2 * bytes of embedding       (stored, and once more in the index in memory)
    value(e)  = offloads(e) + PRIOR * decay(age) / (1 + credit(e))

offloads: successful ones that it enabled, decayed by the hour (credit.py). The second term is what an example without a
record is expected to bring: it fades with its age and with the answers that were scored without bringing any.

Up to EXACT_UP_TO examples the solution is exact. Beyond, examples are taken by value per byte as they fit, or the most
valuable one alone if that is worth more. With OPT the best value possible,

    value >= OPT / 2    and    value >= OPT - max value of one example

The second is what matters: one example among many thousands. Time: O(n log n).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from iccache import config
from iccache.examples.credit import decay
from iccache.examples.store import ExampleStore
from iccache.types import Weighed

PRIOR = 0.5  # offloads
EXACT_UP_TO = 16
DELETED_AT_ONCE = 200  # examples in one transaction, so that no writer waits long
TRIMMED_AT_ONCE = 1000
DAY_S = 86_400.0


class Thing(NamedTuple):
    """What may be kept. Newer ones go first where value per byte is equal."""

    id: str
    weight: int  # bytes, > 0
    value: float  # >= 0
    at: float = 0.0


class Eviction(NamedTuple):
    """What has to go."""

    expired: list[str]
    evicted: list[str]
    bytes: int  # of both
    kept: int
    kept_text_bytes: int
    kept_embedding_bytes: int  # stored and in the index


class Upkeep(NamedTuple):
    """What went."""

    expired: int = 0
    evicted: int = 0
    bytes: int = 0
    trimmed: int = 0


def plan(rows: Iterable[Weighed], settings: config.Cache, now: float, *, capacity_bytes: int | None = None) -> Eviction:
    """First what is older than `ttl_days`, then what does not fit into `capacity_bytes` (None: the setting's)."""
    capacity = settings.capacity_bytes if capacity_bytes is None else capacity_bytes
    oldest = now - settings.ttl_days * DAY_S if settings.ttl_days else float("-inf")
    sizes: dict[str, tuple[int, int]] = {}
    things: list[Thing] = []
    expired: list[str] = []
    for row in rows:
        sizes[row.id] = row.text_bytes, 2 * row.embedding_bytes
        if row.at < oldest:
            expired.append(row.id)
        else:
            things.append(Thing(row.id, max(1, weight(row)), value(row, now, settings.decay_per_hour), row.at))
    kept = {thing.id for thing in solve(things, capacity)}
    evicted = [thing.id for thing in things if thing.id not in kept]
    return Eviction(
        expired=expired,
        evicted=evicted,
        bytes=sum(sum(sizes[id]) for id in (*expired, *evicted)),
        kept=len(kept),
        kept_text_bytes=sum(sizes[id][0] for id in kept),
        kept_embedding_bytes=sum(sizes[id][1] for id in kept),
    )


def weight(row: Weighed) -> int:
    """Bytes of an example in the store and in the index."""
    return row.text_bytes + 2 * row.embedding_bytes


def value(row: Weighed, now: float, decay_per_hour: float) -> float:
    """In offloads; see above."""
    earned = row.offloads * decay(now - row.offloads_at, decay_per_hour)
    hoped = PRIOR * decay(now - row.at, decay_per_hour) / (1.0 + row.credit)
    return max(0.0, earned) + hoped


def solve(things: Sequence[Thing], capacity: int) -> list[Thing]:
    """What to keep: at most `capacity` bytes, of the highest value together (see above for how nearly)."""
    if sum(thing.weight for thing in things) <= capacity:
        return list(things)
    fitting = [thing for thing in things if thing.weight <= capacity]
    if len(fitting) <= EXACT_UP_TO:
        return _exact(fitting, capacity)
    return _greedy(fitting, capacity)


def _exact(things: Sequence[Thing], capacity: int) -> list[Thing]:
    """Nemhauser and Ullmann: of all subsets so far, only those are kept that no lighter one equals in value."""
    states: list[tuple[int, float, int]] = [(0, 0.0, 0)]  # weight, value, subset as bits; by weight
    for i, thing in enumerate(things):
        grown = [(w + thing.weight, v + thing.value, s | 1 << i) for w, v, s in states if w + thing.weight <= capacity]
        merged = sorted(states + grown, key=lambda state: (state[0], -state[1]))
        states = []
        for state in merged:
            if not states or state[1] > states[-1][1]:
                states.append(state)
    subset = states[-1][2]
    chosen = [thing for i, thing in enumerate(things) if subset >> i & 1]
    rest = [thing for i, thing in enumerate(things) if not subset >> i & 1]
    return chosen + _as_they_fit(rest, capacity - sum(thing.weight for thing in chosen))


def _greedy(things: Sequence[Thing], capacity: int) -> list[Thing]:
    """By value per byte; or the most valuable one, and with it what still fits, if that alone is worth more."""
    by_density = _as_they_fit(things, capacity)
    best = max(things, key=lambda thing: thing.value)
    if best.value <= sum(thing.value for thing in by_density):
        return by_density
    return [best, *_as_they_fit([t for t in things if t.id != best.id], capacity - best.weight)]


def _as_they_fit(things: Sequence[Thing], capacity: int) -> list[Thing]:
    chosen = []
    for thing in sorted(things, key=lambda t: (-t.value / t.weight, -t.at, t.id)):
        if thing.weight <= capacity:
            chosen.append(thing)
            capacity -= thing.weight
    return chosen


def upkeep(store: ExampleStore, settings: config.Config, now: float) -> Upkeep:
    """Expire, evict and trim, in transactions so short that a live proxy hardly notices."""
    due = plan(store.weighed(), settings.cache, now)
    expired = sum(store.delete_examples(ids, keep_exchanges=True) for ids in batches(due.expired))
    evicted = sum(store.delete_examples(ids, keep_exchanges=True) for ids in batches(due.evicted))
    return Upkeep(expired, evicted, due.bytes, trim(store, settings.store.keep_exchanges_days, now))


def trim(store: ExampleStore, keep_days: float, now: float) -> int:
    """Forget exchanges and changes older than `keep_days`; 0 keeps them."""
    total = 0
    while done := store.trim(now, keep_days, TRIMMED_AT_ONCE):
        total += done
    return total


def batches(ids: Sequence[str]) -> Iterator[list[str]]:
    """At most DELETED_AT_ONCE at a time."""
    left = iter(ids)
    while batch := list(islice(left, DELETED_AT_ONCE)):
        yield batch
