"""A store and its key: what is on disk, what is said where they do not fit, and changing it under kills."""

from __future__ import annotations

import builtins
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iccache import config
from iccache.errors import ConfigError, StoreError
from iccache.examples.index import snapshot
from iccache.examples.restore import restore_file
from iccache.examples.snapshots import InMemory, Snapshots
from iccache.examples.sqlite import driver, encrypt
from iccache.examples.sqlite.encrypt import Done, bring_to_key, in_clear_beside
from iccache.examples.sqlite.key import Key, key_of
from iccache.examples.sqlite.store import SqliteStore
from tests.factories import make_example, make_exchange, make_vector

ONE = "8f1d3b5a7c9e0f2d4b6a8c0e1f3d5b7a9c1e2f4d6b8a0c3e5f7d9b1a2c4e6f80"
TWO = "00112233445566778899aabbccddeeff0123456789abcdeffedcba9876543210"
WORD = "xylophonist"
EXAMPLES = 60


def filled(path: Path, key: Key | None = None) -> None:
    with closing(SqliteStore(path, key=key)) as store, store.transaction():
        for i in range(EXAMPLES):
            store.record(make_exchange(f"r{i}", task=f"{WORD} {i}"))
            store.admit(make_example(f"e{i}", request=f"{WORD} {i}", answer=f"{WORD} plays {i}"))


def whole(path: Path, key: Key | None) -> bool:
    with closing(SqliteStore(path, key=key)) as store:
        asked = [store.exchange(f"r{i}") for i in range(EXAMPLES)]
        return (
            [e.request for e in store.each_example()] == [f"{WORD} {i}" for i in range(EXAMPLES)]
            and all(each is not None for each in asked)
            and store.last_change() == EXAMPLES
        )


def on_disk(folder: Path) -> bytes:
    return b"".join(f.read_bytes() for f in folder.rglob("*") if f.is_file())


# keys


@pytest.mark.parametrize(
    "text", ["", "secret", ONE[:-1], ONE + "0", "g" + ONE[1:], f" {ONE}", "0x" + ONE[2:], "ab" * 32]
)
def test_what_is_no_key_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ConfigError, match="openssl rand -hex 32") as caught:
        Key(text, "K")
    assert len(text) < 6 or text not in str(caught.value)


def test_a_key_tells_nothing_of_itself() -> None:
    assert ONE[:8] not in f"{Key(ONE)!r} {Key(ONE)} {[Key(ONE)]}"
    assert Key(ONE) == Key(ONE.upper()) != Key(TWO)


def test_a_key_comes_from_the_environment_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(ONE + "\n")
    named = config.Store(key_env="K")
    assert key_of(config.Store(), {"K": ONE}) is None
    assert key_of(named, {"K": ONE}) == key_of(named, {"K_FILE": str(file)}) == Key(ONE)
    with pytest.raises(ConfigError, match="K is not set, nor is K_FILE"):
        key_of(named, {})
    with pytest.raises(ConfigError, match="cannot be read"):
        key_of(named, {"K_FILE": str(tmp_path / "none")})
    with pytest.raises(ConfigError, match="the key in K: is not 64 hex"):
        key_of(named, {"K": "ab"})


def test_without_the_extra_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("sqlcipher3"):
            raise ImportError(f"No module named {name!r}")
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"pip install 'iccache\[encryption\]'"):
        SqliteStore(tmp_path / "s.db", key=Key(ONE))


# what is on disk


@pytest.mark.parametrize("key", [None, Key(ONE)], ids=["clear", "encrypted"])
def test_the_file_its_log_and_backups_tell_nothing(tmp_path: Path, key: Key | None) -> None:
    vector = make_vector("v")
    with closing(SqliteStore(tmp_path / "s.db", key=key)) as store:
        store.record(make_exchange("r1", task=WORD))
        store.admit(make_example("e1", request=WORD, embedding=vector))
        store.backup(tmp_path / "copy.db")
        store.checkpoint()
        store.record(make_exchange("r2", task=WORD))
        assert (tmp_path / "s.db-wal").stat().st_size > 0
        found = {f.name: WORD.encode() in f.read_bytes() for f in tmp_path.iterdir() if f.suffix != ".db-shm"}
        blobs = np.asarray(vector, "<f4").tobytes() in on_disk(tmp_path)
    assert blobs == (key is None)
    assert {n: v for n, v in found.items() if not n.endswith("shm")} == dict.fromkeys(
        ("s.db", "s.db-wal", "copy.db"), key is None
    )


def test_vectors_of_an_encrypted_store_are_in_memory_alone(tmp_path: Path) -> None:
    path, key = tmp_path / "s.db", Key(ONE)
    vectors = np.random.default_rng(1).normal(size=(40, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    with closing(SqliteStore(path, key=key)) as store:
        for i, vector in enumerate(vectors):
            store.admit(make_example(f"e{i}", request=f"q{i}", embedding=vector, embedder="m"))
        snapshot.beside(path).write_bytes(b"left by an older version")
        with closing(InMemory(store.reader, "m", 16, path, key)) as made:
            for _ in range(2):  # the second takes the place of the first
                catalogue = made.make(store)
                assert catalogue.search("t", vectors[7], 1) == ["e7"]
            assert sorted(f.name for f in tmp_path.iterdir()) == ["s.db", "s.db-shm", "s.db-wal"]
            store.delete_examples(["e7"])
            assert made.open(store).search("t", vectors[7], 1) != ["e7"]
        with closing(Snapshots(store.reader, "m", 16, path)) as plain:
            plain.make(store)
            assert vectors[3].astype("<f2").tobytes() in on_disk(tmp_path)  # which is what would be found


def test_many_vectors_are_clustered_by_a_process_that_gets_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iccache.examples.snapshots.HERE_UP_TO", 10)
    path, key = tmp_path / "s.db", Key(ONE)
    with closing(SqliteStore(path, key=key)) as store:
        for i in range(20):
            store.admit(make_example(f"e{i}", request=f"q{i}", embedding=make_vector(f"{i}"), embedder="m"))
        with closing(InMemory(store.reader, "m", len(make_vector("v")), path, key)) as made:
            assert len(made.make(store)) == 20
    assert sorted(f.name for f in tmp_path.iterdir()) == ["s.db"]


# where they do not fit


def test_a_key_that_does_not_fit_is_said_in_one_line(tmp_path: Path) -> None:
    clear, locked, noise = tmp_path / "clear.db", tmp_path / "locked.db", tmp_path / "noise.db"
    filled(clear)
    filled(locked, Key(ONE))
    noise.write_bytes(b"a letter to my aunt" * 100)
    wrong: Sequence[tuple[Path, Key | None, str]] = [
        (clear, Key(ONE), "is not encrypted"),
        (locked, Key(TWO), "cannot be read with the key"),
        (locked, None, "is encrypted"),
        (noise, None, "is not an SQLite file"),
        (noise, Key(ONE), "cannot be read with the key"),
    ]
    before = on_disk(tmp_path)
    for path, key, said in wrong:
        with pytest.raises(StoreError, match=said) as caught:
            SqliteStore(path, key=key)
        assert "\n" not in str(caught.value) and ONE not in str(caught.value)
    assert on_disk(tmp_path) == before
    assert whole(clear, None) and whole(locked, Key(ONE))


def test_a_store_is_not_put_aside_for_a_wrong_key(tmp_path: Path) -> None:
    path, copy = tmp_path / "s.db", tmp_path / "copy.db"
    filled(path, Key(ONE))
    filled(copy, Key(TWO))
    for key, said in ((Key(ONE), "copy.db"), (Key(TWO), "s.db"), (None, "copy.db")):
        with pytest.raises(StoreError, match=said):
            restore_file(path, copy, keep=False, key=key)
    assert whole(path, Key(ONE)) and whole(copy, Key(TWO))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["copy.db", "s.db"]


@pytest.mark.parametrize("page", [0, 1, 5, 9, 12])
def test_a_damaged_encrypted_store_is_replaced_and_a_damaged_backup_is_not(tmp_path: Path, page: int) -> None:
    """A single bit. Of a damaged first page nobody can tell whether it is the key that is wrong."""
    path, copy, key = tmp_path / "s.db", tmp_path / "copy.db", Key(ONE)
    filled(path, key)
    filled(copy, key)
    assert path.stat().st_size > 13 * driver.PAGE_BYTES
    damaged = bytearray(path.read_bytes())
    damaged[page * driver.PAGE_BYTES + 100] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(StoreError, match=r"s\.db: .*damaged"):
        restore_file(copy, path, keep=False, key=key)
    assert whole(copy, key)
    if page == 0:
        with pytest.raises(StoreError, match=r"s\.db: cannot be read with the key"):
            restore_file(path, copy, keep=False, key=key)
        assert path.read_bytes() == damaged
        path.unlink()
    restore_file(path, copy, keep=False, key=key)
    with closing(SqliteStore(path, key=key)) as store:
        assert store.count_examples() == EXAMPLES


# changing it


@pytest.mark.parametrize(
    ("before", "after", "done"),
    [(None, Key(ONE), Done.ENCRYPTED), (Key(ONE), Key(TWO), Done.CHANGED), (Key(ONE), None, Done.DECRYPTED)],
    ids=["encrypt", "change", "in clear"],
)
def test_a_store_is_brought_to_another_key(tmp_path: Path, before: Key | None, after: Key | None, done: Done) -> None:
    path = tmp_path / "s.db"
    filled(path, before)
    path.chmod(0o640)
    snapshot.beside(path).write_bytes(b"vectors")
    old = os.open(path, os.O_RDONLY)
    assert bring_to_key(path, after, before) is done
    assert bring_to_key(path, after, before) is Done.NOTHING
    assert whole(path, after)
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(f.name for f in tmp_path.iterdir()) == ["s.db"]
    assert not any(os.pread(old, 1 << 20, 0)) and os.fstat(old).st_size > 0  # the old bytes are no more
    os.close(old)
    assert (WORD.encode() in on_disk(tmp_path)) == (after is None)


def test_files_in_clear_beside_it_are_named(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    for each in (path, tmp_path / "s.db.before-restore", tmp_path / "other.db"):
        filled(each)
    bring_to_key(path, Key(ONE))
    assert [p.name for p in in_clear_beside(path)] == ["s.db.before-restore"]
    bring_to_key(tmp_path / "s.db.before-restore", Key(ONE))
    assert in_clear_beside(path) == []


def test_what_cannot_be_brought_to_a_key_stays_as_it_is(tmp_path: Path) -> None:
    path, other = tmp_path / "s.db", tmp_path / "other.db"
    filled(path, Key(ONE))
    with closing(driver.connect(other)) as db:
        db.execute("CREATE TABLE letters (a)")
    (tmp_path / "noise").write_bytes(b"dear aunt")
    wrong: Sequence[tuple[Path, Key, Key | None, str]] = [
        (path, Key(TWO), None, "--old-key-env"),
        (path, Key(TWO), Key(TWO), "nor with"),
        (other, Key(ONE), None, "no store of iccache"),
        (tmp_path / "noise", Key(ONE), None, "no store of iccache"),
        (tmp_path / "none", Key(ONE), None, "no such file"),
    ]
    before = on_disk(tmp_path)
    for target, key, old, said in wrong:
        with pytest.raises(StoreError, match=said):
            bring_to_key(target, key, old)
    assert on_disk(tmp_path) == before and whole(path, Key(ONE))


def test_a_store_in_use_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iccache.examples.sqlite.encrypt.WAIT_S", 0.1)
    path = tmp_path / "s.db"
    filled(path)
    user = "import sys, time; from iccache.examples.store import open_store\n"
    user += "s = open_store(sys.argv[1]).reader(); s.count_examples(); print('open', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", user, f"sqlite:///{path}"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"open\n"
        with pytest.raises(StoreError, match="is in use"):
            bring_to_key(path, Key(ONE))
        process.kill()
    assert whole(path, None)
    assert bring_to_key(path, Key(ONE)) is Done.ENCRYPTED


# kills

POINTS = ("_copy", "_check", "_forget_vectors", "_put_in_place", "os.replace", "_overwrite", "beside.remove")


def killed_at(point: str, when: str, path: Path, new: Key, old: Key | None) -> int:
    """Bring a store to a key in a process that is killed before or after it calls `point`; what it ended with."""
    pid = os.fork()
    if not pid:
        *holders, name = point.split(".")
        holder = reduce(getattr, holders, encrypt)
        real = getattr(holder, name)

        def last(*arguments: Any) -> None:
            if when == "after":
                real(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(holder, name, last)
        try:
            encrypt.bring_to_key(path, new, old)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("old", [None, Key(ONE)], ids=["encrypt", "change"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("point", POINTS)
def test_a_kill_leaves_the_old_store_or_the_new_one(tmp_path: Path, old: Key | None, when: str, point: str) -> None:
    path = tmp_path / "s.db"
    filled(path, old)
    assert killed_at(point, when, path, Key(TWO), old) == -signal.SIGKILL
    assert one_of(path, old, Key(TWO))
    bring_to_key(path, Key(TWO), old)
    assert whole(path, Key(TWO))
    assert [f.name for f in tmp_path.iterdir()] == ["s.db"]
    assert WORD.encode() not in on_disk(tmp_path)


def test_kills_at_any_time(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    filled(path)
    now: Key | None = None
    for i in range(30):
        new = Key(TWO) if now != Key(TWO) else Key(ONE)
        pid = os.fork()
        if not pid:
            encrypt.bring_to_key(path, new, now)
            os._exit(0)
        time.sleep(0.004 * i)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert one_of(path, now, new)
        now = new if opens(path, new) else now


def opens(path: Path, key: Key | None) -> bool:
    try:
        return whole(path, key)
    except StoreError:
        return False


def one_of(path: Path, *keys: Key | None) -> bool:
    return sum(opens(path, key) for key in keys) == 1
