"""Counting tokens: known numbers, odd text, clear mistakes."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iccache.config import Backend
from iccache.errors import ConfigError
from iccache.examples.embed.sentence_transformer import packaged_folder
from iccache.examples.tokens import MESSAGE_TOKENS, REPLY_TOKENS, WHOLE_CHARS, Tokenizer, count_prompt, make_tokenizer

NAMES = ["o200k_base", "cl100k_base", str(packaged_folder() / "tokenizer.json")]
ODD = [
    "",
    " ",
    "\ud800",
    "<|endoftext|>",
    "<|im_start|>system",
    "[CLS] [SEP]",
    "\0",
    "😀é" * 100,
    "\u200b",
    "\n" * 1000,
]


@pytest.fixture(params=NAMES, ids=["o200k", "cl100k", "file"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return make_tokenizer(request.param)


@pytest.mark.parametrize(
    ("name", "text", "tokens"),
    [
        ("o200k_base", "hello world", 2),
        ("cl100k_base", "hello world", 2),
        ("cl100k_base", "tiktoken is great!", 6),  # the example of OpenAI's cookbook
        ("o200k_base", "<|endoftext|>", 7),  # text, not the one token
        (NAMES[2], "hello world", 2),
        (NAMES[2], "[SEP]", 3),
    ],
)
def test_known_counts(name: str, text: str, tokens: int) -> None:
    assert make_tokenizer(name).count(text) == tokens


@pytest.mark.parametrize("text", ODD)
def test_odd_text_has_a_count(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.count(text) >= 0
    assert tokenizer.count("") == 0


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=200))
def test_no_text_is_too_odd(text: str) -> None:
    for name in NAMES:
        assert 0 <= make_tokenizer(name).count(text) <= 4 * len(text)


def test_a_long_text_has_the_count_of_its_parts(tokenizer: Tokenizer) -> None:
    part = "the cat sat on the mat. " * 100
    assert tokenizer.count(part * 200) == pytest.approx(200 * tokenizer.count(part), rel=0.01)
    run = tokenizer.count("語" * WHOLE_CHARS)
    assert tokenizer.count("語" * (4 * WHOLE_CHARS)) == pytest.approx(4 * run, rel=0.01)
    assert tokenizer.count("a" * 1_200_000) > 0


def test_a_prompt_counts_its_messages(tokenizer: Tokenizer) -> None:
    assert count_prompt(tokenizer, []) == REPLY_TOKENS
    assert count_prompt(tokenizer, ["hello", "world"]) == (
        tokenizer.count("hello") + tokenizer.count("world") + 2 * MESSAGE_TOKENS + REPLY_TOKENS
    )


def test_the_default_of_the_configuration_is_known() -> None:
    assert make_tokenizer(Backend.__struct_defaults__[-1]).count("hello") == 1


@pytest.mark.parametrize("name", ["", "o200k", "gpt-4o", "/nowhere/tokenizer.json"])
def test_an_unknown_tokenizer_is_a_configuration_error_in_one_line(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_tokenizer(name)
    assert str(caught.value).startswith("tokenizer: ")
    assert "\n" not in str(caught.value)


def test_a_broken_file_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        make_tokenizer(str(tmp_path / "tokenizer.json"))


def test_importing_the_module_loads_no_tables() -> None:
    code = "import sys, iccache.examples.tokens; print(sorted({'bpe_openai', 'tokenizers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
