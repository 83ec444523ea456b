"""What backends cost: their list prices, an answer that was given, and a request that is still to be sent."""

from __future__ import annotations

import math

from iccache import config
from iccache.types import Usage

NUSD = 1_000_000_000  # in a US dollar
ROUNDING = 1e-6  # of floating point, in nanodollars
MESSAGE_TOKENS, TEMPLATE_TOKENS = 8, 64  # around the text of one message, and around them all, at most
EXPECTED_OUTPUT_TOKENS = 256  # of an answer of which nothing is known but that it may be longer


def price(backend: config.Backend) -> float:
    """One number that orders backends by output price, then input price."""
    return backend.usd_per_million_output_tokens + 1e-6 * backend.usd_per_million_input_tokens


def as_usd(amount: float) -> str:
    """As it stands in a header: no exponent, no needless zeros."""
    return f"{amount:.10f}".rstrip("0").rstrip(".") or "0"


def cost(backend: config.Backend, usage: Usage) -> float:
    """US dollars for `usage` at the prices of `backend`."""
    return _usd(backend, usage.input, usage.cached, usage.output)


def expected(
    backend: config.Backend, *, request_tokens: int, example_tokens: int, covered_tokens: int, most_output: int | None
) -> float:
    """US dollars that a request is expected to cost at `backend`.

    `covered_tokens` of the request are a prompt that the backend has lately seen and may charge less for; `most_output`
    is what the client allows the answer to take.
    """
    output = EXPECTED_OUTPUT_TOKENS if most_output is None else min(EXPECTED_OUTPUT_TOKENS, most_output)
    return _usd(backend, request_tokens + example_tokens, min(covered_tokens, request_tokens), output)


def nusd(backend: config.Backend, usage: Usage) -> int:
    """What `usage` costs, in whole nanodollars, rounded up, so that sums are exact and never too low."""
    return math.ceil(cost(backend, usage) * NUSD - ROUNDING)


def most_nusd(backend: config.Backend, prompt_bytes: int, messages: int, most_output: int) -> int:
    """The most that one call can cost: no token of a prompt has less than one byte, and every message has a frame."""
    tokens = prompt_bytes + MESSAGE_TOKENS * messages + TEMPLATE_TOKENS
    return nusd(backend, Usage(tokens, most_output))


def _usd(backend: config.Backend, given: int, cached: int, made: int) -> float:
    full = backend.usd_per_million_input_tokens
    again = backend.usd_per_million_cached_input_tokens
    cached = min(cached, given)
    spared = 0.0 if again is None else cached * (full - again)
    return (given * full - spared + made * backend.usd_per_million_output_tokens) / 1e6
