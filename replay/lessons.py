"""What serving learns from replay: the prior of the ways to show examples, shared sets, and the threshold of utility.

They are kept as states in the store, and every proxy takes them over within seconds (`iccache/learn/lessons.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from iccache.config import Backend
from iccache.examples.selector import THRESHOLD_STATE
from iccache.examples.shared import SETS_STATE, SetOf, build_set, centre_of, clusters, pack, unpack
from iccache.examples.showing import price_of
from iccache.examples.store import ExampleStore
from iccache.examples.training import Scored, calibration, fit
from iccache.examples.traits import application
from iccache.examples.ways import NAMES, PRIOR_STATE, Prior, Way
from iccache.price import cost, price
from iccache.types import Example, Exchange
from replay.doubt import NOTHING_KNOWN, UNKNOWN, Doubt, among
from replay.threshold import Shown, Threshold, choose

LEAST_ANSWERS = 50  # scored, with the way that was taken, before weights are trained on them
ANSWERS = 20_000  # the newest that are learned from
LEAST_EXAMPLES = 24  # of a kind of request, before it gets a shared set
EXAMPLES = 2048  # the newest of a kind that a set stands for
NO_SYSTEM = f"{application(''):016x}"
LIKELY_WRONG = 0.5  # doubt at which an example leaves its set; above what keeps it out, so that sets do not flicker
GROWN = 2.0  # by how much a kind has to grow before its set is made anew


def train(store: ExampleStore) -> dict[str, Any] | None:
    """Train the prior on what was scored, and keep it; what there is to report, or None where there is too little."""
    answers = scored(store)
    if len(answers) < LEAST_ANSWERS:
        return None
    kept = store.load_state(PRIOR_STATE)
    before = None if kept is None else _restored(kept[1])
    prior = fit(answers)
    measured = calibration(answers)
    store.save_state(PRIOR_STATE, store.last_change(), prior.state())
    return {
        "answers": len(answers),
        "students": sorted(student for student in prior.weights if student),
        "brier": measured.brier,
        "brier_of_mean": measured.brier_of_mean,
        "bins": measured.bins,
        "changed": before is None or before.state() != prior.state(),
    }


def _restored(state: bytes) -> Prior | None:
    try:
        return Prior.restored(state)
    except ValueError:
        return None


def scored(store: ExampleStore) -> list[Scored]:
    """What the newest scored answers of students teach, in the order they came."""
    found = [lesson for exchange in store.latest_scored(ANSWERS) if (lesson := _lesson(exchange)) is not None]
    return found[::-1]


def _lesson(exchange: Exchange) -> Scored | None:
    x = exchange.extra.get("way", {}).get("x", ())
    if exchange.quality is None or len(x) != len(NAMES):
        return None
    return Scored(exchange.backend, f"{exchange.tenant}\n{application(exchange.system):x}", x, exchange.quality)


def choose_threshold(store: ExampleStore, backends: Mapping[str, Backend]) -> Threshold | None:
    """Choose the threshold of utility anew, and keep it; None, and nothing kept, where no answer tells anything."""
    answers = [a for e in store.latest_scored(ANSWERS) if (a := _with_own(e, backends)) is not None]
    if not answers:
        return None
    chosen = choose(answers)
    kept, state = store.load_state(THRESHOLD_STATE), chosen.state()
    if kept is None or kept[1] != state:
        store.save_state(THRESHOLD_STATE, store.last_change(), state)
    return chosen


def _with_own(exchange: Exchange, backends: Mapping[str, Backend]) -> Shown | None:
    """What a scored answer says of the examples that were chosen for its request."""
    way = exchange.extra.get("way", {})
    left_out = way.get("left_out")
    utilities = {c.id: c.utility for c in exchange.considered if c.shown or c.id == left_out}
    if exchange.quality is None or way.get("way") != Way.OWN or len(utilities) < 2:
        return None
    return Shown(
        f"{exchange.backend}\n{exchange.tenant}\n{application(exchange.system):x}",
        exchange.quality,
        list(utilities.values()),
        utilities.get(left_out),
        _price(exchange, backends),
    )


def _price(exchange: Exchange, backends: Mapping[str, Backend]) -> float:
    """Of the tokens of one example, as a share of what the student saves. 0 where its price is not known."""
    student, count = backends.get(exchange.backend), len(exchange.shown)
    if student is None or not count:
        return 0.0
    dearest = max(backends.values(), key=price)
    usage = exchange.usage
    plain = usage._replace(input=max(usage.input - usage.example, 0), cached=0, example=0)
    saved = cost(dearest, plain) - cost(student, plain)
    return price_of(usage.example / count * student.usd_per_million_input_tokens / 1e6, saved)


def build_sets(store: ExampleStore, tenant: str | None = None) -> int:
    """Build the shared sets that are missing or out of date; how many there are then.

    An example enters none where its answer is doubted more than that of one of which nothing is known, as it is where
    its near neighbours contradict it: see doubt.py. A set stays as it is, so that engines keep it computed, until one
    of its examples is gone, held, known to be bad or likely to be, or its kind of request has grown GROWN times since.
    Those of a tenant's requests without a system prompt, which
    are told apart by what is asked, are made anew together.
    """
    kept = store.load_state(SETS_STATE)
    old: dict[tuple[str, str], list[SetOf]] = {}
    for one in [] if kept is None else _unpacked(kept[1]):
        old.setdefault((one.tenant, NO_SYSTEM if one.centre else one.system), []).append(one)
    sets = [s for (owner, _), some in old.items() if tenant is not None and owner != tenant for s in some]
    for (owner, name), (count, newest) in _kinds(store.each_example(tenant)).items():
        known = old.get((owner, name), [])
        doubts = among(newest)
        good = all(count < GROWN * s.examples and _still_good(s, store, newest[0].embedder, doubts) for s in known)
        doubted = {id for id, doubt in doubts.items() if doubt.wrong > UNKNOWN}
        sets += known if known and good else _new_sets(owner, name, count, newest, doubted)
    blob = pack(sorted(sets, key=lambda s: (s.tenant, s.system)))
    if kept is None or kept[1] != blob:
        store.save_state(SETS_STATE, store.last_change(), blob)
    return len(sets)


def _new_sets(owner: str, name: str, count: int, newest: Sequence[Example], doubted: Collection[str]) -> list[SetOf]:
    """Of one kind that a system prompt names, or of all that none does; without the examples `doubted`."""
    if count < LEAST_EXAMPLES:
        return []
    if name != NO_SYSTEM:
        chosen = build_set([e for e in newest if e.id not in doubted])
        return [SetOf(owner, name, [e.id for e in chosen], count)] if chosen else []
    sets = []
    for number, rows in enumerate(clusters(newest, LEAST_EXAMPLES)):
        members = [newest[row] for row in rows]
        if chosen := build_set([e for e in members if e.id not in doubted]):
            centre, reach = centre_of(members)
            ids = [e.id for e in chosen]
            sets.append(SetOf(owner, f"{number:x}", ids, count, [round(float(x), 5) for x in centre], reach))
    return sets


def _unpacked(state: bytes) -> list[SetOf]:
    try:
        return unpack(state)
    except ValueError:
        return []


def _kinds(examples: Iterable[Example]) -> dict[tuple[str, str], tuple[int, list[Example]]]:
    """By tenant and system prompt, NO_SYSTEM for none: how many examples there are, and the newest of them."""
    count: dict[tuple[str, str], int] = {}
    newest: dict[tuple[str, str], deque[Example]] = {}
    for example in examples:
        if example.held is None:
            name = (example.tenant, f"{application(example.system):016x}")
            count[name] = count.get(name, 0) + 1
            newest.setdefault(name, deque(maxlen=EXAMPLES)).append(example)
    found = {}
    for name, some in newest.items():
        model = some[-1].embedder  # while examples are being embedded anew, those of the newest model stand for all
        found[name] = (count[name], [e for e in some if e.embedder == model])
    return found


def _still_good(known: SetOf, store: ExampleStore, embedder: str, doubts: Mapping[str, Doubt]) -> bool:
    examples = store.examples(known.ids)
    return len(examples) == len(known.ids) and all(
        e.held is None
        and e.embedder == embedder
        and (e.stats.own_quality is None or e.stats.own_quality >= 0.5)
        and doubts.get(e.id, NOTHING_KNOWN).wrong <= LIKELY_WRONG
        for e in examples
    )
