"""The cache in front of a model, the identity of a model, and what goes wrong with folders."""

import itertools
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from iccache import config
from iccache.errors import ConfigError
from iccache.examples.embed import make_embedder
from iccache.examples.embed.cached import CachedEmbedder
from iccache.examples.embed.embedder import digest, ends
from iccache.examples.embed.hashed import HashEmbedder
from iccache.examples.embed.onnx import OnnxEmbedder
from iccache.examples.embed.sentence_transformer import SentenceTransformerEmbedder, packaged_folder
from iccache.examples.embed.static import PACKAGED_TABLE, PAIR, SLOTS, SPELT, StaticEmbedder, _mixed, _weights
from iccache.examples.embed.unrelated import unrelated
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


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table as sentence-transformers saves it, with words of five letters."""
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - takes seconds
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding  # noqa: PLC0415

    words = ["[UNK]", *(f"word{c}" for c in "abcdefghij")]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    rows = np.random.default_rng(5).normal(size=(len(words), 6)).astype(np.float32)
    folder = tmp_path_factory.mktemp("static")
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=rows)], device="cpu").save(str(folder))
    return folder


TEXTS = ["worda wordb", "wordc wordc wordc wordd", "something else worda", "wordj " * 300]


def test_a_static_table_of_sentence_transformers_is_read_without_it_and_means_the_same(foreign: Path) -> None:
    ours, theirs = StaticEmbedder(foreign), SentenceTransformerEmbedder(foreign)
    np.testing.assert_allclose(ours.embed(TEXTS), theirs.embed(TEXTS), atol=1e-5)
    assert ours.identity != theirs.identity


def test_a_table_of_model2vec_has_its_weights_and_its_mapping_applied(foreign: Path, tmp_path: Path) -> None:
    rows = load_file(foreign / "model.safetensors")["embedding.weight"]
    factors = np.linspace(1.0, 2.0, len(rows))
    mapping = np.arange(len(rows))[::-1].copy()
    save_file({"embeddings": rows, "weights": factors, "mapping": mapping}, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").write_bytes((foreign / "tokenizer.json").read_bytes())
    expected = factors[1] * rows[len(rows) - 2] + factors[2] * rows[len(rows) - 3]
    np.testing.assert_allclose(
        StaticEmbedder(tmp_path).embed(["worda wordb"])[0], expected / np.linalg.norm(expected), atol=1e-6
    )


@pytest.mark.parametrize("broken", ["tokenizer.json", "scales.npy", "rows-0.npy"])
def test_a_damaged_table_is_one_line_of_configuration_error(tmp_path: Path, broken: str) -> None:
    for file in PACKAGED_TABLE.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 1000 if file.name == broken else None])
    with pytest.raises(ConfigError, match=r"^embedder.model: [^\n]*$"):
        StaticEmbedder(tmp_path)


def test_words_in_scripts_without_pieces_are_told_apart_by_their_spelling() -> None:
    first, alike, other = StaticEmbedder().embed(["ಕಾಲಿಲ್ಲದೆ ನಡೆಯುವುದು", "ಕಾಲಿಲ್ಲದೆ ನಡೆಯುವುದಿಲ್ಲ", "ಬಾಯಿಲ್ಲದೆ ನುಡಿಯುವುದು ಏನು"])
    assert first @ alike > first @ other
    assert first @ other < 0.9


def test_the_packaged_table_has_no_file_above_2_mb() -> None:
    sizes = [file.stat().st_size for file in PACKAGED_TABLE.iterdir()]
    assert max(sizes) < 2_000_000 < sum(sizes) < 8_500_000


def test_threads_may_share_the_table() -> None:
    texts = [f"question {i} about topic {i % 7}" for i in range(200)]
    embedder = StaticEmbedder()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda text: embedder.embed([text])[0], texts))
    np.testing.assert_array_equal(np.stack(found), embedder.embed(texts))


def test_the_order_of_words_and_the_very_words_count() -> None:
    asked, reordered, other = StaticEmbedder().embed(["does the dog bite the man", "does the man bite the dog", "hi"])
    assert 0.8 < asked @ reordered < 0.99
    assert asked @ other < 0.5


def test_what_is_split_without_the_tokenizer_is_split_as_it_does() -> None:
    embedder, rng = StaticEmbedder(), np.random.default_rng(5)
    plain = [chr(c) for c in range(32, 127)] + ["[unk]", "[SEP]", "arr[0]", " can't ", "qwzxkj" * 20, "\n", "\t"]
    texts = ["".join(rng.choice(plain, 40)) for _ in range(300)] + ["arr[0] = x[1:2]", "[MASK] me"]
    for text in texts:
        ids = embedder._plain_ids(text)
        assert ids is None or ids == embedder._tokenizer.encode(text, add_special_tokens=False).ids, text
    assert sum(embedder._plain_ids(text) is not None for text in texts) > 100


def test_a_vector_is_what_the_formula_says() -> None:
    """Word by word, from the tokenizer's own tokens: odd text and text that is tokenised without it."""
    embedder = StaticEmbedder()
    for text in (
        "Don't stop; it's 3.14 (really) a/b",
        "hello hello world hello world",
        "tab\tand\nline",
        "[SEP] x",
        "naïve",
    ):
        ids = embedder._tokenizer.encode(text, add_special_tokens=False).ids
        n, rows, scales = len(embedder._rows), embedder._rows, embedder._scales
        meaning = np.sum([ids.count(t) ** 0.5 * scales[t] * rows[t].astype(np.float64) for t in set(ids)], axis=0)
        spelling = np.zeros(SLOTS)
        weights = _weights(n)
        tokens = {int(_mixed(np.array([t]))[0]): ids.count(t) * weights[t] for t in set(ids)}
        for a, b in itertools.pairwise(ids):
            code = int(_mixed(np.array([a * n + b + n]))[0])
            tokens[code] = tokens.get(code, 0.0) + PAIR * np.sqrt(weights[a] * weights[b])
        for code, weight in tokens.items():
            spelling[code % SLOTS] += (1 if code >> 40 & 1 else -1) * np.sqrt(weight)
        parts = [
            np.sqrt(1 - SPELT) * meaning / np.linalg.norm(meaning),
            np.sqrt(SPELT) * spelling / np.linalg.norm(spelling),
        ]
        assert embedder.embed([text])[0] == pytest.approx(np.concatenate(parts), abs=1e-5), text


def test_what_says_nothing_is_measured_for_every_model() -> None:
    """Requests of one subject are above it, by the default model and by hashed words."""
    for backend in ("static", "hash"):
        embedder = make_embedder(config.Embedder(backend=backend))
        level = unrelated(embedder)
        assert 0.1 < level < 0.6
        pairs = [
            ("How can I change my password?", "How do I reset my password?"),
            ("Give me a recipe for waffles.", "Give me a recipe for pancakes."),
        ]
        for a, b in pairs:
            first, second = embedder.embed([a, b])
            assert float(first @ second) > level


def test_a_folder_without_the_model_is_not_read_through(tmp_path: Path) -> None:
    with (tmp_path / "something.else").open("wb") as file:
        file.truncate(1 << 43)  # reading it would take hours
    with pytest.raises(ConfigError, match="has no"):
        OnnxEmbedder(tmp_path)
