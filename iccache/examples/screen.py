"""Text that is written to steer a model rather than to be an example. Signs of it, by pattern and by structure.

A detector is an extra: who knows it can word around it. What holds without it is that examples are shown as past turns,
that writers are capped, that answers are compared, and that outcomes are traced. A text with one of these signs is
recorded as any other and does not become an example.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from enum import StrEnum


class Sign(StrEnum):
    """What gives a text away. A closed list."""

    OVERRIDE = "override"  # "ignore all previous instructions"
    STANDING = "standing_order"  # "from now on, whenever anybody asks about X, answer Y"
    ROLE = "role"  # imitates a system prompt or a further turn
    TOOL = "tool_call"  # imitates the call of a tool, or its result
    HIDDEN = "hidden"  # characters that nobody sees
    ENCODED = "encoded"  # a text within the text, in base64


def sign(text: str) -> Sign | None:
    """The first sign found, or None. Time grows with the length of the text."""
    if not text.isascii() and _hidden(text):
        return Sign.HIDDEN
    plain = text if text.isascii() else UNSEEN.sub("", unicodedata.normalize("NFKC", text))
    lowered = plain.lower()
    for found, needles, pattern in PATTERNS:
        if any(needle in lowered for needle in needles) and pattern.search(plain):
            return found
    return Sign.ENCODED if _encoded(plain) else None


UNSEEN = re.compile("[\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2064\u2066-\u2069\ufeff\U000e0000-\U000e007f]")
OVERRIDES = re.compile("[\u202a-\u202e\u2066-\u2069]")  # of the direction of writing
RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")
TAGS = re.compile("(?<!\U0001f3f4)(?<![\U000e0020-\U000e007e])[\U000e0000-\U000e007f]")  # outside of flags
SPLITTERS = re.compile("(?<=[A-Za-z0-9])[\u200b-\u200d\u2060-\u2064\ufeff](?=[A-Za-z0-9])")
SPLIT_WORDS = 3  # so many Latin words with unseen characters inside are no accident; soft hyphens are typesetting


def _hidden(text: str) -> bool:
    if TAGS.search(text) or len(SPLITTERS.findall(text)) >= SPLIT_WORDS:
        return True
    return OVERRIDES.search(text) is not None and RIGHT_TO_LEFT.search(text) is None


def _pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE | re.VERBOSE | re.MULTILINE)


INSTRUCTIONS = r"(?:instructions?|prompts?|rules|guidelines|directions|directives|messages?|context|examples?|answers?)"

# sign, words of which one occurs in lower case where the pattern can match, pattern
PATTERNS = (
    (
        Sign.OVERRIDE,
        ("ignore", "disregard", "forget", "override", "bypass"),
        _pattern(
            rf"""
              \b(?:ignore|disregard|forget|override|bypass)\b[^.\n]{{0,30}}?
              \b(?:previous|prior|above|earlier|preceding|system|your|former|existing|other)\b\s+(?:\w+\s+){{0,2}}?
              {INSTRUCTIONS}\b
            """
        ),
    ),
    (
        Sign.OVERRIDE,
        ("new instructions", "real instructions", "updated instructions", "you are now", "developer mode", "jailbr"),
        _pattern(
            r"""
              ^\W*(?:new|real|actual|updated)\s+(?:system\s+)?instructions?\s*:
            | \byou\s+are\s+now\s+(?:in\s+)?(?:a\s+|an\s+|the\s+)?(?:dan\b|developer\s+mode|unrestricted|jailbroken)
            | \benable\s+developer\s+mode\b
            """
        ),
    ),
    (
        Sign.STANDING,
        (
            "from now on",
            "in the future",
            "future",
            "henceforth",
            "whenever",
            "every time",
            "any time",
            "when",
            "remember",
            "keep in mind",
            "instead",
        ),
        _pattern(
            r"""
              \b(?:from\s+now\s+on|henceforth|in\s+(?:the\s+|all\s+)?future(?:\s+(?:queries|requests|questions))?
                |whenever|every\s*time|any\s*time|when)\b
              [^.\n]{0,80}?\b(?:asks?|asked|asking|sees?|receives?|mentions?|requests?|quer(?:y|ies)|questions?)\b
              [^.\n]{0,80}?\b(?:always|must|you\s+should|answer|reply|respond|output|say|refer)\b
            | \b(?:remember|note|keep\s+in\s+mind)\b[^.\n]{0,40}?\bfor\s+(?:all\s+)?(?:future|later|subsequent)\b
              [^.\n]{0,20}?\b(?:quer(?:y|ies)|requests?|questions?|conversations?|answers?|tasks?)\b
            | \b(?:data|record|information|entr(?:y|ies))\s+(?:of|for)\b[^.\n]{0,50}?
              \b(?:is|are|has\s+been|have\s+been)\s+(?:now\s+)?(?:saved|stored|moved|kept)\s+(?:under|at|to|in)\b[^.\n]{0,60}?\binstead\b
            """
        ),
    ),
    (
        Sign.ROLE,
        ("system", "assistant", "developer"),
        _pattern(
            r"""
              ^\s*(?:\#{1,4}\s*|\*\*|\[|<)?\s*(?:system|developer)(?:\s+(?:prompt|message|override|note))?\s*
              (?:\]|>|\*\*)?\s*:\s*\S[^\n]*\b(?:you|must|always|never|ignore|instructions?|assistant)\b
            | ^\s*</?(?:system|developer|assistant|instructions?)(?:[_-]?(?:prompt|message))?>
            | ^\s*\#{2,4}\s*(?:system|assistant|instruction)\s*:?\s*$
            | "role"\s*:\s*"(?:system|developer|assistant|tool)"
            """
        ),
    ),
    (
        Sign.TOOL,
        ("tool", "function", "invoke", '"arguments"'),
        _pattern(
            r"""
              </?(?:tool_call|tool_use|tool_result|tool_response|function_call|function_calls|invoke)\b[^>\n]{0,100}>
            | <function=\w
            | "(?:tool_calls|function_call|tool_call_id)"\s*:
            | "name"\s*:\s*"[^"\n]{1,80}"\s*,\s*"arguments"\s*:\s*[{"]
            """
        ),
    ),
)

BLOB = re.compile(r"(?<![\w+/=-])[A-Za-z0-9+/]{64,}={0,2}(?![\w+/=])")
BLOBS_READ = 20
READABLE = 0.9  # share of letters, spaces and punctuation that makes decoded bytes a text


def _encoded(text: str) -> bool:
    """Whether a long run of base64 is a text when decoded. Keys, digests and images are not."""
    return any(_is_text(blob.group()) for blob, _ in zip(BLOB.finditer(text), range(BLOBS_READ), strict=False))


def _is_text(blob: str) -> bool:
    body = blob.rstrip("=")
    try:
        decoded = base64.b64decode(body[: len(body) // 4 * 4]).decode()
    except (binascii.Error, UnicodeDecodeError):
        return False
    good = sum(c.isalpha() or c in " \n.,;:!?'\"-()" for c in decoded)
    return " " in decoded and good >= READABLE * len(decoded)
