"""What a call costs, and the most that it can cost.

Money is counted in whole nanodollars (1e-9 USD), every call rounded up, so that sums are exact and never too low.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from iccache import config

NUSD = 1_000_000_000  # in a US dollar
MESSAGE_TOKENS = 8  # role and delimiters around the text of one message, at most
TEMPLATE_TOKENS = 64  # what a model's template puts around them all: an opening, a system prompt of its own


class Message(NamedTuple):
    role: str
    content: str


class Prompt(NamedTuple):
    """One call: the messages and the limits that go with them."""

    messages: tuple[Message, ...]
    max_output_tokens: int
    temperature: float
    sample: int = 0  # tells apart several answers that are wanted to the same prompt


def nusd(backend: config.Backend, input_tokens: int, output_tokens: int) -> int:
    """ceil(1000 * (p_in * input + p_out * output)), prices p in USD per million tokens."""
    dollars_per_million = (
        backend.usd_per_million_input_tokens * input_tokens + backend.usd_per_million_output_tokens * output_tokens
    )
    return math.ceil(dollars_per_million * 1000)


def most_input_tokens(texts_bytes: Sequence[int]) -> int:
    """A bound on a prompt's tokens from the bytes of its messages: no token of a text has less than one byte."""
    return sum(texts_bytes) + MESSAGE_TOKENS * len(texts_bytes) + TEMPLATE_TOKENS


def prompt_bytes(prompt: Prompt) -> list[int]:
    return [len(message.content.encode()) for message in prompt.messages]


def most_nusd(backend: config.Backend, prompt: Prompt) -> int:
    """The most that one call can cost: what is reserved for it."""
    return nusd(backend, most_input_tokens(prompt_bytes(prompt)), prompt.max_output_tokens)
