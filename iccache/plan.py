"""Who may answer a request, before anything is looked up: pins, sessions, windows, dialects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import TYPE_CHECKING

from iccache import config
from iccache.config import Placement
from iccache.errors import RequestError
from iccache.examples.selector import example_tokens
from iccache.price import expected, price
from iccache.types import Ask, BackendScore, Considered, Controls, DecisionKind, Match, Reason, Taken, Vector

if TYPE_CHECKING:
    from router.types import Decision

HEADER_BACKEND = "x-iccache-backend"
HEADER_EXAMPLES = "x-iccache-examples"
HEADER_STORE = "x-iccache-store"
HEADER_SESSION = "x-iccache-session"
NO = frozenset({"no", "false", "0", "off"})
YES = frozenset({"yes", "true", "1", "on"})
_NO_DIRECTIVES: frozenset[str] = frozenset()


@dataclass(slots=True)
class Plan:
    """What is to be done with one request. Never changed once made: not frozen, since that makes making it slow."""

    order: tuple[str, ...]  # backends to ask, first to last
    kind: DecisionKind
    reason: Reason | None = None
    candidates: tuple[config.Backend, ...] = ()  # whom the router may choose among, cheapest first
    students: tuple[config.Backend, ...] = ()  # candidates that may be shown examples
    request_tokens: int = 0
    turns: int = 1
    system: str = ""  # the system prompt
    most_output: int | None = None  # tokens that the client allows the answer
    covered: Mapping[str, int] = field(default_factory=dict)  # tokens of what was said before, by where examples go
    warm: str | None = None  # the backend that answered the turn before this one, and so may have those in its cache
    embedding: Vector | None = None
    shown: Mapping[str, tuple[Match, ...]] = field(default_factory=dict)  # by backend, in the order shown
    considered: Mapping[str, tuple[Match, ...]] = field(default_factory=dict)  # by backend, best first
    taken: Mapping[str, Taken] = field(default_factory=dict)  # by backend: the way its examples are shown
    decision: Decision | None = None

    @property
    def settled(self) -> bool:
        """Nothing to look up: the backend is known and is shown no examples."""
        return self.kind is DecisionKind.BYPASS or (self.kind is DecisionKind.PINNED and not self.students)

    def plain(self, reason: Reason, order: tuple[str, ...]) -> Plan:
        """The same request past the cache, because of `reason`."""
        return replace(
            self,
            order=order,
            kind=DecisionKind.BYPASS,
            reason=reason,
            embedding=None,
            shown={},
            considered={},
            taken={},
            decision=None,
        )

    def again(self) -> Plan:
        """A copy, to be completed by whoever makes it: `dataclasses.replace` takes five times as long."""
        return Plan(*_values(self))

    def expected_usd(self, backend: config.Backend, placement: Placement) -> float:
        """What this request is expected to cost at `backend`, the examples it would be shown included."""
        shown = self.shown.get(backend.name, ())
        kept = self.covered.get(placement if shown else "none", 0) if backend.name == self.warm else 0
        return expected(
            backend,
            request_tokens=self.request_tokens,
            example_tokens=sum(example_tokens(m.example) for m in shown),
            covered_tokens=kept,
            most_output=self.most_output,
        )

    def considered_for(self, backend: str) -> list[Considered]:
        """What the record keeps of the examples considered for `backend`; where it is shown none, of those considered
        for the cheapest student, which the router saw all the same."""
        if not self.considered:
            return []
        shown = {m.example.id for m in self.shown.get(backend, ())}
        considered = self.considered.get(backend) or next(iter(self.considered.values()), ())
        return [Considered(m.example.id, m.similarity, m.utility, m.example.id in shown) for m in considered]

    def scores(self) -> list[BackendScore]:
        """What the record keeps of the router's choice."""
        d = self.decision
        if d is None:
            return []
        return [
            BackendScore(name, float(d.scores[i]), float(d.load_bias[i]), float(d.probabilities[i]))
            for i, name in enumerate(d.names)
        ]


_values = attrgetter(*Plan.__slots__)


class Directory:
    """The backends by name and model, and the orders in which they are asked."""

    def __init__(self, settings: config.Config) -> None:
        self.settings = settings
        self.by_price = tuple(settings.by_price())
        self.names = {b.name: b for b in self.by_price}
        self.models = {b.model: b for b in reversed(self.by_price)}
        self.students = frozenset(b.name for b in settings.students())
        self.teachers = frozenset(b.name for b in settings.teachers())
        self._speaking: dict[str, tuple[config.Backend, ...]] = {
            name: tuple(b for b in self.by_price if name in b.dialects)
            for name in {name for b in self.by_price for name in b.dialects}
        }
        dearest = price(self.by_price[-1]) if self.by_price else 0.0
        # each one's price as a share of the dearest's, in [0, 1]; 1 where all are free
        self.relative_costs = {b.name: price(b) / dearest if dearest else 1.0 for b in self.by_price}
        self.narrowest = min((b.context_window_tokens for b in self.by_price), default=0)
        self.unrecorded = frozenset(t.name for t in settings.tenants if not t.store)
        self.quarantined = frozenset(t.name for t in settings.tenants if t.quarantine)

    def keeps(self, tenant: str) -> bool:
        """Whether anything of this tenant may be recorded."""
        return tenant not in self.unrecorded

    def quarantines(self, tenant: str) -> bool:
        """Whether this tenant wants evidence before an example is shown."""
        return tenant in self.quarantined

    def speaking(self, dialect: str) -> tuple[config.Backend, ...]:
        """Backends that speak `dialect`, cheapest first. Raises RequestError where none does."""
        found = self._speaking.get(dialect)
        if not found:
            raise RequestError(404, f"no backend speaks this API ({dialect})", code="dialect_not_supported")
        return found

    def teacher(self, among: Sequence[config.Backend]) -> config.Backend:
        """The dearest teacher among some; the dearest of them where none is a teacher."""
        return next((b for b in reversed(among) if b.name in self.teachers), among[-1])

    def with_fallbacks(self, first: config.Backend, among: Sequence[config.Backend]) -> tuple[str, ...]:
        """`first`, then the dearer ones in ascending price, then the rest."""
        place = among.index(first)
        return tuple(b.name for b in (first, *among[place + 1 :], *among[:place]))

    def named(self, model: str) -> config.Backend | None:
        """The backend that `model` names, by its name or its model."""
        return self.names.get(model) or self.models.get(model)

    def is_routed(self, model: str) -> bool:
        """Whether `model` leaves the choice to the router."""
        routed = self.settings.routing.models
        return model in routed or ("*" in routed and self.named(model) is None)

    def pinned(self, ask: Ask, speaking: Sequence[config.Backend]) -> config.Backend | None:
        """The backend that the client insists on, or None. Raises RequestError where it names one that is not there."""
        if ask.controls.backend is not None:
            backend = self.names.get(ask.controls.backend)
            if backend is None:
                raise RequestError(
                    400,
                    f"no backend is named {ask.controls.backend!r}; there are: {', '.join(self.names)}",
                    param=HEADER_BACKEND,
                    code="backend_not_found",
                )
        elif self.is_routed(ask.model):
            return None
        else:
            backend = self.named(ask.model)
            if backend is None:
                known = ", ".join([*self.settings.routing.models, *self.names])
                raise RequestError(
                    404,
                    f"the model {ask.model!r} does not exist; there are: {known}",
                    param="model",
                    code="model_not_found",
                )
        if backend not in speaking:
            raise RequestError(
                400,
                f"the backend {backend.name} does not speak this API; those that do: "
                + ", ".join(b.name for b in speaking),
                param="model",
                code="dialect_not_supported",
            )
        return backend

    def needs_no_count(self, ask: Ask) -> bool:
        """Whether it decides nothing how many tokens `ask` has: it goes to a backend that is shown no examples, and is
        too short to be too long for any student. No character has more than four tokens."""
        if ask.controls.backend is not None:
            pin = self.names.get(ask.controls.backend)
        else:
            pin = None if self.is_routed(ask.model) else self.named(ask.model)
        return pin is not None and pin.name not in self.students and 4 * len(ask.prompt) + 100 < self.narrowest

    def plan(self, ask: Ask, session_backend: str | None, request_tokens: int, warm: str | None = None) -> Plan:
        """Who may answer `ask`, and whether examples and the router are asked at all.

        `warm`: the backend that answered the turn before, where it is known.
        """
        speaking = self.speaking(ask.dialect)
        pin = self.pinned(ask, speaking)
        sticky = next((b for b in speaking if b.name == session_backend), None) if session_backend else None
        students = tuple([b for b in speaking if b.name in self.students and request_tokens < b.context_window_tokens])
        reason = ask.bypass
        if reason is None and not students and any(b.name in self.students for b in speaking):
            reason = Reason.TOO_LONG
        first = pin or sticky or self.teacher(speaking)
        order = (first.name,) if pin else self.with_fallbacks(first, speaking)
        kind = DecisionKind.ROUTED
        candidates: tuple[config.Backend, ...] = ()
        shown: tuple[config.Backend, ...] = ()
        if reason is not None:
            kind = DecisionKind.BYPASS
        elif pin or sticky:
            kind = DecisionKind.PINNED if pin else DecisionKind.ROUTED
            candidates = (first,)
            shown = (first,) if first in students and not ask.plain else ()
        else:
            candidates = tuple([b for b in speaking if b.name not in self.students or b in students])
            shown = () if ask.plain else students
        return Plan(
            order,
            kind,
            reason=reason,
            candidates=candidates,
            students=shown,
            request_tokens=request_tokens,
            turns=ask.turns,
            system=ask.system,
            most_output=ask.max_output_tokens,
            covered=_covered(ask, request_tokens),
            warm=warm,
        )


def _covered(ask: Ask, request_tokens: int) -> Mapping[str, int]:
    """Tokens at the beginning of a prompt that are what they were at the turn before, by where examples go.

    Examples differ from turn to turn, so all that followed them then is new now. Estimated by the share of the text.
    """
    if not ask.before:
        return {}
    share = request_tokens / len(ask.prompt)
    characters = {"none": len(ask.before), "start": len(ask.system), "end": ask.long_before_chars}
    return {where: int(count * share) for where, count in characters.items()}


def read_controls(headers: Mapping[str, str], body: Controls) -> Controls:
    """The body's controls with the headers' laid over them. Raises RequestError for a value that is none."""
    lines = [value for name, value in headers.items() if len(name) == 13 and name.lower() == "cache-control"]
    directives = {d.strip().lower() for line in lines for d in line.split(",")} if lines else _NO_DIRECTIVES
    examples = body.examples
    if HEADER_EXAMPLES in headers:
        examples = min(map(_cap, _every(headers, HEADER_EXAMPLES)))
    if "no-cache" in directives:
        examples = 0
    store = body.store is True
    if HEADER_STORE in headers:
        store = body.store is not False and all(list(map(_is_yes, _every(headers, HEADER_STORE))))
    return Controls(
        backend=headers.get(HEADER_BACKEND, body.backend),
        examples=examples,
        store=store and "no-store" not in directives,
        reuse=body.reuse and "no-cache" not in directives,
        session=_session(headers) or body.session,
    )


def _every(headers: Mapping[str, str], name: str) -> list[str]:
    """What a header says, once for each time that it says something: the most careful of them counts."""
    lines = [value for key, value in headers.items() if len(key) == len(name) and key.lower() == name]
    return [value.strip() for line in lines for value in line.split(",")]


def _cap(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise RequestError(400, f"{HEADER_EXAMPLES} is a whole number from 0 up, not {text!r}", param=HEADER_EXAMPLES)
    return int(text[:9])


def _is_yes(text: str) -> bool:
    word = text.lower()
    if word not in NO and word not in YES:
        raise RequestError(400, f"{HEADER_STORE} is yes or no, not {text!r}", param=HEADER_STORE)
    return word in YES


def _session(headers: Mapping[str, str]) -> str | None:
    """The session's name. Raises RequestError where it is no text, which no record could hold."""
    text = headers.get(HEADER_SESSION, "").strip()
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):  # how bytes that are no UTF-8 arrive
        raise RequestError(400, f"{HEADER_SESSION} is not UTF-8", param=HEADER_SESSION)
    return text or None
