"""What a client's script is made of: cases, each a function that talks to BASE_URL and returns what it saw.

A script runs in its client's own environment, so this file imports nothing but the standard library. It prints one JSON
line per case. A case passes unless it raises; what it returns is compared between the direct run and the others.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import time
import traceback
import urllib.request
import uuid
from collections.abc import Callable
from typing import Any

BASE_URL = os.environ.get("BASE_URL", "http://127.0.0.1:9001/v1")
ROOT_URL = BASE_URL.removesuffix("/v1")  # Anthropic's clients add /v1 themselves
UPSTREAM_URL = os.environ.get("UPSTREAM_URL", BASE_URL).removesuffix("/v1")  # the upstream itself, to ask what it saw
MODEL = os.environ.get("MODEL", "gpt-4o-mini")
KEY = "client-key"
LEAVES_WITHIN_S = 1.0  # a client that leaves stops the upstream
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "population": {"type": "integer"}},
    "required": ["city", "population"],
    "additionalProperties": False,
}

_cases: list[Callable[[], Any]] = []


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    _cases.append(function)
    return function


def script(until: int | None = None, **fields: Any) -> dict[str, str]:
    """Headers that tell the scripted upstream what to do with this request, at most until the `until`th retry."""
    headers = {"x-fake-script": json.dumps(fields)}
    return headers if until is None else headers | {"x-fake-until": str(until)}


def mark() -> dict[str, str]:
    """A header by which `left` finds the request again."""
    return {"x-case": uuid.uuid4().hex}


def left(marked: dict[str, str]) -> str:
    """Waits until the upstream has noticed that the client is gone."""
    deadline = time.monotonic() + LEAVES_WITHIN_S
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"{UPSTREAM_URL}/fake/requests") as answer:
            for request in json.load(answer):
                headers = {name.lower(): value for name, value in request["headers"].items()}
                if headers.get("x-case") == marked["x-case"] and request["left"]:
                    return "the upstream noticed"
        time.sleep(0.02)
    raise AssertionError(f"the upstream did not notice within {LEAVES_WITHIN_S:g} s that the client left")


def raised(kinds: type[BaseException] | tuple[type[BaseException], ...], call: Callable[[], Any]) -> Any:
    """The exception that `call` raises, which has to be one of `kinds`."""
    try:
        found = call()
    except kinds as exc:
        return exc
    raise AssertionError(f"nothing was raised, but {found!r} returned")


def named(exc: BaseException) -> str:
    status = getattr(exc, "status_code", None)
    return type(exc).__name__ + (f" {status}" if status else "")


def main() -> None:
    with asyncio.Runner() as loop:
        for function in _cases:
            told = tried(function, loop)
            print(json.dumps(told), flush=True)


def tried(function: Callable[[], Any], loop: asyncio.Runner) -> dict[str, Any]:
    try:
        seen = loop.run(function()) if inspect.iscoroutinefunction(function) else function()
        return {"case": function.__name__, "passed": True, "seen": json.loads(json.dumps(seen))}
    except Exception as exc:
        traceback.print_exc()
        return {"case": function.__name__, "passed": False, "seen": f"{type(exc).__name__}: {exc}"[:400]}
