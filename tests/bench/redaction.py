# ruff: noqa: E501, PLC0415  # templates are one line; candidates may not be installed; the set is no secret
"""How much of what is personal a redactor finds, and how much that is not it takes for it, on a labelled set.

    python -m tests.bench.redaction [--seed 0] [--each 40] [--candidates own,scrubadub,datafog,presidio]

The set is made by `faker` (seeded) in several languages, put into sentences, beside texts that look alike and are not
personal: versions, order numbers, hashes, times, code. A miss is a value that can still be read in the outcome. A false
hit is a text without anything personal that came out changed. Candidates that are not installed are left out.
"""

from __future__ import annotations

import argparse
import inspect
import ipaddress
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from faker import Faker
from stdnum import iban

from iccache.config import PHONE_REGIONS
from iccache.examples.redact import Redactor

LOCALES = ("en_US", "en_GB", "de_DE", "fr_FR", "es_ES", "it_IT", "pl_PL", "nl_NL", "pt_BR", "sv_SE", "ja_JP", "en_IN")
SENTENCES = (
    "Please reach me: {}.",
    "My {kind} is {}, can you update the record?",
    "Write a polite reply to this customer ({}).",
    "Kunde: {}\nBitte antworten.",
    "{}",
    'a,b,{},c\n{{"field": "{}"}}',
    "Contact <{}>; thanks!",
)


class Labelled(NamedTuple):
    """A text with the personal values in it; none where it has none."""

    kind: str
    text: str
    values: tuple[str, ...] = ()


def personal(seed: int, each: int) -> list[Labelled]:
    """`each` texts of each kind and language."""
    rng = random.Random(seed)  # a data set, not a secret
    found = []
    for number, locale in enumerate(LOCALES):
        fake = Faker(locale)
        fake.seed_instance(seed * 1000 + number)
        for kind, make in kinds(fake, rng).items():
            for _ in range(each):
                value = make()
                found.append(Labelled(kind, _sentence(rng, kind, value), (value,)))
    return found


def kinds(fake: Any, rng: random.Random) -> dict[str, Callable[[], str]]:
    """Generators of values that are personal or secret, by kind."""
    return {
        "email": fake.email,
        "card": lambda: _grouped(rng, fake.credit_card_number()),
        "iban": lambda: _spaced(rng, _true(fake.iban, lambda made: iban.is_valid(made, check_country=False))),
        "phone, international": lambda: _international(fake, rng),
        "phone, as written at home": fake.phone_number,
        "ip": lambda: _true(fake.ipv4_public if rng.random() < 0.7 else fake.ipv6, _is_public),
        "key": lambda: _key(rng),
        "national number": lambda: _national(fake),
    }


def _true(make: Callable[[], Any], check: Callable[[str], bool]) -> str:
    """Faker makes some that are none: accounts too short for their country, addresses that belong to nobody."""
    made = (str(make()) for _ in range(100))
    return next((value for value in made if check(value)), "DE89370400440532013000")


def _is_public(address: str) -> bool:
    return ipaddress.ip_address(address).is_global


def _sentence(rng: random.Random, kind: str, value: str) -> str:
    return rng.choice(SENTENCES).replace("{}", value, 1).replace("{}", "x").replace("{kind}", kind.split(",")[0])


def _grouped(rng: random.Random, number: str) -> str:
    if len(number) != 16 or rng.random() < 0.4:
        return number
    return rng.choice(" -").join(number[i : i + 4] for i in range(0, 16, 4))


def _spaced(rng: random.Random, iban: str) -> str:
    return iban if rng.random() < 0.5 else " ".join(iban[i : i + 4] for i in range(0, len(iban), 4))


def _international(fake: Any, rng: random.Random) -> str:
    code = rng.choice(["+49", "+44", "+33", "+1", "+34", "+39", "+48", "+91", "+55", "0049", "0033"])
    area, rest = str(rng.randint(20, 989)), str(rng.randint(1_000_000, 99_999_999))
    written = (
        ["{} {} {}", "{}-{}-{}", "{} ({}) {}"] if code[0] == "0" else ["{} {} {}", "{}-{}-{}", "{}{}{}", "{} ({}) {}"]
    )
    return rng.choice(written).format(code, area, rest)


ALPHABET = "ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz0123456789"


def _random(rng: random.Random, n: int) -> str:
    return "".join(rng.choice(ALPHABET) for _ in range(n - 1)) + rng.choice("0123456789")


def _key(rng: random.Random) -> str:
    makers = (
        lambda: f"sk-proj-{_random(rng, 48)}",
        lambda: f"sk-ant-api03-{_random(rng, 90)}",
        lambda: f"ghp_{_random(rng, 36)}",
        lambda: f"github_pat_{_random(rng, 22)}_{_random(rng, 59)}",
        lambda: "AKIA" + "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567") for _ in range(16)),
        lambda: f"xoxb-{rng.randint(10**11, 10**12)}-{rng.randint(10**11, 10**12)}-{_random(rng, 24)}",
        lambda: f"AIza{_random(rng, 35)}",
        lambda: f"eyJ{_random(rng, 30)}.eyJ{_random(rng, 60)}.{_random(rng, 43)}",
        lambda: f"glpat-{_random(rng, 20)}",
        lambda: f"sk_live_{_random(rng, 24)}",
        lambda: f"hf_{_random(rng, 34)}",
    )
    return rng.choice(makers)()


def _national(fake: Any) -> str:
    """As the country writes it: SSN, NINO, Steuer-ID, NIR, NIF, codice fiscale, PESEL, BSN, CPF, personnummer, Aadhaar."""
    for name in ("pesel", "cpf", "aadhaar_id", "ssn"):
        made = getattr(fake, name, None)
        if made is not None:
            return str(made())
    return str(fake.numerify("###-##-####"))


def harmless(seed: int, each: int) -> list[Labelled]:
    """Texts that hold nothing personal, `each` of each kind."""
    rng = random.Random(seed + 1)
    fake = Faker("en_US")
    fake.seed_instance(seed + 1)
    digits: Callable[[int], str] = lambda n: "".join(rng.choice("0123456789") for _ in range(n))  # noqa: E731
    hexes: Callable[[int], str] = lambda n: "".join(rng.choice("0123456789abcdef") for _ in range(n))  # noqa: E731
    makers: dict[str, Callable[[], str]] = {
        "version": lambda: (
            f"Upgrade to version {rng.randint(0, 30)}.{rng.randint(0, 20)}.{rng.randint(0, 99)}"
            f".{rng.randint(0, 99)} of the package."
        ),
        "build": lambda: (
            f"Chrome/{rng.randint(80, 140)}.0.{rng.randint(1000, 7000)}.{rng.randint(0, 99)} is supported."
        ),
        "private address": lambda: f"The server listens on {fake.ipv4_private()}:{rng.randint(80, 9999)}.",
        "order number": lambda: (
            f"Where is my order {rng.choice(['ORD-', 'No. ', '#', 'A', 'INV/2024/'])}{digits(rng.choice([6, 8, 10, 12]))}?"
        ),
        "date and time": lambda: f"It happened on {fake.iso8601()} or {fake.date('%d.%m.%Y %H:%M:%S')}.",
        "unix time": lambda: (
            f"ts={rng.randint(1_600_000_000, 1_800_000_000)} ms={rng.randint(16 * 10**11, 18 * 10**11)}"
        ),
        "hash": lambda: f"commit {hexes(rng.choice([7, 12, 32, 40, 64]))} fixes it",
        "uuid": lambda: f"id: {fake.uuid4()}",
        "number": lambda: f"The sum of {rng.randint(10**5, 10**9):,} and {rng.random() * 1e6:.6f} is asked for.",
        "long number": lambda: f"What is {digits(rng.choice([9, 11, 14, 16, 18, 20]))} modulo 7?",
        "isbn": lambda: f"ISBN {fake.isbn13()} and {fake.isbn10()}",
        "coordinates": lambda: f"{fake.latitude()}, {fake.longitude()} and {fake.coordinate()}",
        "code": lambda: rng.choice(CODE).format(rng.randint(100, 99999), rng.randint(100, 99999), hexes(8)),
        "mac": lambda: f"Its MAC address prefix is {hexes(2)}:{hexes(2)}:{hexes(2)}",
        "handle": lambda: f"@{fake.user_name()} said: see {fake.uri_path()} at 10:30 p.m.",
        "scores": lambda: (
            f"They won {rng.randint(0, 9)}-{rng.randint(0, 9)}, {rng.randint(100, 130)}-{rng.randint(90, 120)} in 2019-2020."
        ),
        "words": lambda: " ".join(fake.sentences(4)),
        "range": lambda: (
            f"pages {rng.randint(100, 400)}-{rng.randint(401, 999)}, lines {rng.randint(1000, 4000)}-{rng.randint(4001, 9999)}"
        ),
        "part number": lambda: f"part {digits(3)}-{digits(4)}-{digits(2)}, rev {rng.choice('ABC')}{digits(2)}",
        "ratio": lambda: f"{rng.randint(1, 9)}:{rng.randint(10, 59)}:{rng.randint(10, 59)} and {hexes(4)}::{hexes(2)}",
    }
    return [Labelled(kind, make()) for kind, make in makers.items() for _ in range(each)]


CODE = (
    "git clone git@github.com:org/repo-{0}.git && cd repo-{0}",
    "@app.route('/items/<int:id>')\ndef item(id): return rows[{0}:{1}]",
    "x = np.array([{0}, {1}]); y = x @ x.T  # {2}",
    "npm i left-pad@1.{0}.0 lodash@{1}",
    "SELECT * FROM t WHERE id IN ({0}, {1}) -- {2}",
    'color: #{2}; content: "\\{0}";',
    "<img src='logo@2x.png' width={0} height={1}>",
    "sk-learn-pipeline-for-text-classification-tasks, run {0}",
    "std::vector<int> a{{{0}, {1}}}; a::b::c(0x{2});",
)


# candidates: each a function from text to text


def own() -> Callable[[str], str]:
    return Redactor().redact


def scrubadub_() -> Callable[[str], str]:
    import scrubadub  # type: ignore[import-not-found]  # only where it is installed

    scrubber = scrubadub.Scrubber(locale="en_US")
    return lambda text: str(scrubber.clean(text))


def datafog_() -> Callable[[str], str]:
    from datafog.processing.text_processing.regex_annotator import RegexAnnotator  # type: ignore[import-not-found]

    annotator = RegexAnnotator()

    def redact(text: str) -> str:
        _, found = annotator.annotate_with_spans(text)
        return cut(text, [(s.start, s.end) for s in found.spans])

    return redact


def presidio_() -> Callable[[str], str]:
    """Its recognizers by pattern and check digit, of all countries, without a language model."""
    from presidio_analyzer import PatternRecognizer, predefined_recognizers  # type: ignore[import-not-found]

    made = [predefined_recognizers.PhoneRecognizer(supported_regions=PHONE_REGIONS)]
    for kind in vars(predefined_recognizers).values():
        if inspect.isclass(kind) and issubclass(kind, PatternRecognizer) and kind is not PatternRecognizer:
            try:
                made.append(kind())
            except Exception as exc:  # some want a service
                print(f"# {kind.__name__}: {exc}")
    wanted = [r for r in made if set(r.supported_entities) - {"URL", "DATE_TIME"}]

    def redact(text: str) -> str:
        spans = [
            (hit.start, hit.end)
            for r in wanted
            for hit in r.analyze(text, r.supported_entities, None) or ()
            if hit.score >= 0.4
        ]
        return cut(text, spans)

    return redact


def cut(text: str, spans: Iterable[tuple[int, int]]) -> str:
    for start, end in sorted(spans, reverse=True):
        text = text[:start] + "[X]" + text[end:]
    return text


CANDIDATES: dict[str, Callable[[], Callable[[str], str]]] = {
    "own": own,
    "scrubadub": scrubadub_,
    "datafog": datafog_,
    "presidio": presidio_,
}


class Outcome(NamedTuple):
    """What one redactor did on one kind."""

    texts: int
    wrong: int


def missed(redact: Callable[[str], str], item: Labelled) -> bool:
    """Whether a value, or eight characters in a row of one, can still be read."""
    out = _bare(redact(item.text))
    return any(len(_bare(v)) > 0 and _readable(_bare(v), out) for v in item.values)


def _readable(value: str, out: str) -> bool:
    width = min(len(value), 8)
    return any(value[i : i + width] in out for i in range(len(value) - width + 1))


def _bare(text: str) -> str:
    return re.sub(r"[\s().\-/+]", "", text)


def measure(
    redact: Callable[[str], str], items: Sequence[Labelled], wrong: Callable[[Callable[[str], str], Labelled], bool]
) -> dict[str, Outcome]:
    texts: Counter[str] = Counter(item.kind for item in items)
    bad = Counter(item.kind for item in items if wrong(redact, item))
    return {kind: Outcome(n, bad[kind]) for kind, n in texts.items()}


def changed(redact: Callable[[str], str], item: Labelled) -> bool:
    return redact(item.text) != item.text


def microseconds(redact: Callable[[str], str], items: Sequence[Labelled]) -> float:
    """CPU time for one text."""
    started = time.process_time()
    for item in items:
        redact(item.text)
    return (time.process_time() - started) / len(items) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=40)
    parser.add_argument("--candidates", default=",".join(CANDIDATES))
    parser.add_argument("--show", type=int, default=0, help="Print so many wrong ones of each kind.")
    args = parser.parse_args()
    found, clean = personal(args.seed, args.each), harmless(args.seed, args.each * 5)
    columns: dict[str, dict[str, Outcome]] = {}
    cost = {}
    for name in args.candidates.split(","):
        try:
            redact = CANDIDATES[name]()
        except ImportError as exc:
            print(f"# {name} is not installed: {exc}")
            continue
        columns[name] = {f"missed: {k}": o for k, o in measure(redact, found, missed).items()}
        columns[name] |= {f"false: {k}": o for k, o in measure(redact, clean, changed).items()}
        cost[name] = microseconds(redact, clean)
        for item in (found + clean) if args.show else ():
            if (missed if item.values else changed)(redact, item):
                print(f"# {name} {item.kind}: {item.text!r} -> {redact(item.text)!r}")
    print(f"| share wrong | texts | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    first = next(iter(columns.values()))
    for row, outcome in first.items():
        shares = (f"{c[row].wrong / c[row].texts:.1%}" for c in columns.values())
        print(f"| {row} | {outcome.texts} | {' | '.join(shares)} |")
    print(f"| CPU, microseconds a text | | {' | '.join(f'{cost[name]:.0f}' for name in columns)} |")


if __name__ == "__main__":
    main()
