"""What is wrong with an answer that needs no judge to be seen. What is right proves nothing, so it says nothing.

Only failures are feedback. If all of them were, the answers of known quality would be the failed ones, and a backend
that fails twice in a hundred would look like one that always does. So a failure is told with the probability of the
backend's recent share of failures: a rare one hardly ever, most of them where it fails all the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any

import orjson
from jsonschema import Draft202012Validator, validators
from jsonschema.exceptions import SchemaError, ValidationError

from iccache.types import Answer, Ask, Exchange

SOURCE = "check"
MEMORY = 0.05  # weight of the newest answer in a backend's share of failures
STEPS = 5_000  # of validation, after which a schema is taken to be met
LARGEST_BYTES = 64_000  # of a schema or an answer that is checked
# keywords that may take any amount of time, or a network: not looked at
UNCHECKED = frozenset({"pattern", "patternProperties", "format", "uniqueItems", "$dynamicRef"})


class Failure(StrEnum):
    """What is wrong. A closed list."""

    EMPTY = "empty"  # no text and no call of a tool
    CUT = "cut"  # ended by a limit that the client did not set
    NOT_JSON = "not_json"  # JSON was asked for
    SCHEMA = "schema"  # its schema is not met
    TOOL = "tool"  # a call of a tool whose arguments are no JSON object


SCORES = {Failure.EMPTY: 0.0, Failure.CUT: 0.25, Failure.NOT_JSON: 0.0, Failure.SCHEMA: 0.1, Failure.TOOL: 0.0}


def failure(exchange: Exchange, ask: Ask, answer: Answer) -> Failure | None:
    """The first thing that is wrong with a whole answer; None where nothing is, or the answer did not come whole."""
    if not exchange.complete or ask.bypass is not None:
        return None
    if not answer.text.strip() and not answer.has_tool_calls:
        return None if answer.finish_reason == "content_filter" else Failure.EMPTY
    if answer.finish_reason == "length":
        return Failure.CUT if ask.max_output_tokens is None else None
    if any(not _is_object(arguments) for arguments in answer.tool_arguments):
        return Failure.TOOL
    if ask.form is None or answer.has_tool_calls:
        return None
    return _against_form(ask.body, answer.text)


def _against_form(request: bytes, text: str) -> Failure | None:
    if len(text) > LARGEST_BYTES:
        return None
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError:
        return Failure.NOT_JSON
    schema = _schema(request)
    if schema is None:
        return None if isinstance(document, dict) else Failure.NOT_JSON
    return None if _meets(document, schema) else Failure.SCHEMA


def _schema(request: bytes) -> dict[str, Any] | None:
    """The JSON schema that a request asks for, in any of the dialects; None where it has none that can be checked."""
    asked = orjson.loads(request)
    wanted = asked.get("response_format") or asked.get("output_format")
    for outer in ("text", "output_config"):
        if wanted is None and isinstance(asked.get(outer), dict):
            wanted = asked[outer].get("format")
    if not isinstance(wanted, dict):
        return None
    nested = wanted.get("json_schema")
    schema = (nested if isinstance(nested, dict) else wanted).get("schema")
    return schema if isinstance(schema, dict) and len(orjson.dumps(schema)) <= LARGEST_BYTES else None


class TooMuch(Exception):
    """The steps are used up."""


def _meets(document: Any, schema: dict[str, Any]) -> bool:
    """Whether `document` meets `schema`, as far as that can be told in bounded time. A schema that is none is met."""
    left = STEPS

    def counted(check: Callable[..., Iterator[ValidationError] | None]) -> Callable[..., Iterator[ValidationError]]:
        def run(*arguments: Any) -> Iterator[ValidationError]:
            nonlocal left
            left -= 1
            if left < 0:
                raise TooMuch
            yield from check(*arguments) or ()

        return run

    checks = {k: counted(v) for k, v in Draft202012Validator.VALIDATORS.items() if k not in UNCHECKED}
    ignored = dict.fromkeys(UNCHECKED, _ignored)
    limited = validators.extend(Draft202012Validator, {**checks, **ignored})
    try:
        return next(iter(limited(schema).iter_errors(document)), None) is None
    except (TooMuch, SchemaError, RecursionError):
        return True
    except Exception:  # a schema that is malformed, or refers to what is not here: whatever the library makes of it
        return True


def _ignored(*_: Any) -> Iterator[ValidationError]:
    return iter(())


def _is_object(arguments: str) -> bool:
    try:
        return isinstance(orjson.loads(arguments or "{}"), dict)
    except orjson.JSONDecodeError:
        return False


class Shares:
    """How often each backend has failed lately, and so whether a failure is to be told."""

    def __init__(self, draw: Callable[[], float]) -> None:
        """`draw`: a number in [0, 1)."""
        self._draw = draw
        self._failing: dict[str, float] = {}

    def tell(self, backend: str, failed: bool) -> bool:
        """Take in one answer. True where its failure is to become feedback."""
        share = self._failing.get(backend, 0.0)
        self._failing[backend] = share = share + MEMORY * (float(failed) - share)
        return failed and self._draw() < share
