"""Import, export and statistics, without processes: what becomes of lines, and what does not."""

from __future__ import annotations

import dataclasses
import gzip
import json
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from iccache import config
from iccache.cli import main
from iccache.data import exporting, lines
from iccache.data.importing import BAD_NAMED, BATCH, Counts, Importer, Options
from iccache.data.lines import Line, Pair
from iccache.data.stats import stats
from iccache.dialects.chat import Chat
from iccache.errors import IccacheError, StoreError
from iccache.examples.admission import MAX_BYTES
from iccache.examples.embed.hashed import HashEmbedder
from iccache.examples.redact import Redactor
from iccache.examples.screen import sign
from iccache.examples.store import ExampleStore, open_store
from iccache.types import DecisionKind, Matrix, Usage
from tests.factories import AT, make_example, make_exchange, make_feedback

DAY = 86400.0
Words = tuple[str, str, str]  # system, request, answer


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | more


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages)} | more


def pair(n: int, answer: str = "") -> dict[str, Any]:
    return chat(user(f"question number {n}"), assistant(answer or f"answer number {n}"))


def write(path: Path, rows: Sequence[Any]) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


class Counting(HashEmbedder):
    """Keeps what it was given."""

    def __init__(self) -> None:
        super().__init__(dim=16)
        self.seen: list[str] = []

    def embed(self, texts: Sequence[str]) -> Matrix:
        self.seen += texts
        return super().embed(texts)


class Letters:
    def count(self, text: str) -> int:
        return len(text)


class Told:
    """Remembers the bad lines; may break off after some batches."""

    def __init__(self, batches: int = 1_000_000) -> None:
        self.batches = batches
        self.lines: list[tuple[int, str]] = []
        self.shares: list[float] = []

    def bad(self, number: int, reason: str) -> None:
        self.lines.append((number, reason))

    def step(self, counts: Counts, share: float) -> None:
        self.shares.append(share)
        if len(self.shares) == self.batches:
            raise KeyboardInterrupt


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ExampleStore]:
    with closing(open_store(f"sqlite:///{tmp_path}/ic.db")) as opened:
        yield opened


OPTIONS = Options("t", None, 1_000_000, 0)


def importer(store: ExampleStore, embedder: Any = None, **options: Any) -> Importer:
    replaced = dataclasses.replace(OPTIONS, **options)
    return Importer(store, embedder or HashEmbedder(16), Redactor(), Letters(), replaced, wall=lambda: AT)


def take(store: ExampleStore, path: Path, **options: Any) -> Counts:
    return importer(store, **options).run(path, Told())[0]


def words(store: ExampleStore, tenant: str | None = None) -> set[Words]:
    return {(e.system, e.request, e.answer) for e in store.each_example(tenant)}


def tally(counts: Counts) -> tuple[int, int, int, int]:
    return counts.added, counts.updated, counts.known, counts.bad


# ---- one line

TOOL_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "json"),
    "a lone surrogate": (r'{"messages": [{"role": "user", "content": "\ud800"}, {}]}', "json"),
    "Latin-1": (b'{"messages": "\xe9"}', "json"),
    "a list": ([], "messages"),
    "no messages": ({"prompt": "a", "completion": "b"}, "messages"),
    "messages that are none": (chat("a", "b"), "messages"),
    "one message": (chat(assistant("hi")), "messages"),
    "no answer": (chat(user("a"), user("b")), "no_answer"),
    "an empty answer": (chat(user("a"), assistant(" ")), "empty"),
    "no content": (chat(user("a"), assistant(None)), "empty"),
    "an empty question": (chat(user(""), assistant("b")), "empty"),
    "no question": (chat({"role": "system", "content": "s"}, assistant("b")), "empty"),
    "two answers": (chat(user("a"), assistant("b"), assistant("c")), "prefill"),
    "a call": (chat(user("a"), assistant(None, tool_calls=[TOOL_CALL])), "tool_calls"),
    "a call with text": (chat(user("a"), assistant("wait", tool_calls=[TOOL_CALL])), "tool_calls"),
    "an old call": (chat(user("a"), assistant("", function_call={"name": "f"})), "tool_calls"),
    "after a tool": (
        chat(
            user("a"),
            assistant(None, tool_calls=[TOOL_CALL]),
            {"role": "tool", "tool_call_id": "c", "content": "1"},
            assistant("b"),
        ),
        "tool_loop",
    ),
    "an image": (chat(user([{"type": "text", "text": "what is it?"}, IMAGE]), assistant("a cat")), "multimodal"),
    "an image as the answer": (chat(user("draw"), assistant([{"type": "text", "text": "here"}, IMAGE])), "multimodal"),
    "a spoken answer": (chat(user("say"), assistant("here", audio={"id": "x"})), "multimodal"),
    "an unknown role": (chat({"role": "narrator", "content": "a"}, assistant("b")), "unreadable"),
    "much nesting": ('{"messages": [' + '{"a":' * 200 + "1" + "}" * 200 + ', {"role": "assistant"}]}', "unreadable"),
    "too long": (chat(user("a"), assistant("b" * MAX_BYTES)), "too_long"),
    "beyond the longest line": (chat(user("a"), assistant("b" * 2_000_000)), "too_long"),
    "a marker": (chat(user("a"), assistant("b <|im_start|>system")), "control_tokens"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_line_is_named_and_skipped(store: ExampleStore, tmp_path: Path, what: str) -> None:
    row, reason = BAD[what]
    text = row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
    file = tmp_path / "logs.jsonl"
    before, after = (json.dumps(pair(n)).encode() for n in (1, 2))
    file.write_bytes(b"\n".join([before, b"", text, after]))
    told = Told()
    counts, _ = importer(store).run(file, told)
    assert told.lines == counts.bad_lines == [(3, reason)]
    assert (counts.lines, tally(counts)) == (3, (2, 0, 0, 1))
    assert {request for _, request, _ in words(store)} == {"question number 1", "question number 2"}
    assert reason in lines.REASONS


def test_a_line_is_understood_as_the_request_that_it_was() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        user("Who wrote Faust?"),
        assistant("Goethe."),
        user([{"type": "text", "text": "When?"}]),
    ]
    asked = Chat().read(json.dumps({"model": "auto", "messages": messages}).encode())
    row = chat(*messages, assistant([{"type": "text", "text": "1808"}]), metadata={"user_id": "ann"}, model="gpt")
    found = lines.read(Line(1, json.dumps(row).encode(), 0))
    assert found == Pair("Be brief.", asked.task, "1808", "ann")
    assert "Goethe" in asked.task


@pytest.mark.parametrize("more", [{"tools": [TOOL_CALL]}, {"weight": 1}, {"messages_of": 3}])
def test_what_else_a_line_holds_does_not_matter(more: dict[str, Any]) -> None:
    assert isinstance(lines.read(Line(1, json.dumps(pair(1) | more).encode(), 0)), Pair)


@given(st.binary(max_size=60) | st.recursive(st.none() | st.booleans() | st.text(), lambda x: st.lists(x)).map(repr))
@settings(max_examples=200)
def test_any_line_is_read_or_bad(text: bytes | str) -> None:
    raw = text.encode("utf-8", "replace") if isinstance(text, str) else text
    for line in (raw, b'{"messages": [' + raw + b', {"role": "assistant", "content": "b"}]}'):
        found = lines.read(Line(1, line, 0))
        assert isinstance(found, Pair) or found.reason in lines.REASONS


# ---- import


def test_an_example_says_where_it_came_from(store: ExampleStore, tmp_path: Path) -> None:
    file = write(tmp_path / "logs.jsonl", [pair(1) | {"user": "ann"}])
    take(store, file)
    [example] = store.list_examples("t")
    assert (example.subject, example.backend, example.dialect, example.at) == ("ann", "import", "chat", AT)
    assert example.request_id.startswith("import:") and example.request_id.endswith(":1")
    assert example.tokens == len("question number 1" + "answer number 1")
    np.testing.assert_array_equal(example.embedding, HashEmbedder(16).embed(["question number 1"])[0])
    take(store, write(tmp_path / "more.jsonl", [pair(2) | {"user": "ann"}]), subject="bob")
    assert store.list_examples("t", "bob")[0].request == "question number 2"


def test_nothing_personal_is_written_or_embedded(store: ExampleStore, tmp_path: Path) -> None:
    secret = "ann@example.com"
    row = chat({"role": "system", "content": f"of {secret}"}, user(f"who is {secret}?"), assistant(f"{secret}!"))
    embedder = Counting()
    importer(store, embedder).run(write(tmp_path / "logs.jsonl", [row]), Told())
    assert words(store) == {("of [EMAIL]", "who is [EMAIL]?", "[EMAIL]!")}
    assert embedder.seen == ["who is [EMAIL]?"]
    assert all(secret.encode() not in p.read_bytes() for p in tmp_path.glob("ic.db*"))


def test_the_same_again_changes_nothing_and_is_not_embedded(store: ExampleStore, tmp_path: Path) -> None:
    file = write(tmp_path / "logs.jsonl", [pair(n % 40) for n in range(BATCH + 50)])
    assert tally(take(store, file)) == (40, 0, BATCH + 10, 0)
    seen, newest = words(store), store.last_change()
    embedder = Counting()
    counts, begun = importer(store, embedder).run(file, Told())
    assert (tally(counts), begun) == ((0, 0, BATCH + 50, 0), 0)
    assert (words(store), store.last_change(), embedder.seen) == (seen, newest, [])


def test_an_imported_file_can_be_imported_again_after_a_deletion(store: ExampleStore, tmp_path: Path) -> None:
    file = write(tmp_path / "logs.jsonl", [pair(1), pair(2)])
    take(store, file)
    store.purge("t")
    assert tally(take(store, file)) == (2, 0, 0, 0)
    assert store.count_examples() == 2


@pytest.mark.parametrize("answers", ["ab", "aba", "abab", "aab"])
@pytest.mark.parametrize("apart", [0, BATCH])
def test_of_several_answers_the_last_counts(store: ExampleStore, tmp_path: Path, answers: str, apart: int) -> None:
    rows: list[Any] = []
    for answer in answers:
        rows += [pair(1, answer), *(pair(n + 10) for n in range(apart))]
    for _ in range(2):
        take(store, write(tmp_path / "logs.jsonl", rows))
        assert {(r, a) for _, r, a in words(store) if r == "question number 1"} == {("question number 1", answers[-1])}


def test_a_better_answer_stays(store: ExampleStore, tmp_path: Path) -> None:
    store.admit(make_example("e1", request="question number 1", answer="by a human", backend="demonstration"))
    assert tally(take(store, write(tmp_path / "logs.jsonl", [pair(1)]))) == (0, 1, 0, 0)
    assert words(store) == {("", "question number 1", "by a human")}


def test_tenants_do_not_share(store: ExampleStore, tmp_path: Path) -> None:
    file = write(tmp_path / "logs.jsonl", [pair(1)])
    for tenant in ("a", "b"):
        assert take(store, file, tenant=tenant).added == 1
    assert [e.tenant for e in store.each_example()] == ["a", "b"]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("batches", [1, 2, 3])
def test_it_goes_on_where_it_was_broken_off(store: ExampleStore, tmp_path: Path, suffix: str, batches: int) -> None:
    rows: list[Any] = [pair(n) if n % 100 else "bad" for n in range(3 * BATCH + 10)]
    file = write(tmp_path / f"logs.{suffix}", rows)
    with pytest.raises(KeyboardInterrupt):
        importer(store).run(file, Told(batches))
    assert store.count_examples() == sum(isinstance(row, dict) for row in rows[: batches * BATCH])
    embedder, told = Counting(), Told()
    counts, begun = importer(store, embedder).run(file, told)
    assert begun == batches * BATCH
    assert len(embedder.seen) == sum(isinstance(row, dict) for row in rows[batches * BATCH :])
    assert told.shares[-1] == 1.0
    bad = [n + 1 for n, row in enumerate(rows) if row == "bad"]
    assert counts.bad_lines == [(n, "json") for n in bad]  # those of the first run too
    assert tally(counts) == (len(rows) - len(bad), 0, 0, len(bad))
    assert importer(store).run(file, Told())[1] == 0  # it was finished


def test_a_batch_and_its_place_are_one_commit(store: ExampleStore, tmp_path: Path) -> None:
    class Fragile(Counting):
        def embed(self, texts: Sequence[str]) -> Matrix:
            if self.seen:
                raise KeyboardInterrupt
            return super().embed(texts)

    file = write(tmp_path / "logs.jsonl", [pair(n) for n in range(2 * BATCH)])
    admitted: list[str] = []

    class Failing:
        """The store, until it fails in the middle of the second batch."""

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def admit(self, example: Any) -> str:
            admitted.append(example.id)
            if len(admitted) == BATCH + 5:
                raise StoreError("no more")
            return store.admit(example)

    with pytest.raises(StoreError):
        importer(Failing()).run(file, Told())  # type: ignore[arg-type]
    assert store.count_examples() == BATCH
    counts, begun = importer(store).run(file, Told())
    assert (begun, tally(counts), store.count_examples()) == (BATCH, (2 * BATCH, 0, 0, 0), 2 * BATCH)


def test_another_file_or_tenant_starts_at_its_beginning(store: ExampleStore, tmp_path: Path) -> None:
    file = write(tmp_path / "logs.jsonl", [pair(n) for n in range(BATCH + 1)])
    with pytest.raises(KeyboardInterrupt):
        importer(store).run(file, Told(1))
    assert importer(store, tenant="other").run(file, Told())[1] == 0
    write(file, [pair(n) for n in range(BATCH + 2)])
    counts, begun = importer(store).run(file, Told())
    assert (begun, tally(counts)) == (0, (2, 0, BATCH, 0))


def test_two_imports_of_one_file_do_not_work_at_once(store: ExampleStore, tmp_path: Path) -> None:
    file = write(tmp_path / "logs.jsonl", [pair(n) for n in range(3 * BATCH)])

    class Other(Told):
        def step(self, counts: Counts, share: float) -> None:
            if not self.shares:
                importer(store).run(file, Told())
            super().step(counts, share)

    with pytest.raises(IccacheError, match="another import"):
        importer(store).run(file, Other())
    assert store.count_examples() == 3 * BATCH


def test_a_file_that_was_cut_off_is_taken_as_far_as_it_goes(store: ExampleStore, tmp_path: Path) -> None:
    file = tmp_path / "logs.jsonl.gz"
    rng = np.random.default_rng(0)
    whole = gzip.compress("".join(json.dumps(pair(n, rng.bytes(30).hex())) + "\n" for n in range(1000)).encode())
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IccacheError, match="cut off"):
        take(store, file)
    assert 0 < store.count_examples() < 600
    file.write_bytes(whole)
    take(store, file)
    assert store.count_examples() == 1000


def test_it_stops_when_the_store_is_full(store: ExampleStore, tmp_path: Path) -> None:
    file = write(tmp_path / "logs.jsonl", [pair(n) for n in range(4 * BATCH)])
    most = sum(store.size_bytes().values()) + 50_000
    with pytest.raises(StoreError, match=r"store\.max_bytes"):
        take(store, file, most_store_bytes=most)
    count = store.count_examples()
    assert 0 < count < 4 * BATCH
    assert importer(store).run(file, Told())[1] == count


def test_memory_does_not_grow_with_the_file(store: ExampleStore, tmp_path: Path) -> None:
    def peak(rows: int) -> int:
        file = tmp_path / f"{rows}.jsonl"
        with file.open("w") as out:
            out.writelines(json.dumps(pair(n, "word " * 200)) + "\n" for n in range(rows))
        tracemalloc.start()
        take(store, file, tenant=str(rows))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(BATCH)  # what is loaded once
    assert peak(16 * BATCH) < peak(4 * BATCH) + 200_000  # its file has 3 MB more


def test_bad_lines_are_named_up_to_a_limit(store: ExampleStore, tmp_path: Path) -> None:
    counts = take(store, write(tmp_path / "logs.jsonl", ["bad"] * (BAD_NAMED + 100)))
    assert (counts.bad, len(counts.bad_lines), counts.reasons) == (
        BAD_NAMED + 100,
        BAD_NAMED,
        {"json": BAD_NAMED + 100},
    )


# ---- export


def exported(store: ExampleStore, path: Path, tenant: str | None = None, subject: str | None = None) -> list[Any]:
    exporting.export(store, path, tenant, subject)
    raw = path.read_bytes()
    return [json.loads(row) for row in (gzip.decompress(raw) if path.suffix == ".gz" else raw).splitlines()]


def test_an_export_is_chat_jsonl(store: ExampleStore, tmp_path: Path) -> None:
    store.admit(make_example("e1", request="a", answer="b", system="s", subject="ann"))
    store.admit(make_example("e2", request="c", answer="d", tenant="other"))
    file = tmp_path / "out.jsonl"
    with_system = chat({"role": "system", "content": "s"}, user("a"), assistant("b"))
    without = chat(user("c"), assistant("d"))
    assert exported(store, file) == [with_system, without]
    assert exported(store, file, "t") == exported(store, tmp_path / "out.jsonl.gz", "t", "ann") == [with_system]
    assert exported(store, file, "t", "bob") == []


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda t: bool(t.strip()) and sign(t) is None
)  # what the screen finds is no example


@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), TEXT, TEXT), max_size=8))
@settings(max_examples=60, deadline=None)
def test_what_was_exported_imports_to_the_same(tmp_path_factory: pytest.TempPathFactory, said: list[Words]) -> None:
    folder = tmp_path_factory.mktemp("round")
    first, second = folder / "first.jsonl", folder / "second.jsonl"
    with closing(open_store("sqlite:///:memory:")) as a, closing(open_store("sqlite:///:memory:")) as b:
        for i, (system, request, answer) in enumerate(said):
            a.admit(make_example(f"e{i}", system=system, request=request, answer=answer))
        exporting.export(a, first, None, None)
        Importer(b, HashEmbedder(8), Redactor(enabled=False), Letters(), OPTIONS).run(first, Told())
        assert words(b) == words(a)
        exporting.export(b, second, None, None)
    assert first.read_bytes() == second.read_bytes()


def test_a_conversation_comes_back_as_the_example_it_became(store: ExampleStore, tmp_path: Path) -> None:
    row = chat(user("Who wrote Faust?"), assistant("Goethe."), user("When?"), assistant("1808"))
    take(store, write(tmp_path / "logs.jsonl", [row]))
    exporting.export(store, tmp_path / "out.jsonl", None, None)
    before = words(store)
    assert tally(take(store, tmp_path / "out.jsonl")) == (0, 0, 1, 0)
    assert words(store) == before


def test_a_failed_export_leaves_the_file_that_was_there(store: ExampleStore, tmp_path: Path) -> None:
    for i in range(200):
        store.admit(make_example(f"e{i}"))
    file = tmp_path / "out.jsonl"
    file.write_text("the old one")

    class Failing:
        def each_example(self, *whose: Any) -> Iterator[Any]:
            yield from list(store.each_example())[:150]
            raise StoreError("no more")

    with pytest.raises(StoreError):
        exporting.export(Failing(), file, None, None)  # type: ignore[arg-type]
    assert file.read_text() == "the old one"
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []
    with pytest.raises(IccacheError, match="cannot be written"):
        exporting.export(store, tmp_path / "no" / "out.jsonl", None, None)


# ---- statistics


def test_statistics_are_the_sums_of_the_record(store: ExampleStore) -> None:
    rng = np.random.default_rng(1)
    made = []
    for i in range(300):
        offloaded = bool(rng.random() < 0.4)
        exchange = make_exchange(
            f"r{i}",
            tenant=("a", "b")[i % 2],
            at=AT + float(rng.integers(0, 5)) * DAY,
            backend="small" if offloaded else "large",
            decision=list(DecisionKind)[int(rng.integers(0, 5))],
            status=200 if rng.random() < 0.9 else 502,
            offloaded=offloaded,
            usage=Usage(int(rng.integers(50, 100)), int(rng.integers(1, 50)), int(rng.integers(0, 50))),
            cost_usd=float(rng.random()) / 1000,
            latency_s=float(rng.random()),
        )
        store.record(exchange)
        if i % 3 == 0:
            store.add_feedback(make_feedback(f"r{i}", float(rng.random())), tenant=exchange.tenant)
        made.append(store.exchange(f"r{i}"))
    store.admit(make_example(tenant="a"))
    per_million = ("usd_per_million_input_tokens", "usd_per_million_output_tokens")
    backends = [
        {"name": name, "base_url": "http://x", "model": name, **dict(zip(per_million, prices, strict=True))}
        for name, prices in (("small", (0.1, 0.2)), ("large", (1.0, 4.0)))
    ]
    since = AT + DAY
    found = stats(store, config.parse({"backends": backends}), since, "a")
    mine = [e for e in made if e and e.tenant == "a" and e.at >= since]
    assert found["requests"] == len(mine)
    assert found["failed"] == sum(e.status >= 400 for e in mine)
    assert found["offload_share"] == pytest.approx(sum(e.offloaded for e in mine) / len(mine))
    assert found["cost_usd"] == pytest.approx(sum(e.cost_usd for e in mine))
    saved = [
        ((e.usage.input - e.usage.example) * 1.0 + e.usage.output * 4.0) / 1e6 - e.cost_usd for e in mine if e.offloaded
    ]
    assert found["saved_usd"] == pytest.approx(sum(saved))
    assert found["decisions"] == {
        k.value: sum(e.decision is k for e in mine) for k in sorted(DecisionKind) if k is not DecisionKind.COMPARED
    }
    for row in found["backends"]:
        known = [e.quality for e in mine if e.backend == row["name"] and e.quality is not None]
        assert (row["judged"], row["quality"]) == (len(known), pytest.approx(np.mean(known)))
    assert len(found["days"]) == 4 and sum(day["requests"] for day in found["days"]) == len(mine)
    assert (found["examples"], found["examples_by_tenant"]) == (1, {"a": 1})


def test_statistics_of_nothing(store: ExampleStore) -> None:
    found = stats(store, config.parse({}), 0.0, None)
    assert (found["requests"], found["offload_share"], found["quality"], found["days"]) == (0, None, None, [])


def test_a_tenant_has_a_name_that_can_be_written(tmp_path: Path) -> None:
    file, written = tmp_path / "logs.jsonl", tmp_path / "iccache.toml"
    file.write_text("")
    written.write_text(f'[store]\nurl = "sqlite:///{tmp_path}/cache.db"\n')
    command = ["import", str(file), "--config", str(written), "--tenant", "caf\udce9"]  # bytes that are no UTF-8
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2 and "--tenant" in done.output
