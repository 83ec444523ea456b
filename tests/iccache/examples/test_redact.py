"""Redaction on labelled lines, on text made to be slow, and on itself."""

import re
import subprocess
import sys
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iccache.errors import ConfigError
from iccache.examples.redact import RULES, Redactor

redact = Redactor().redact

# «…» marks what has to go.
PERSONAL = """
mail me at «bob@example.com»
From: "Ann Lee" <«ann.lee+news@mail.example.co.uk»>
cc «x_y%z@sub.domain.museum», «o.k@firma.de».
contact:«info@日本語.jp»
mailto:«support@example.org»?subject=hi
{"email": "«jane.doe@corp.io»"}
write to «müller@bücher.example.de» today
ring «+49 30 901820» or «+49 (0)30 9018-20»
my number is «+14155552671»
tel:«+44-20-7946-0958»
WhatsApp «+33 6 12 34 56 78», please
call «+1 (415) 555-2671» now
«+91 98765 43210» is mine
Büro: «0049 30 901820»
phone («+420 222 333 444»)
US: «(415) 555-2671» and «415-555-2671» and «1-800-555-0199»
«212.555.0147» after six
card «4111 1111 1111 1111» exp 12/29
Munich: «089 1234567», London «0117 496 0714» or «(0306) 9990687», Paris «06 12 34 56 78»
extension: «405-462-4629x26480» or «(224)205-9802x507»
Brasil: «(11) 98765-4321»; España «612 345 678»; «01174960714»
SSN «536-90-4399»
NINO «AB 12 34 56 C»
NIR «2 95 10 99 126 111 93»
DNI «54362315K», NIE «X-2482300W»
codice fiscale «RCCMNL83S18D969H»
PESEL «44051401359»
personnummer «880320-0016»
CPF «390.533.447-05», CNPJ «16.727.230/0001-97»
Aadhaar «2345 6789 0124»
host «2a00:1450:4001:81b::200e».
visa «4111111111111111»
mc «5500-0000-0000-0004»
amex «3782 822463 10005»
pay with «6011000990139424».
IBAN «DE89 3704 0044 0532 0130 00» please
«GB82WEST12345698765432»
to «FR14 2004 1010 0505 0001 3M02 606» and «NL91ABNA0417164300»
IBAN:«CH93 0076 2011 6238 5295 7», BIC later
iban «gb29 nwbk 6016 1331 9268 19»
key «sk-abcdEFGH1234ijklMNOP5678qrst»
OPENAI_API_KEY=«sk-proj-Ab12Cd34Ef56Gh78Ij90Kl12Mn34»
anthropic «sk-ant-api03-Zx81Kd93mLq0Pw72Vb65Nc48Xy»
token «ghp_abcdefghijklmnopqrstuvwxyz0123456789»
«github_pat_11ABCDEFG0abcdefghijkl_mnopqrstuv»
aws_access_key_id = «AKIAIOSFODNN7EXAMPLE»
google «AIzaSyA1234567890abcdefghijklmnopqrstuv»
slack «xoxb-123456789012-abcdefABCDEF1234»
stripe «sk_live_4eC39HqLyjWDarjtT1zdp7dc»
gitlab «glpat-AbCd1234EfGh5678IjKl»
hf «hf_AbCdEfGhIjKlMnOpQrStUvWxYz12345678»
Authorization: Bearer «abcDEF123456.ghiJKL7890»
curl -H "Authorization: bearer «0a1b2c3d4e5f60718293a4b5»"
jwt «eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U»
postgres://«admin:hunter22»@db.internal:5432/app
-----BEGIN of a letter, and «-----BEGIN RSA PRIVATE KEY-----\\nMIIEpAIBAAKCAQEA7bq\\n-----END RSA PRIVATE KEY-----»
seen from «93.184.216.34» at noon
client «2a00:1450:4001:81b::200e» connected
http://«142.250.185.78»/path
"""

HARMLESS = """
There are 1234567 rows and 98765432 columns
The 3.141592653589793 and 2.718281828459045 of it
Order 4000123412341235 was shipped
order no. 2024-0001-0002-0003
Invoice INV-2026-000123, customer 100200300
2026-11-03T10:15:30+02:00 and 2026-11-03 10:15:30.123456
Tue, 03 Nov 2026 10:15:30 +0000
from 10:00:00 to 12:30:45
550e8400-e29b-41d4-a716-446655440000
123e4567-e89b-12d3-a456-426614174000 00000000-0000-0000-0000-000000000000
version 1.2.3.4, v10.0.19041.1 and 2.31.0
chrome 120.0.6099.109, kernel 6.1.0-18
numpy==2.4.6 torch>=2.13.0 foo==1.2.3.400
localhost 127.0.0.1, 0.0.0.0 and 192.168.1.77
sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
commit 3f2504e04f8911d39a0c0305e82c3301
timestamp 1700000000, 1700000000000 and 1700000000000000000
@app.route("/users") def users(): pass
c = a @ b.T; y = X@W.transpose()
git clone git@github.com:user/repo.git
npm i react@18.2.0 lodash@latest
icon@2x.png next to icon@3x.jpg
for (int i = 0; i < 100000000; i++) { x += 1234567890; }
std::vector<int> v; a::b::c(d)
00:1A:2B:3C:4D:5E is a MAC address
x = +12345678
the sum +100 000 000 is round
1 000 000 000 000 and 12,345,678.90 EUR
GB82 WEST 1234 5698 7654 33 has a wrong remainder
IS12 is a road, DE89 is not an account
AB12 CD34 EF56 GH78 IJ90 KL12 MN34
ISBN 978-3-16-148410-0, EAN 4006381333931
4111111111111112 fails the check
sk-folding-cube-spinner-2 and sk-learn-pipeline-step
class="sk-cube-grid-wrapper-element"
Bearer of bad news, the Bearer authentication
a bearer token-authentication-scheme
Section 10.12.13.14 of the law
1-2-3-4-5-6-7-8-9-10-11-12-13
5 + 7 = 12; +5; -3; 2+2=4
Call me at five, room 415-555
#ff00ff rgba(12, 34, 56, 0.5)
https://example.com:8080/path?q=1&r=2#frag
mailto: nobody, foo@bar, @handle, user@localhost
coordinates 52.520008, 13.404954
[1, 22, 333, 4444, 55555, 666666, 7777777]
0x7ffeefbff5c8 0b101010101010
tel. 112 or 911
-----BEGIN PUBLIC KEY-----
the header -----BEGIN PRIVATE KEY----- starts it
1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16
score 21:19, 19:21, 15:13
part 082-8316-31, rev B36
SSN 000-05-1120, DNI 54362315A, PESEL 44051401358 and CPF 390.533.447-06 fail their checks
abcd::12 and std::vector<int>
2024-03-12 and 12.03.2024 or 03/12/2024 10:30:05
a1b2c3d4-e5f6-7890-abcd-ef1234567890
"""


# What shapes alone cannot tell: personal data that stays (the first), and harmless text that goes (the second).
STAYS = """
Sarah Connor lives at 12 Baker Street
my password is hunter2
my number is 5586235703, SSN 078-05-1120 was never anybody's
BSN 123456782, bare as it is
session=9f86d081884c7d659a2feaa0c55ad015
1.2.3.4 is somebody's address
"""
GOES = """
Order 4000123412341234 happens to be a valid card
What is 415-555-2671 minus 3?
the build 1.2.3.120 has four parts
groups of digits: 9999 0044 0532 0130 01
"""


class Line(NamedTuple):
    text: str
    secrets: list[str]


def labelled() -> list[Line]:
    lines = [line for line in (PERSONAL + HARMLESS).splitlines() if line]
    return [Line(re.sub("[«»]", "", line), re.findall("«(.*?)»", line)) for line in lines]


def test_nothing_labelled_is_missed_and_nothing_else_is_taken() -> None:
    lines = labelled()
    missed = [s for line in lines for s in line.secrets if s in redact(line.text)]
    harmed = []
    for line in lines:
        expected = line.text
        for secret in line.secrets:
            expected = expected.replace(secret, "\0")
        if re.sub(r"\[[A-Z_]+\]", "\0", redact(line.text)) != expected and not any(s in missed for s in line.secrets):
            harmed.append((line.text, redact(line.text)))
    assert sum(len(line.secrets) for line in lines) >= 50
    assert len(lines) >= 95
    assert missed == []
    assert harmed == []


def test_the_known_limits_are_as_stated() -> None:
    assert [line for line in STAYS.splitlines() if redact(line) != line] == []
    assert [line for line in GOES.splitlines() if line and redact(line) == line] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a@b.org +49 30 901820", "[EMAIL] [PHONE]"),
        ("4111111111111111", "[CARD]"),
        ("DE89 3704 0044 0532 0130 00 FR1420041010050500013M02606", "[IBAN] [IBAN]"),
        ("DE89370400440532013000 AND MORE", "[IBAN] AND MORE"),
        ("AB12 DE89370400440532013000", "AB12 [IBAN]"),
        ("Bearer 0a1b2c3d4e5f60718293", "Bearer [SECRET]"),
        ("8.8.8.118, 93.184.216.34", "[IP], [IP]"),
    ],
)
def test_the_placeholder_says_what_was_there(text: str, expected: str) -> None:
    assert redact(text) == expected


PEM = "-----BEGIN PRIVATE KEY-----"
BODY = "\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7\nVJTUt9Us8cKjMzEfYyjiWA4R4/M2bS1GB4t7NXp98C3SC6dVMvDu\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"a {PEM}{BODY}-----END PRIVATE KEY----- b", "a [PRIVATE_KEY] b"),
        (f"a {PEM}{BODY}", "a [PRIVATE_KEY]\n"),
        (f"a {PEM}{BODY}and words", "a [PRIVATE_KEY]\nand words"),
        (f"{PEM}{BODY}{PEM}{BODY}", "[PRIVATE_KEY]\n[PRIVATE_KEY]\n"),
        (f"{PEM}{BODY}-----END PRIVATE KEY-----\n{PEM}{BODY}", "[PRIVATE_KEY]\n[PRIVATE_KEY]\n"),
        (f"what is {PEM}?", f"what is {PEM}?"),
    ],
)
def test_private_keys_go_even_when_cut_off(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_own_patterns_are_added() -> None:
    redactor = Redactor(patterns=[r"EMP-\d{5}", r"x*"])
    assert redactor.redact("EMP-12345 wrote a@b.org xx") == "[REDACTED] wrote [EMAIL] [REDACTED]"


def test_a_broken_own_pattern_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="not a regular expression"):
        Redactor(patterns=["("])


def test_switched_off_it_changes_nothing() -> None:
    assert Redactor(False, ["a"]).redact("a@b.org") == "a@b.org"


def test_a_name_keeps_its_bearer_apart_and_tells_nothing() -> None:
    redactor = Redactor()
    for plain in ("ann", "user-12345", "3f2504e0-4f89-11d3-9a0c-0305e82c3301", "x" * 200, ""):
        assert redactor.name(plain) == plain
    named = [redactor.name(n) for n in ("ann@b.org", "bob@b.org", "x" * 201, "x" * 202, "y" + "\ud800" * 300)]
    assert len(set(named)) == len(named) and all(len(n) <= 200 for n in named)
    assert named[0].startswith("[EMAIL]#") and "ann" not in named[0]
    assert [redactor.name(n) for n in named] == named
    assert Redactor(False).name("ann@b.org") == "ann@b.org"


pieces = st.sampled_from(
    [
        *" .:@+-/\n",
        "a",
        "1",
        "sk-",
        "eyJ",
        "://",
        "bob@example.com",
        "4111111111111111",
        "DE89370400440532013000",
        "+49 30 901820",
        "93.184.216.34",
        "Bearer ",
        "AKIAIOSFODNN7EXAMPLE",
        PEM,
        BODY,
        "é",
        "\ud800",
    ]
)


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(pieces, max_size=30))
def test_doing_it_twice_changes_nothing_more(parts: list[str]) -> None:
    once = redact(" ".join(parts))
    assert redact(once) == once


@given(text=st.text(alphabet="abcdefghijklmnopqrstuvwxyz ,.!?\n", max_size=200))
def test_plain_words_are_left_alone(text: str) -> None:
    assert redact(text) == text


def test_every_rule_knows_its_placeholder() -> None:
    assert all(re.fullmatch(r"\[[A-Z]+\]", rule.placeholder) for rule in RULES)


SLOW = """
from iccache.examples.redact import Redactor
redact = Redactor().redact
pem = "-----BEGIN PRIVATE KEY-----"
units = ["a", "1", "a@", "a.", "a.a@", "1 ", "1-", "1.", "+1", "+1 2 3 ", "AB12 ", "AB12", "sk-", "eyJ", "://a:", ":",
    "eyJaaaaaaaa.", "::1 ", "1.1.1.1 ", "4111 ", "4111111111111111", "Bearer ", "-", "(415) ", " ", "@", "%.", "SG.",
    pem, pem + " ", pem + "A" * 50 + " ", "-----END PRIVATE KEY-----", "415-555-", "0049 "]
prefixed = [("x@", "a."), ("://", "a:"), ("sk-", "a"), ("eyJ", "a"), ("Bearer ", "a"), (pem, " "),
    ("-----BEGIN ", "A ")]
for prefix, unit in [("", unit) for unit in units] + prefixed:
    redact(prefix + unit * (100_000 // len(unit)))
"""


def test_text_made_to_be_slow_is_not() -> None:
    """12 MB: some seconds of linear work. What grows with the square takes minutes for each of them."""
    subprocess.run([sys.executable, "-c", SLOW], check=True, timeout=600)
