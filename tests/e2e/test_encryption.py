"""An encrypted store from the outside: what is on disk, what the commands do, what is said where a key is wrong."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iccache.examples.sqlite.key import Key
from iccache.examples.store import open_store
from tests.e2e.served import Served, served
from tests.e2e.world import READY_WITHIN_S

ONE = "8f1d3b5a7c9e0f2d4b6a8c0e1f3d5b7a9c1e2f4d6b8a0c3e5f7d9b1a2c4e6f80"
TWO = "00112233445566778899aabbccddeeff0123456789abcdeffedcba9876543210"
WORD = "xylophonist"
NAMED = {"key_env": "STORE_KEY"}
SURE = {"exploration": 0}  # examples are shown wherever that is believed to be better, and no way is drawn
MANY = 2_200  # more than are compared one by one
ANSWER = {"role": "assistant", "content": f"The {WORD} plays."}


def on_disk(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


async def replay(s: Served, *command: str) -> tuple[int, str, str]:
    made = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "replay", *command, "--config", str(s.file)),
        env=s.process.environ,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(READY_WITHIN_S):
        out, err = await made.communicate()
    assert made.returncode is not None
    return made.returncode, out.decode(), err.decode()


async def traffic(s: Served) -> str:
    """A bit of everything that is recorded, with WORD in all of it; returns the id of a request."""
    for i in range(3):
        await s.teach(f"Which {WORD} is number {i}?", f"The {WORD} of {i}", user=f"{WORD}-{i}")
    asked = await s.ask(f"Who is the best {WORD}?", "small", {"x-iccache-session": WORD})
    assert asked.header("examples") != "0"
    assert (await s.feedback(asked.id, demonstration=f"No {WORD} is")).status == 204
    bad = await s.ask(f"Which {WORD} is number 1?", "small")
    assert (await s.feedback(bad.id, score=0)).status == 204
    async with s.http.post(
        s.url + "/v1/chat/completions",
        json={"model": "auto", "stream": True, "messages": [{"role": "user", "content": f"streamed {WORD}"}]},
    ) as response:
        await response.read()
    await s.recorded(bad.id)
    return bad.id


@pytest.mark.parametrize("encrypted", [True, False], ids=["encrypted", "clear"])
async def test_nothing_on_disk_tells_what_was_said(tmp_path: Path, encrypted: bool) -> None:
    """Killed in the middle, so that logs and temporary files are as they are while it runs. In clear all is found."""
    data, temporary = tmp_path / "data", tmp_path / "tmp"
    data.mkdir()
    temporary.mkdir()
    sections: dict[str, Any] = {"selection": SURE, "cache": {"reuse": "exact"}}
    sections |= {"store": NAMED} if encrypted else {}
    async with served(data, {"STORE_KEY": ONE, "TMPDIR": str(temporary)}, **sections) as s:
        request_id = await traffic(s)
        assert (await s.run("backup", str(data / "copy.db")))[0] == 0
        assert (await s.run("explain", request_id))[0] == 0
        assert (await replay(s, "run", "--json", str(data / "report.json")))[0] == 0
        await s.teach(f"Which {WORD} is the last?", f"The {WORD} of all")
        await s.kill()
        code, shown, _ = await s.run("config")
        assert code == 0 and ONE not in shown and ("STORE_KEY" in shown) == encrypted
        vectors = embeddings(s.store, Key(ONE) if encrypted else None)
        kept = on_disk(tmp_path) | {"log": s.log}
    assert len(vectors) >= 5
    told = {name for name, text in kept.items() if WORD.encode() in text}
    seen = {name for name, text in kept.items() for v in vectors for b in forms(v) if b in text}
    assert not any(ONE.encode() in text for text in kept.values())
    if encrypted:
        assert (told, seen) == (set(), set())
        assert "data/ic.db.vectors" not in kept
    else:
        assert {"data/ic.db", "data/copy.db"} <= told and "data/ic.db" in seen


@pytest.mark.parametrize("encrypted", [True, False], ids=["encrypted", "clear"])
async def test_the_index_of_many_examples_is_on_no_disk(tmp_path: Path, encrypted: bool) -> None:
    lines = [{"messages": [{"role": "user", "content": f"{WORD} {i}"}, ANSWER]} for i in range(MANY)]
    logs = tmp_path / "logs.jsonl"
    logs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = tmp_path / "data"
    data.mkdir()
    sections: dict[str, Any] = {"selection": SURE} | ({"store": NAMED} if encrypted else {})
    async with served(data, {"STORE_KEY": ONE, "TMPDIR": str(data)}, start=False, **sections) as s:
        assert (await s.run("import", str(logs), "--tenant", "default"))[0] == 0
        await s.start()
        maps = Path(f"/proc/{s.process.process.pid}/maps")
        mapped = "memfd:iccache-vectors" if encrypted else "ic.db.vectors"
        await s.until(lambda: asyncio.to_thread(maps.read_text), lambda text: mapped in text)
        assert (await s.ask(f"{WORD} 7", "small")).header("examples") != "0"
        await s.kill()
        vectors = embeddings(s.store, Key(ONE) if encrypted else None)
        kept = on_disk(data)
    assert len(vectors) == MANY
    assert ("ic.db.vectors" in kept) == (not encrypted)
    seen = {name for name, text in kept.items() for v in vectors[:50] for b in forms(v) if b in text}
    assert bool(seen) == (not encrypted)


def embeddings(path: Path, key: Key | None) -> list[Any]:
    with closing(open_store(f"sqlite:///{path}", key=key)) as store:
        return [vector for *_, vector in store.embeddings()]


def forms(vector: Any) -> list[bytes]:
    """Bytes by which an embedding would be known: as the store has them, and as a snapshot has."""
    return [np.asarray(vector, kind)[np.flatnonzero(vector)[0] :].tobytes()[:64] for kind in ("<f4", "<f2")]


async def test_the_whole_life_of_an_encrypted_store(tmp_path: Path) -> None:
    """Two workers, and every command."""
    copy = tmp_path / "copy.db"
    async with served(tmp_path, {"STORE_KEY": ONE}, store=NAMED, selection=SURE, server={"workers": 2}) as s:
        request_id = await traffic(s)
        code, out, err = await s.run("explain", request_id)
        assert code == 0 and request_id in out, err
        code, out, err = await s.run("check", "--json")
        assert "encrypted" in out, err
        code, out, err = await s.run("export")  # in clear by design
        assert code == 0 and WORD in out, err
        (tmp_path / "logs.jsonl").write_text(out)
        assert (await s.run("backup", str(copy)))[0] == 0
        code, out, _ = await s.run("examples", "purge", "--tenant", "default", "--yes", "--json")
        assert code == 0 and await s.until(s.examples, lambda n: n == 0) == 0
        assert (await s.run("import", str(tmp_path / "logs.jsonl"), "--tenant", "default"))[0] == 0
        assert await s.until(s.examples, bool)
        code, _, err = await s.run("restore", str(copy), "--no-keep")
        assert code == 0, err
        assert await s.until(s.examples, lambda n: n >= 4)
        assert (await s.run("stats", "--json"))[0] == 0
        code, out, err = await replay(s, "run", "--json")
        assert code == 0 and json.loads(out)["examples"]["replayed"] >= 1, err
        code, _, err = await s.run("encrypt", "--old-key-env", "STORE_KEY", environ={"STORE_KEY": ONE})
        assert code == 0  # nothing to do: that it is open does not matter
        environ = {"STORE_KEY": TWO, "OLD_KEY": ONE}
        code, _, err = await s.run("encrypt", "--old-key-env", "OLD_KEY", environ=environ)
        assert code == 1 and "is in use" in err
        assert (await s.ask(f"Who is the best {WORD}?", "small")).header("examples") != "0"
        assert await s.stop() == 0
        for file in ([], [str(copy)]):
            code, out, err = await s.run("encrypt", *file, "--old-key-env", "OLD_KEY", "--json", environ=environ)
            assert code == 0 and json.loads(out)["done"] == "changed", err
        s.process.environ |= {"STORE_KEY": TWO}
        await s.start()
        assert (await s.ask(f"Who is the best {WORD}?", "small")).header("examples") != "0"
        assert (await s.run("restore", str(copy)))[0] == 0
        assert await s.stop() == 0


async def test_a_store_in_clear_is_encrypted_where_a_kill_left_it(tmp_path: Path) -> None:
    async with served(tmp_path, {"STORE_KEY": ONE}, selection=SURE) as s:
        await traffic(s)
        assert (await s.run("backup", str(tmp_path / "ic.db.monday")))[0] == 0
        count = await s.examples()
        await s.kill()
        s.file.write_text(s.file.read_text().replace("[store]\n", '[store]\nkey_env = "STORE_KEY"\n'))
        code, out, err = await s.run("encrypt")
        assert code == 0 and "ic.db: encrypted" in out
        assert "ic.db.monday is in clear" in err
        assert {n for n, text in on_disk(tmp_path).items() if WORD.encode() in text} == {"ic.db.monday"}
        await s.start()
        assert await s.examples() == count
        assert (await s.ask(f"Who is the best {WORD}?", "small")).header("examples") != "0"
        assert await s.stop() == 0
        code, out, err = await s.run("encrypt", "--in-clear")
        assert code == 0, err
        assert WORD.encode() in on_disk(tmp_path)["ic.db"]


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_what_is_wrong_with_a_key_is_said_in_one_line(tmp_path: Path, workers: str) -> None:
    with closing(open_store(f"sqlite:///{tmp_path}/ic.db", key=Key(ONE))):
        pass
    cases = [
        ({"STORE_KEY": TWO}, 1, "cannot be read with the key"),
        ({"STORE_KEY": ""}, 2, "STORE_KEY is not set"),
        ({"STORE_KEY": ONE[1:]}, 2, "is not 64 hexadecimal digits"),
        ({"STORE_KEY": "", "STORE_KEY_FILE": str(tmp_path / "none")}, 2, "cannot be read"),
    ]
    async with served(tmp_path, store=NAMED, start=False) as s:
        for environ, exit_code, said in cases:
            for command in (["serve", "--workers", workers], ["stats"]):
                code, _, err = await s.run(*command, environ=environ)
                line = [row for row in err.splitlines() if row.startswith("iccache: ")]
                assert (code, len(line)) == (exit_code, 1), err
                assert said in line[0] and "Traceback" not in err and ONE[1:] not in err
        s.file.write_text(s.file.read_text().replace('key_env = "STORE_KEY"\n', ""))
        code, _, err = await s.run("stats")
        assert code == 1 and "is encrypted" in err
        (tmp_path / "ic.db").unlink()
        with closing(open_store(f"sqlite:///{tmp_path}/ic.db")):
            pass
        code, _, err = await s.run("stats", environ={"ICCACHE_STORE__KEY_ENV": "STORE_KEY", "STORE_KEY": ONE})
        assert code == 1 and "is not encrypted" in err
        code, _, err = await s.run("encrypt")
        assert code == 2 and "store.key_env: is not set" in err
