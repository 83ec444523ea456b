"""The words everyone shares. Imports nobody.

Times are Unix seconds unless named `_s` (durations). Qualities are in [0, 1]. Money is US dollars.
A missing value is None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]  # (dim,), unit norm where it is an embedding
Matrix = NDArray[np.float32]  # (n, dim)


class DecisionKind(StrEnum):
    """`x-iccache-decision`: the first that holds."""

    CACHED = "cached"
    FALLBACK = "fallback"
    BYPASS = "bypass"
    PINNED = "pinned"
    ROUTED = "routed"
    COMPARED = "compared"  # in the record alone: asked in the background, to be compared; no client saw it


class Reason(StrEnum):
    """`x-iccache-reason`: why a request bypassed the cache, or fell back. A closed list."""

    # bypass: the request cannot be augmented
    ENDPOINT = "endpoint"  # another path than chat completions, responses and messages
    TOOL_LOOP = "tool_loop"  # a tool's result is the last message
    MULTIMODAL = "multimodal"  # images, audio or files
    N = "n"  # more than one answer is asked for
    EMPTY = "empty"  # no user text
    TOO_LONG = "too_long"  # longer than any student's window
    PREFILL = "prefill"  # the last message is the assistant's: to be continued, not answered
    STATEFUL = "stateful"  # the conversation lives upstream (previous_response_id and the like)
    UNREADABLE = "unreadable"  # valid JSON whose messages have a shape that is not known here
    # bypass: the cache failed softly
    TIMEOUT = "decision_timeout"  # embedding, recall, ranking or routing took too long
    FAILED = "decision_failed"  # one of them failed
    # fallback: why the first choice did not answer
    CONNECT = "connect"  # no connection
    RESET = "reset"  # the connection broke before the first byte; of what is no stream, before the last
    SLOW = "timeout"  # no byte in time
    STATUS = "status"  # 408, 429 or 5xx
    REDIRECT = "redirect"  # it sends the client elsewhere
    TOO_LARGE = "too_large"  # its answer, which is no stream, is longer than it may be
    CIRCUIT = "circuit_open"  # it failed too often lately
    RETRY_AFTER = "retry_after"  # it asked to be left alone for a while
    LIMIT = "limit"  # what it may be asked per minute is used up


class Hold(StrEnum):
    """Why an example is kept but not shown. A closed list."""

    QUARANTINE = "quarantine"  # its tenant wants evidence first (`tenants.quarantine`)
    BAD = "bad"  # its answer is known to be poor (`cache.quality_floor`)
    SUSPECT = "suspect"  # answers got worse since it is shown, or what it was made from is suspect


class _Example(NamedTuple):
    id: str
    tenant: str
    subject: str | None
    request_id: str  # the exchange it came from
    at: float
    dialect: str
    system: str  # the system prompt it was asked under; "" when none
    request: str  # what was asked: understandable on its own
    answer: str
    backend: str  # who answered
    embedder: str  # identity of the embedding model; embeddings of different models are not comparable
    embedding: Vector
    tokens: int  # of request and answer together
    stats: ExampleStats
    held: Hold | None = None  # why it is not shown; None: it may be


class Example(_Example):
    """A past exchange kept for showing. What is worked out from it stays with it: see `examples.traits`."""


class ExampleStats(NamedTuple):
    """The record of one example. Credit for an answer is shared equally among the examples shown for it."""

    uses: int = 0  # answers it was shown for
    credit: float = 0.0  # sum over scored answers of 1 / (examples shown)
    credited_quality: float = 0.0  # sum over scored answers of quality / (examples shown)
    offloads: float = 0.0  # successful offloads it enabled, shared likewise, decayed since offloads_at
    offloads_at: float = 0.0
    gain: float = 0.0  # EMA of G = (1 - quality) * relative cost
    own_quality: float | None = None  # quality of its own answer, from feedback on its own exchange or a judge
    replays: int = 0
    confirmations: int = 0  # agreeing answers less contradicting ones, since its answer is what it is


class Query(NamedTuple):
    """What is looked for in the cache."""

    tenant: str
    text: str
    k: int  # nearest examples wanted


class _Recalled(NamedTuple):
    embedding: Vector  # (dim,), unit norm
    nearest: Sequence[tuple[Example, float]]


class Recalled(_Recalled):
    """What was found: the query's embedding, and the nearest examples with their cosine, best first. What is worked out
    from it stays with it: see `select`."""


class Weighed(NamedTuple):
    """What an example weighs and what it brought: enough to evict it."""

    id: str
    at: float
    text_bytes: int
    embedding_bytes: int
    credit: float
    offloads: float
    offloads_at: float


class Match(NamedTuple):
    """An example considered for a request."""

    example: Example
    similarity: float  # cosine, in [-1, 1]
    utility: float  # predicted gain in quality from showing it


class Taken(NamedTuple):
    """The way that was taken to show one student examples, or none: what learning from the answer needs."""

    way: str  # "none", "own" or "shared"
    expected: float  # quality by the prior alone, in [0, 1]
    probability: float  # with which this way was drawn, in (0, 1]
    left_out: str | None = None  # the example that was left out, so that its effect is measured
    gain: float = 0.0  # expected quality less what is expected without examples
    x: tuple[float, ...] = ()  # what the prior saw: features of the way that was taken


class Considered(NamedTuple):
    """What the record keeps of a Match."""

    id: str
    similarity: float
    utility: float
    shown: bool


class BackendScore(NamedTuple):
    """What the record keeps of one arm of a decision."""

    name: str
    score: float
    load_bias: float
    probability: float


class Usage(NamedTuple):
    """Tokens of one answer. `input` includes the examples' share, `example`."""

    input: int
    output: int
    example: int = 0
    estimated: bool = False
    cached: int = 0  # of `input`, what the upstream says it took from its prompt cache; not kept in the record


NOTHING_USED = Usage(0, 0)


class Shot(NamedTuple):
    """One example as it is shown: a pair of turns."""

    request: str
    answer: str


class Form(NamedTuple):
    """JSON as the answer: what is known of its keys at the top."""

    required: frozenset[str] = frozenset()
    known: frozenset[str] | None = None  # None: there may be others


class Controls(NamedTuple):
    """What the client asked of iccache, in headers or in the body's `iccache` object."""

    backend: str | None = None  # pin
    examples: int | None = None  # at most so many
    store: bool | None = True  # False: record nothing; None: only the upstream was told to keep nothing
    reuse: bool = True  # False: never answer from the record
    session: str | None = None


NO_CONTROLS = Controls()


@dataclass(slots=True)
class Ask:
    """A request body, understood. The body itself is kept as it came. Never changed once it is complete: not frozen,
    since that makes making it slow."""

    dialect: str
    body: bytes
    model: str
    stream: bool
    task: str  # what is asked now, understandable on its own; "" when there is no text
    system: str = ""  # the system prompt; "" when none
    prompt: str = ""  # all text of the conversation, the system prompt included: what is counted
    before: str = ""  # of that, what came before the last question; "" where it is the first
    long_before_chars: int = 0  # of that, what came before the question before
    turns: int = 1  # messages of the conversation, the system prompt apart
    max_output_tokens: int | None = None
    subject: str | None = None
    has_tools: bool = False
    plain: bool = False  # routed, but shown nothing: tools may be called, or probabilities are asked for
    form: Form | None = None  # JSON is asked for
    stop: tuple[str, ...] = ()  # sequences at which the answer is to end
    bypass: Reason | None = None  # why it cannot be augmented
    controls: Controls = NO_CONTROLS


@dataclass(slots=True)
class Answer:
    """An upstream's answer, as far as the record needs to understand it."""

    text: str
    complete: bool  # it ended as it should: a whole JSON body, or a stream with its proper end, without an error
    finish_reason: str | None = None
    has_tool_calls: bool = False
    tool_arguments: tuple[str, ...] = ()  # of the calls of the client's functions, as they came
    usage: Usage | None = None  # as reported; None when it was not


@dataclass(slots=True)
class Exchange:
    """One request with all that became of it: the unit of the record."""

    request_id: str
    tenant: str
    subject: str | None
    session: str | None
    at: float
    dialect: str
    model: str  # as the client asked
    stream: bool
    backend: str
    decision: DecisionKind
    reason: Reason | None
    status: int
    complete: bool  # the whole answer was received and is a success
    offloaded: bool = False  # a cheaper backend answered what the dearest would have
    relative_cost: float = 1.0  # price of the backend that answered, as a share of the dearest's, in [0, 1]
    system: str = ""
    task: str = ""  # what was asked: understandable on its own; "" where the dialect could not be read
    answer: str = ""
    finish_reason: str | None = None
    usage: Usage = NOTHING_USED
    cost_usd: float = 0.0
    latency_s: float = 0.0
    first_byte_s: float | None = None
    overhead_s: float = 0.0
    propensity: float | None = None
    features: NDArray[np.float64] | None = None  # of the arm that was drawn: what learning needs
    shown: Sequence[str] = ()  # ids of examples, in the order shown
    considered: Sequence[Considered] = ()
    backends: Sequence[BackendScore] = ()
    quality: float | None = None  # all its feedback in one number; the store computes it, `record` ignores it
    extra: dict[str, Any] = field(default_factory=dict)  # "kind" of request, "withheld": see the pipeline


class Kept(NamedTuple):
    """A whole answer as it came, for exact reuse."""

    request_id: str  # the exchange it belongs to
    backend: str
    at: float
    content_type: str
    body: bytes


class Keeping(NamedTuple):
    """An answer that identical requests may be given, once it is recorded."""

    key: bytes  # digest of the request
    answer: Kept
    told: Callable[[Kept | None], object]  # called when that is settled, with None where they may not


class Feedback(NamedTuple):
    """One judgement of one exchange. (request_id, source) is its identity: a new one replaces the old."""

    request_id: str
    source: str  # "user", "demonstration", "judge", "check", "reask"
    score: float | None  # quality in [0, 1]; None for a demonstration
    at: float


class Agreement(NamedTuple):
    """One source of feedback beside the users'."""

    source: str
    n: int  # scores
    mean: float
    both: int  # of exchanges that a user scored as well
    difference: float | None  # mean of its score less the user's there; None where both is 0
    deviation: float | None  # standard deviation of that; None where both is below 2


class Daily(NamedTuple):
    """What one backend's exchanges of one day and decision add up to."""

    day: str  # UTC: 2030-01-31
    backend: str
    decision: str
    requests: int
    failed: int  # status 400 and above
    offloaded: int
    input_tokens: int  # with the examples' share
    output_tokens: int
    example_tokens: int
    cost_usd: float
    latency_s: float
    judged: int  # how many have a quality
    quality: float  # sum of theirs
    # of the offloaded ones alone: what it takes to say what they saved
    offloaded_plain_tokens: int  # input without the examples' share
    offloaded_output_tokens: int
    offloaded_cost_usd: float


class Verdict(NamedTuple):
    """What a client says of an answer: exactly one of the three is set."""

    request_id: str
    score: float | None = None
    preferred_over: str | None = None
    demonstration: str | None = None


class ChangeKind(StrEnum):
    EXAMPLE = "example"  # added, replaced or deleted: look it up
    QUALITY = "quality"  # an exchange's quality became known, or changed


class Change(NamedTuple):
    """One entry of the store's feed. Followers apply them in order of `seq`."""

    seq: int
    kind: ChangeKind
    key: str  # example id, or request id
    old: float | None = None  # QUALITY: what it was before; None when it was unknown
    new: float | None = None
