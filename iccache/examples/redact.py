"""Personal data and secrets out of a text, before anything is written.

It knows shapes, not meanings: names, street addresses, passwords and phone numbers written as bare digits stay. Of
network addresses only public ones go, and of four numbers with dots only those that hardly are a version. What can be
checked is: cards by Luhn and issuer, accounts by country, length and remainder, the rest as `identity` says.

Each rule begins where a run of its characters begins and repeats only what cannot be read in two ways, so the work
grows with the length of the text, whatever the text. The user's own patterns are theirs to keep so.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from iccache import config
from iccache.errors import ConfigError
from iccache.examples import identity

OWN = "[REDACTED]"
REMEMBERED = 256  # texts that often come again: system prompts, standing answers
REMEMBERED_CHARS = 4096  # of such a text
NAMES_REMEMBERED = 4096  # of end users and sessions
LONGEST_NAME = 200  # characters
PHONES_CHECKED = 300  # in one text, at up to a millisecond each


class Rule(NamedTuple):
    """One kind of thing to replace."""

    placeholder: str
    needle: str  # occurs in the text, or the rule cannot apply
    pattern: re.Pattern[str]
    length: Callable[[str], int]  # how much of what the pattern found is one, from its beginning; 0: it is none
    checked: int = sys.maxsize  # of what was found in one text; beyond it, all goes: checking costs too much


class Redactor:
    """Replaces what it finds with a word for its kind: `[EMAIL]`. Of two things glued together one may stay."""

    def __init__(
        self, enabled: bool = True, patterns: Sequence[str] = (), regions: Sequence[str] = identity.REGIONS
    ) -> None:
        """`patterns`: further regular expressions, replaced by [REDACTED]. Raises ConfigError on a broken one.

        `regions`: countries (ISO 3166) whose phone numbers are known as they are written at home.
        """
        self.enabled = enabled
        home = HOME._replace(length=identity.home_phone(regions))
        self._rules = [*(rule for rule in RULES if rule is not HOME), *([home] if regions else [])]
        self._own = [_compile(pattern) for pattern in patterns]
        self._remembered = lru_cache(maxsize=REMEMBERED)(self._redact)
        self.name: Callable[[str], str] = lru_cache(maxsize=NAMES_REMEMBERED)(self._name)

    @classmethod
    def of(cls, privacy: config.Privacy) -> Redactor:
        return cls(privacy.redact, privacy.patterns, privacy.phone_regions)

    def redact(self, text: str) -> str:
        if not self.enabled:
            return text
        return self._remembered(text) if len(text) <= REMEMBERED_CHARS else self._redact(text)

    def _name(self, name: str) -> str:
        """An end user's or a session's `name` as it may be written: where it holds something to redact, or is very
        long, what is left of it and a digest, so that equal names stay equal and others different.
        """
        clean = self.redact(name)
        if clean == name and len(name) <= LONGEST_NAME:
            return name
        digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        return f"{clean[: LONGEST_NAME - len(digest) - 1]}#{digest}"

    def _redact(self, text: str) -> str:
        for pattern in self._own:
            text = pattern.sub(lambda found: OWN if found.group() else "", text)
        if "PRIVATE KEY" in text:
            text = "".join(_around_private_keys(text))
        for rule in self._rules:
            if rule.needle in text:
                text = "".join(_around(rule, text))
        return text


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as exc:
        raise ConfigError(f"privacy.patterns: {pattern!r} is not a regular expression: {exc}") from exc


def _around(rule: Rule, text: str) -> Iterator[str]:
    """`text` in pieces, with the placeholder for each thing found."""
    done = at = seen = 0
    while found := rule.pattern.search(text, at):
        seen += 1
        length = rule.length(found.group()) if seen <= rule.checked else len(found.group())
        if length:
            yield text[done : found.start()]
            yield rule.placeholder
            done = at = found.start() + length
        else:
            at = found.start() + 1
    yield text[done:]


BEGIN = re.compile(r"-----BEGIN (?:[A-Z0-9]{1,20} ){0,3}PRIVATE KEY(?: BLOCK)?-----")
END = re.compile(r"-----END (?:[A-Z0-9]{1,20} ){0,3}PRIVATE KEY(?: BLOCK)?-----")
KEY_LINE = re.compile(r"(?:\s|\\[rn])*[A-Za-z0-9+/=]{20,}")


def _around_private_keys(text: str) -> Iterator[str]:
    """PEM blocks: up to the end marker, or where that was cut off, as far as the lines look like a key."""
    done = 0
    end: re.Match[str] | None = None
    ends_left = True
    while begin := BEGIN.search(text, done):
        end = END.search(text, begin.end()) if ends_left else None
        ends_left = end is not None
        stop = end.end() if end else _end_of_key(text, begin.end())
        yield text[done : begin.start()]
        yield "[PRIVATE_KEY]" if stop > begin.end() else begin.group()
        done = stop
    yield text[done:]


def _end_of_key(text: str, at: int) -> int:
    """Where the lines from `at` on no longer look like a key."""
    while line := KEY_LINE.match(text, at):
        at = line.end()
    return at


def _email(text: str) -> int:
    """Not the user of a git remote, nor a file's name for a dense screen (logo@2x.png)."""
    return 0 if text.startswith("git@") or re.search(r"@[0-9]x\.", text) else len(text)


def _key(text: str) -> int:
    """Random characters, unlike words with hyphens: a long piece with a digit in it."""
    return len(text) if any(len(p) >= 16 and not p.isalpha() for p in re.split(r"[-_.]", text)) else 0


def _has_digit(text: str) -> int:
    return len(text) if any(c.isdigit() for c in text) else 0


def _iban(text: str) -> int:
    wanted = IBAN_LENGTHS.get(text[:2].upper(), 0)
    places = [i for i, c in enumerate(text) if c.isalnum()]
    if not wanted or len(places) < wanted or (len(places) > wanted and places[wanted] == places[wanted - 1] + 1):
        return 0
    end = places[wanted - 1] + 1
    compact = "".join(c for c in text[:end] if c.isalnum())
    return end if int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1 else 0


def _card(text: str) -> int:
    digits = [int(c) for c in text if c.isdigit()]
    number = "".join(map(str, digits))
    doubled = [d if i % 2 == 0 else d * 2 - 9 * (d > 4) for i, d in enumerate(reversed(digits))]
    return len(text) if ISSUERS.fullmatch(number) and sum(doubled) % 10 == 0 else 0


def _phone(text: str) -> int:
    """Nine digits at least, and no round number."""
    digits = [c for c in text if c.isdigit()]
    return len(text) if 9 <= len(digits) <= 15 and set(digits[3:]) != {"0"} else 0


def _public_v4(text: str) -> int:
    """Versions rarely have four parts with one above 99."""
    return _public(text) if any(len(part) == 3 for part in text.split(".")) else 0


def _public(text: str) -> int:
    try:
        if "::" in text and sum(map(bool, text.split(":"))) < 3:
            return 0  # a::b is a name in many languages
        return len(text) if ipaddress.ip_address(text).is_global else 0
    except ValueError:
        return 0


LENGTHS = """
    AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29 ES24
    FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21
    LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29 RO24 RS22
    RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20
"""
IBAN_LENGTHS = {entry[:2]: int(entry[2:]) for entry in LENGTHS.split()}

ISSUERS = re.compile(
    r"""
      4(?:[0-9]{12}|[0-9]{15}|[0-9]{18})                                            # Visa
    | (?:5[1-5][0-9]{2}|222[1-9]|22[3-9][0-9]|2[3-6][0-9]{2}|27[01][0-9]|2720)[0-9]{12}  # Mastercard
    | (?:5018|5020|5038|5893|6304|6759|676[1-3])[0-9]{8,15}                         # Maestro
    | (?:2131|1800)[0-9]{11}                                                        # JCB, of old
    | 3[47][0-9]{13}                                                                # American Express
    | 3(?:0[0-5]|[689][0-9])[0-9]{11}                                               # Diners
    | (?:6011|65[0-9]{2}|64[4-9][0-9])[0-9]{12}                                     # Discover
    | 35(?:2[89]|[3-8][0-9])[0-9]{12}                                               # JCB
    | 62[0-9]{14,17}                                                                # UnionPay
    """,
    re.VERBOSE,
)

KEYS = r"""
    (?<![\w-])(?:
      sk-[\w-]{16,}+ | [rsp]k_(?:live|test)_[A-Za-z0-9]{16,}+ | gh[opusr]_[A-Za-z0-9]{30,}+ | github_pat_\w{22,}+
    | glpat-[\w-]{16,}+ | (?:AKIA|ASIA)[0-9A-Z]{16} | AIza[\w-]{35} | xox[abeprs]-[\w-]{16,}+ | hf_[A-Za-z0-9]{30,}+
    | npm_[A-Za-z0-9]{30,}+ | pypi-[\w-]{30,}+ | SG\.[\w-]{16,}+\.[\w-]{16,}+
    )(?![\w-])
"""

PHONES = r"""
      (?<![\w.+])\+[1-9](?:[ .\-/()]{0,2}[0-9]){8,14}(?!\w)                                  # +49 30 901820
    | (?<![\w.+-])00[1-9][0-9]{0,2}[ \-/(]{1,2}[0-9](?:[ \-/()]{0,2}[0-9]){5,11}(?![\w-])    # 0049 30 901820
    | (?<![\w.+-])(?:1[-. ])?(?:\([2-9][0-9]{2}\)[ ]?|[2-9][0-9]{2}[-.])[2-9][0-9]{2}[-.][0-9]{4}(?!\w|[-.][0-9])
"""

CARDS = r"""
    (?<![\w.+-])(?:[0-9]{12,19} | [0-9]{4}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{1,7} | [0-9]{4}([ -])[0-9]{6}\2[0-9]{4,5})
    (?!\w|[.,-][0-9])
"""

V4 = r"(?<![\w.@])(?<!==)(?<!>=)(?<![Vv]ersion[ ])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?!\w|[.-]\w)"


def _rule(placeholder: str, needle: str, pattern: str, length: Callable[[str], int] = len) -> Rule:
    return Rule(placeholder, needle, re.compile(pattern, re.VERBOSE), length)


HOME = _rule("[PHONE]", "", identity.HOME, identity.home_phone())._replace(checked=PHONES_CHECKED)

# In this order: what may contain another kind comes before it.
RULES = (
    _rule("[SECRET]", "eyJ", r"(?<![\w-])eyJ[\w-]{8,}+\.[\w-]{8,}+\.[\w-]{8,}+"),
    _rule("[SECRET]", "", KEYS, _key),
    _rule("[SECRET]", "earer ", r"(?<=[Bb]earer[ ])[A-Za-z0-9._~+/=-]{16,}+", _has_digit),
    _rule("[SECRET]", "://", r"(?<=://)[^\s/:@]{1,64}:[^\s/@]{1,128}(?=@)"),
    _rule("[EMAIL]", "@", r"(?<!\w)[\w.%+-]{1,128}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w(])", _email),
    _rule("[IBAN]", "", r"(?<!\w)[A-Za-z]{2}[0-9]{2}(?:[ -]?[A-Za-z0-9]){11,30}", _iban),
    _rule("[CARD]", "", CARDS, _card),
    _rule("[ID]", "", identity.NATIONAL, identity.national),
    _rule("[PHONE]", "", PHONES, _phone),
    _rule("[IP]", ":", r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:]|\.\w)", _public),
    _rule("[IP]", ".", V4, _public_v4),
    HOME,
)
