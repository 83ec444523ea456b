"""Request bodies: what is asked of every dialect's, and the fields that mean the same in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import orjson

from iccache.errors import RequestError
from iccache.types import NO_CONTROLS, Controls, Form

MAX_DEPTH = 128  # levels of nesting
MAX_MEMBERS = 10_000  # of the body itself
MAX_VALUES = 100_000  # in all of it
SMALL_BYTES = 65_536  # cannot hold as many as would take long
CONTROLS = "iccache"  # the member that is for us
_FLAGS = {True: True, False: False, "yes": True, "no": False, None: True}


def parse(body: bytes) -> dict[str, Any]:
    """The body as an object with a model. Raises RequestError(400) where it is none."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise RequestError(400, f"The body is not valid JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise RequestError(400, "The body must be a JSON object.")
    _refuse_monsters(found, body)
    if not isinstance(found.get("model"), str) or not found["model"]:
        refuse("model", "model is required, as a string.", missing="model" not in found)
    return found


def refuse(param: str, message: str, *, missing: bool = False) -> NoReturn:
    code = "missing_required_parameter" if missing else "invalid_value"
    raise RequestError(400, message, param=param, code=code)


def required_list(body: dict[str, Any], key: str) -> list[Any]:
    value = body.get(key)
    if not isinstance(value, list):
        refuse(key, f"{key} is required, as a list.", missing=key not in body)
    return value


def controls(body: dict[str, Any]) -> Controls:
    """What the body's `iccache` object asks. Raises RequestError(400) naming the key that cannot be used."""
    keeps = None if body.get("store") is False else True  # the API's own flag: recorded only where we are told to
    asked = body.get(CONTROLS)
    if asked is None:
        return NO_CONTROLS if keeps else Controls(store=keeps)
    if not isinstance(asked, dict):
        refuse(CONTROLS, "iccache must be an object.")
    known = ("backend", "examples", "store", "session")
    for key in asked:
        if key not in known:
            refuse(f"{CONTROLS}.{key}", f"iccache.{key} is not known; known: {', '.join(known)}.")
    return Controls(
        backend=_name(asked, "backend"),
        examples=_examples(asked),
        store=keeps if asked.get("store") is None else _store(asked),
        session=_name(asked, "session"),
    )


def _name(asked: dict[str, Any], key: str) -> str | None:
    value = asked.get(key)
    if value is not None and (not isinstance(value, str) or not value):
        refuse(f"{CONTROLS}.{key}", f"iccache.{key} must be a string that is not empty.")
    return value


def _examples(asked: dict[str, Any]) -> int | None:
    value = asked.get("examples")
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        refuse(f"{CONTROLS}.examples", "iccache.examples must be a whole number, 0 or more.")
    return value


def _store(asked: dict[str, Any]) -> bool:
    value = asked.get("store")
    if not (value is None or isinstance(value, bool) or value in ("yes", "no")):
        refuse(f"{CONTROLS}.store", 'iccache.store must be "no" or false to record nothing, else "yes" or true.')
    return _FLAGS[value]


def subject(body: dict[str, Any]) -> str | None:
    """The end user: `safety_identifier`, else `user`, else `metadata.user_id`."""
    for key in ("safety_identifier", "user"):
        value = body.get(key)
        if isinstance(value, str) and value:
            return value
    metadata = body.get("metadata")
    value = metadata.get("user_id") if isinstance(metadata, dict) else None
    return value if isinstance(value, str) and value else None


def form(wanted: object) -> Form | None:
    """The JSON that a `response_format`, or what corresponds to it, asks for; None where it asks for text."""
    if not isinstance(wanted, dict) or wanted.get("type") not in ("json_object", "json_schema"):
        return None
    nested = wanted.get("json_schema")
    schema = (nested if isinstance(nested, dict) else wanted).get("schema")
    if not isinstance(schema, dict):
        return Form()
    required, properties = schema.get("required"), schema.get("properties")
    closed = schema.get("additionalProperties") is False and isinstance(properties, dict)
    return Form(
        frozenset(key for key in required if isinstance(key, str)) if isinstance(required, list) else frozenset(),
        frozenset(properties) if closed and isinstance(properties, dict) else None,
    )


def calls_tools(body: dict[str, Any], has_tools: bool) -> bool:
    """Whether the answer may be a tool's call."""
    choice = body.get("tool_choice", body.get("function_call"))
    return has_tools and (choice.get("type") if isinstance(choice, dict) else choice) != "none"


def stops(value: object) -> tuple[str, ...]:
    """Stop sequences: one, or a list of them."""
    if value is None:
        return ()
    given = value if isinstance(value, list) else [value]
    return tuple([stop for stop in given if isinstance(stop, str) and stop])


def tokens(body: dict[str, Any], keys: Sequence[str]) -> int | None:
    """The first of `keys` that is a number of tokens."""
    for key in keys:
        value = body.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _refuse_monsters(found: dict[str, Any], source: bytes) -> None:
    """Raises RequestError(400) for what is nested too deep or holds too many values, which would take too long at every
    step from here. Counting brackets settles it for nearly every body.
    """
    refuse_wide(found)
    if len(source) <= SMALL_BYTES and source.count(b"[") + source.count(b"{") <= MAX_DEPTH:
        return
    layer: list[Any] = [found]
    values = 0
    for _ in range(MAX_DEPTH):
        values += sum(map(len, layer))
        if values > MAX_VALUES:
            raise RequestError(400, f"The body holds more than {MAX_VALUES} values.")
        layer = [child for node in layer for child in _children(node) if isinstance(child, dict | list)]
        if not layer:
            return
    raise RequestError(400, f"The body is nested more than {MAX_DEPTH} levels deep.")


def refuse_wide(found: dict[str, Any]) -> None:
    """Raises RequestError(400) for more members than any request has: each is looked at when the body is edited."""
    if len(found) > MAX_MEMBERS:
        raise RequestError(400, f"The body has more than {MAX_MEMBERS} members.")


def _children(node: dict[str, Any] | list[Any]) -> Any:
    return node.values() if isinstance(node, dict) else node
