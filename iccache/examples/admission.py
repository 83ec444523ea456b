"""Which exchanges become examples. An example is shown to other requests, so only what is whole and harmless enters."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence
from enum import StrEnum

from iccache.examples.agreement import agree, same_details
from iccache.examples.screen import sign
from iccache.examples.utility import same_system
from iccache.types import Answer, Ask, Example, ExampleStats, Exchange, Hold, Vector

MAX_BYTES = 32 * 1024  # of request and answer together, in UTF-8
ENDED_WELL = frozenset({"stop", "end_turn", "stop_sequence", "completed", "eos", "eos_token"})


class Refusal(StrEnum):
    """Why an exchange does not become an example. A closed list."""

    OFF = "off"  # cache.admit = "none"
    ASKED_NOT_TO = "asked_not_to"  # the client wants nothing recorded
    NOT_A_TEACHER = "not_a_teacher"
    FAILED = "failed"  # not a success
    INCOMPLETE = "incomplete"  # the answer broke off, or the client left
    NOT_TEXT = "not_text"  # the request could not be understood on its own: tools, images, state, several answers
    TOOL_CALLS = "tool_calls"  # the answer calls tools
    CUT = "cut"  # the answer was ended by a limit or a filter, not by itself
    EMPTY = "empty"  # nothing was asked, or nothing answered
    TOO_LONG = "too_long"
    CONTROL_TOKENS = "control_tokens"  # text that a chat template could take for a change of turns
    INSTRUCTIONS = "instructions"  # written to steer a model rather than to be an example


def admissible(
    exchange: Exchange,
    ask: Ask,
    answer: Answer,
    teachers: Collection[str],
    admit: str = "teacher",
    screen: bool = True,
) -> Refusal | None:
    """None when `exchange` may become an example, else the first reason why not.

    `teachers`: names of the backends whose answers may; `admit`: the setting `cache.admit`. The texts are those of
    the exchange, redacted by now.
    """
    facts = (
        (admit == "none", Refusal.OFF),
        (not ask.controls.store, Refusal.ASKED_NOT_TO),
        (exchange.backend not in teachers, Refusal.NOT_A_TEACHER),
        (not 200 <= exchange.status < 300, Refusal.FAILED),
        (not (exchange.complete and answer.complete), Refusal.INCOMPLETE),
        (ask.bypass is not None, Refusal.NOT_TEXT),
        (answer.has_tool_calls, Refusal.TOOL_CALLS),
        (not _ended_well(exchange.finish_reason or answer.finish_reason), Refusal.CUT),
    )
    return next((reason for holds, reason in facts if holds), None) or unfit(exchange.task, exchange.answer, screen)


def unfit(request: str, answer: str, screen: bool = True) -> Refusal | None:
    """What speaks against a pair of texts, wherever it comes from (an import, a better answer given as feedback).

    `screen`: the setting `cache.screen`.
    """
    if not request.strip() or not answer.strip():
        return Refusal.EMPTY
    if len(request.encode("utf-8", "replace")) + len(answer.encode("utf-8", "replace")) > MAX_BYTES:
        return Refusal.TOO_LONG
    if has_control_tokens(request) or has_control_tokens(answer):
        return Refusal.CONTROL_TOKENS
    if screen and (sign(request) or sign(answer)):
        return Refusal.INSTRUCTIONS
    return None


def to_example(
    exchange: Exchange,
    embedding: Vector,
    *,
    id: str,
    embedder: str,
    tokens: int,
    own_quality: float | None = None,
    held: Hold | None = None,
) -> Example:
    """The example that an admissible exchange becomes.

    `embedding` (dim,), unit norm, of `exchange.task`, by the model `embedder`; `tokens` of request and answer.
    """
    return Example(
        id=id,
        tenant=exchange.tenant,
        subject=exchange.subject,
        request_id=exchange.request_id,
        at=exchange.at,
        dialect=exchange.dialect,
        system=exchange.system,
        request=exchange.task,
        answer=exchange.answer,
        backend=exchange.backend,
        embedder=embedder,
        embedding=embedding,
        tokens=tokens,
        stats=ExampleStats(own_quality=own_quality),
        held=held,
    )


def twin_of(new: Example, nearest: Sequence[tuple[Example, float]], limit: float) -> Example | None:
    """The nearest example that says what `new` says: the same system prompt, nearly the same request with the same
    numbers and negations, and the same answer. `limit`: cosine from which on a request is nearly the same.
    """
    for there, similarity in nearest:
        if (
            similarity >= limit
            and there.request != new.request  # one and the same is known to the store
            and same_system(there.system, new.system)
            and same_details(there.request, new.request)
            and agree(there.answer, new.answer)
        ):
            return there
    return None


def has_control_tokens(text: str) -> bool:
    """Whether `text` holds a marker by which some model's chat template separates turns."""
    return CONTROL.search(unicodedata.normalize("NFKC", text)) is not None


CONTROL = re.compile(
    r"""
      <\|[a-z0-9_/\u2581-]{1,40}\|>  # <|im_start|>, <|eot_id|>, <|start_header_id|>; with wide bars before NFKC
    | \[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]
    | <</?SYS>>
    | </?(?:start_of_turn|end_of_turn|start_of_image|bos|eos|s)>
    """,
    re.IGNORECASE | re.VERBOSE,
)


def _ended_well(finish_reason: str | None) -> bool:
    """Whether the answer came to its own end. None: the upstream did not say."""
    return finish_reason is None or finish_reason.lower() in ENDED_WELL
