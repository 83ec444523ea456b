"""The cache in front of a model, the identity of a model, and what goes wrong with folders."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from iccache import config
from iccache.errors import ConfigError
from iccache.examples.embed import make_embedder
from iccache.examples.embed.cached import CachedEmbedder
from iccache.examples.embed.embedder import digest, ends
from iccache.examples.embed.hashed import HashEmbedder
from iccache.examples.embed.sentence_transformer import packaged_folder
from iccache.types import Matrix


class Counting(HashEmbedder):
    """Keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(16)
        self.calls: list[list[str]] = []

    def embed(self, texts: Sequence[str]) -> Matrix:
        self.calls.append(list(texts))
        return super().embed(texts)


def test_repeated_text_costs_nothing() -> None:
    inner = Counting()
    cached = CachedEmbedder(inner, 10)
    first = cached.embed(["a", "b", "a"])
    again = cached.embed(["b", "a", "c"])
    assert inner.calls == [["a", "b"], ["c"]]
    np.testing.assert_array_equal(first[0], first[2])
    np.testing.assert_array_equal(again[:2], first[[1, 0]])


def test_the_least_recently_used_text_is_forgotten() -> None:
    inner = Counting()
    cached = CachedEmbedder(inner, 2)
    for text in ("a", "b", "a", "c", "a", "b"):
        cached.embed([text])
    assert inner.calls == [["a"], ["b"], ["c"], ["b"]]


def test_a_batch_larger_than_the_cache_is_answered_whole() -> None:
    texts = [f"text {i}" for i in range(50)]
    np.testing.assert_array_equal(CachedEmbedder(HashEmbedder(), 3).embed(texts), HashEmbedder().embed(texts))


def test_the_caller_may_write_into_what_it_got() -> None:
    cached = CachedEmbedder(HashEmbedder(), 3)
    cached.embed(["a"])[:] = 0.0
    assert np.linalg.norm(cached.embed(["a"])) == pytest.approx(1.0)


def test_without_entries_nothing_is_kept_but_a_call_still_embeds_each_text_once() -> None:
    inner = Counting()
    cached = CachedEmbedder(inner, 0)
    cached.embed(["a", "a"])
    cached.embed(["a"])
    assert inner.calls == [["a"], ["a"]]


def test_the_identity_follows_contents_and_names_but_not_documentation(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "model.bin").write_bytes(b"weights")
    before = digest(tmp_path)
    (tmp_path / "README.md").write_text("words")
    (tmp_path / ".gitattributes").write_text("more words")
    assert digest(tmp_path) == before
    (tmp_path / "model.bin").write_bytes(b"Weights")
    changed = digest(tmp_path)
    (tmp_path / "model.bin").rename(tmp_path / "model2.bin")
    assert len({before, changed, digest(tmp_path)}) == 3


@pytest.mark.parametrize("content", [None, "", "not json", "[]"])
def test_a_folder_without_a_model_is_one_line_of_configuration_error(tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / "model"
    if content is not None:
        folder.mkdir()
        (folder / "modules.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        make_embedder(config.Embedder(backend="sentence-transformers", model=str(folder)))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_importing_the_module_loads_no_model_library() -> None:
    code = "import sys, iccache.examples.embed; print(sorted({'torch', 'sentence_transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_default_embedder_needs_no_model_library() -> None:
    code = (
        "import sys; from iccache import config; from iccache.examples.embed import make_embedder\n"
        "assert make_embedder(config.Embedder()).embed(['hello']).any()\n"
        "print(sorted({'torch', 'sentence_transformers', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_packaged_model_is_there() -> None:
    assert (packaged_folder() / "model.safetensors").is_file()


def test_the_ends_of_a_long_text() -> None:
    assert ends("abc", 3) == "abc"
    assert ends("abcdefgh", 4) == "ab\ngh"
