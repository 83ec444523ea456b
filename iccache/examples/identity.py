"""Numbers by which states and telephone companies know people. Shapes are found here; python-stdnum and phonenumbers,
which follow the countries' own rules, say whether one is real: by its check digits, its dates, its area code.

What has no check digit and no dress of its own (nine bare digits) is left alone: most such numbers are something else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

import phonenumbers
from stdnum import verhoeff
from stdnum.br import cnpj, cpf
from stdnum.es import nie, nif
from stdnum.fr import nir
from stdnum.it import codicefiscale
from stdnum.pl import pesel
from stdnum.se import personnummer
from stdnum.us import ssn

from iccache.config import PHONE_REGIONS

REGIONS = PHONE_REGIONS
REMEMBERED = 1000  # phone numbers whose validity is known already

NATIONAL = r"""
    (?<![\w.+/-])(?=[0-9A-Z])(?:
      [0-9]{3}-[0-9]{2}-[0-9]{4}
    | [A-Z]{2}\ ?[0-9]{2}\ ?[0-9]{2}\ ?[0-9]{2}\ ?[A-D]
    | [12][\ ]?[0-9]{2}[\ ]?[0-9]{2}[\ ]?[0-9][0-9AB][\ ]?[0-9]{3}[\ ]?[0-9]{3}[\ ]?[0-9]{2}
    | (?:[0-9]{8}|[XYZ]-?[0-9]{7})-?[A-Z]
    | [A-Z]{6}[0-9]{2}[A-Z][0-9]{2}[A-Z][0-9]{3}[A-Z]
    | [0-9]{11}
    | [0-9]{6}(?:[0-9]{2})?[-+][0-9]{4}
    | [0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}
    | [0-9]{2}\.[0-9]{3}\.[0-9]{3}/[0-9]{4}-[0-9]{2}
    | [2-9][0-9]{3}[\ ][0-9]{4}[\ ][0-9]{4}
    )(?![\w/]|[.-][0-9])
"""

HOME = r"""
    (?<![\w.+/:=#-])(?:
      \(0[0-9]{1,5}\)[ ]?[0-9](?:[ \-]?[0-9]){4,8}                     # (0306) 9990687
    | 0[0-9]{1,4}(?:[ /\-]{1,3}[0-9]{2,8}){1,4}                        # 0117 496 0714, 06 12 34 56 78
    | 0[1-9][0-9]{8,9}                                               # 01174960714
    | \(?[2-9][0-9]{2}\)?[-.\ ]?[2-9][0-9]{2}[-.][0-9]{4}(?:x[0-9]{2,6})?  # (224)205-9802x507
    | (?:001-|1-)[2-9][0-9]{2}-[2-9][0-9]{2}-[0-9]{4}(?:x[0-9]{2,6})?  # 001-535-646-0305x357
    | \(?[1-9][0-9]\)?[ ]9?[0-9]{4}[- ][0-9]{4}                        # (11) 98765-4321
    | [67][0-9]{2}[ ][0-9]{3}[ ][0-9]{3}                               # 612 345 678
    )(?![\w/]|[.,:-][0-9])
"""


def national(text: str) -> int:
    """The length of `text` if it is somebody's number, else 0."""
    return len(text) if any(shape.fullmatch(text) and check(text) for shape, check in SHAPES) else 0


def home_phone(regions: Sequence[str] = REGIONS) -> Callable[[str], int]:
    """How much of a text is a number as written at home, in any of `regions` (ISO 3166): all of it, or 0."""
    valid = lru_cache(REMEMBERED)(lambda text: any(_valid(text, region) for region in regions))

    def length(text: str) -> int:
        digits = text.partition("x")[0]
        if sum(c.isdigit() for c in digits) < (10 if "-" in digits else 9):
            return 0  # part numbers have hyphens too
        return len(text) if valid(digits) else 0

    return length


def _valid(text: str, region: str) -> bool:
    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(text, region))
    except phonenumbers.NumberParseException:
        return False


NINO = re.compile(r"(?!BG|GB|KN|NK|NT|TN|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z][0-9]{6}[A-D]")


def _nino(text: str) -> bool:
    """By the letters that HM Revenue gives out; there is no check digit."""
    return NINO.fullmatch(text.replace(" ", "")) is not None


def _aadhaar(text: str) -> bool:
    compact = text.replace(" ", "")
    return bool(verhoeff.is_valid(compact))


def _shape(pattern: str, check: Callable[[str], bool]) -> tuple[re.Pattern[str], Callable[[str], bool]]:
    return re.compile(pattern), check


SHAPES = (
    _shape(r"\d{3}-\d{2}-\d{4}", ssn.is_valid),  # United States
    _shape(r"[A-Z]{2}[\d ]{6,10}[A-D]", _nino),  # United Kingdom
    _shape(r"[12][\d AB]{14,20}", nir.is_valid),  # France
    _shape(r"\d{8}-?[A-Z]", nif.is_valid),  # Spain
    _shape(r"[XYZ]-?\d{7}-?[A-Z]", nie.is_valid),  # Spain, foreigners
    _shape(r"[A-Z]{6}\w{10}", codicefiscale.is_valid),  # Italy
    _shape(r"\d{11}", pesel.is_valid),  # Poland
    _shape(r"\d{6,8}[-+]\d{4}", personnummer.is_valid),  # Sweden
    _shape(r"\d{3}\.\d{3}\.\d{3}-\d{2}", cpf.is_valid),  # Brazil
    _shape(r"\d{2}\.\d{3}\.\d{3}/\d{4}-\d{2}", cnpj.is_valid),  # Brazil, firms
    _shape(r"\d{4} \d{4} \d{4}", _aadhaar),  # India
)
