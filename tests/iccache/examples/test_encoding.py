"""Counting against the package that encodes: the same numbers on real text, nearly the same on the strangest."""

import random
import string
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import bpe_openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iccache.errors import ConfigError
from iccache.examples.encoding import EXPRESSIONS, LONGEST_PIECE, MERGED_BYTES, Encoding
from iccache.examples.tokens import WHOLE_CHARS, make_tokenizer

ROOT = Path(__file__).parents[3]
LANGUAGES = [
    "Der schnelle braune Fuchs springt über den faulen Hund, und niemand weiß warum. Äpfel, Öl und ÜBERMUT!",
    "L'élève n'a pas compris ; c'est l'été. DON'T, I'LL, we've, l'\u017fs",
    "Быстрая коричневая лиса прыгает через ленивую собаку. ПРИВЕТ, МИР",
    "Γρήγορη καφέ αλεπού πηδάει πάνω από τον τεμπέλη σκύλο",
    "素早い茶色の狐がのろまな犬を飛び越える。カタカナとひらがな。",
    "敏捷的棕色狐狸跳过了懒狗。这是一个测试、看看分词是否正确。",
    "빠른 갈색 여우가 게으른 개를 뛰어넘는다",
    "الثعلب البني السريع يقفز فوق الكلب الكسول",
    "तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है",
    "สุนัขจิ้งจอกสีน้ำตาลกระโดดข้ามสุนัขขี้เกียจ",
    "😀👩\u200d👩\u200d👧 emoji ✈\ufe0f ½ ² Ⅷ x²+y² 𠀀𠀁 𒀀 ǅungla ʰello ªº",
    "\t\tif x:\r\n\r\n   return 1   \n\n\n  ",
    "a\u00a0b \u2003c\x1cd\x85e\u3000f   ",
    "<|endoftext|> <|im_start|>system",
    "",
]


@pytest.fixture(params=list(EXPRESSIONS), scope="module")
def pair(request: pytest.FixtureRequest) -> tuple[Encoding, bpe_openai.Encoding]:
    return Encoding(request.param), reference_of(request.param)


Pair = tuple[Encoding, bpe_openai.Encoding]


def tokens(reference: bpe_openai.Encoding, text: str) -> int:
    return len(reference.encode_ordinary(text))


@cache
def reference_of(name: str) -> bpe_openai.Encoding:
    return bpe_openai.get_encoding(name)


def real() -> Iterator[str]:
    """Prose and code of this repository."""
    for file in [*ROOT.glob("*.md"), *ROOT.glob("iccache/*.py"), *ROOT.glob("router/*.py"), *ROOT.glob("*.toml")]:
        yield file.read_text("utf-8")[:WHOLE_CHARS]


def test_real_text_has_the_same_count(pair: Pair) -> None:
    mine, reference = pair
    texts = [*real(), *LANGUAGES]
    assert [mine.count(text) for text in texts] == [tokens(reference, text) for text in texts]
    assert [mine.count(text) for text in texts] == [tokens(reference, text) for text in texts]  # now all is known


def test_mixtures_have_the_same_count(pair: Pair) -> None:
    mine, reference = pair
    rng = random.Random(1)
    for _ in range(200):
        text = "".join(rng.choice(rng.choice(LANGUAGES) + " \n'/") for _ in range(200))
        assert mine.count(text) == tokens(reference, text), text


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(max_codepoint=0x24FF, exclude_categories=["Cs", "Cn"]), max_size=60))
def test_any_text_has_nearly_the_same_count(text: str) -> None:
    """Not the same alone where the editions of Unicode differ in what a character is."""
    mine = make_tokenizer("o200k_base").count(text)
    assert abs(mine - tokens(reference_of("o200k_base"), text)) <= 1


@pytest.mark.parametrize(
    "alphabet", ["a", "abc", string.ascii_lowercase, string.ascii_letters + string.digits, "語", "กขค"]
)
def test_runs_without_a_break_are_off_by_little(pair: Pair, alphabet: str) -> None:
    mine, reference = pair
    text = "".join(random.Random(2).choices(alphabet, k=20_000))
    assert len(text) > max(LONGEST_PIECE, MERGED_BYTES)
    assert mine.count(text) == pytest.approx(tokens(reference, text), rel=0.03)


@pytest.mark.parametrize("name", list(EXPRESSIONS))
def test_a_long_text_is_off_by_little(name: str) -> None:
    text = "".join(real())
    assert len(text) > 2 * WHOLE_CHARS
    whole = sum(tokens(reference_of(name), text[i : i + 100_000]) for i in range(0, len(text), 100_000))
    assert make_tokenizer(name).count(text) == pytest.approx(whole, rel=0.05)


@pytest.mark.parametrize("alphabet", ["a", string.ascii_lowercase, "語", "กขค ", "\u0251\u0252 ", "\n", "a'"])
def test_no_text_is_merged_for_long(monkeypatch: pytest.MonkeyPatch, alphabet: str) -> None:
    """Merging takes a microsecond or two a byte, in the thread that serves everybody."""
    text = "".join(random.Random(3).choices(alphabet, k=500_000))
    done = 0

    def counted(self: Encoding, data: bytes) -> int:
        nonlocal done
        done += len(data)
        return merged(self, data)

    merged = Encoding._merged
    monkeypatch.setattr(Encoding, "_merged", counted)
    make_tokenizer.__wrapped__("o200k_base").count(text)
    assert done <= 2 * MERGED_BYTES


def test_what_is_remembered_is_bounded() -> None:
    encoding = Encoding("o200k_base")
    for start in range(0, 60_000, 1000):
        encoding.count(" ".join(f"word{n}x" for n in range(start, start + 1000)))
    assert len(encoding._known) <= 20_000


def test_an_unknown_encoding_is_an_error() -> None:
    with pytest.raises(ConfigError, match="neither"):
        Encoding("gpt2")
