"""What of a user reaches the disk, and who may read it there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from iccache.learn.record import CUT, MOST_CHARS
from tests.e2e.served import served
from tests.e2e.world import world

ANN = "ann.lee@corp.example"


def on_disk(folder: Path) -> bytes:
    return b"".join(f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file())


@pytest.mark.parametrize("field", ["user", "safety_identifier", "metadata", "session", "header"])
async def test_what_an_end_user_is_called_is_redacted_too(tmp_path: Path, field: str) -> None:
    body: dict[str, object] = {field: ANN}
    if field == "metadata":
        body = {"metadata": {"user_id": ANN}}
    elif field in ("session", "header"):
        body = {"iccache": {"session": ANN}} if field == "session" else {}
    headers = {"x-iccache-session": ANN} if field == "header" else None
    async with world(tmp_path) as w:
        await w.teach("What is the capital of France?", "Paris", headers, **body)
        sent = w.large.requests[-1].json
        assert field in ("session", "header") or ANN in str(sent)  # the backend gets what the client sent
        kept = on_disk(tmp_path)
        assert b"capital of France" in kept and ANN.encode() not in kept and b"[EMAIL]#" in kept


async def test_a_session_named_by_an_address_stays_where_it_was(tmp_path: Path) -> None:
    session = {"x-iccache-session": ANN}
    async with world(tmp_path) as w:
        answered = await w.ask("hello there", "small", session)
        await w.recorded(answered.id)
        for _ in range(4):
            assert (await w.ask("and again", headers=session)).header("backend") == "small"
        assert (await w.post("/v1/completions", {"prompt": "x"}, session)).header("backend") == "small"


async def test_an_end_user_is_found_and_erased_by_the_name_that_the_client_gave(tmp_path: Path) -> None:
    async with served(tmp_path) as s:
        await s.teach("What is the capital of France?", "Paris", user=ANN)
        await s.teach("What is the capital of Spain?", "Madrid", user="bob")
        listed = (await s.get("/admin/examples?subject=ann.lee%40corp.example")).json["examples"]
        assert [e["answer"] for e in listed] == ["Paris"]
        code, out, _ = await s.run("export", "--subject", ANN)
        assert (code, out.count("\n")) == (0, 1) and "Paris" in out
        code, out, _ = await s.run("examples", "purge", "--tenant", "default", "--subject", ANN, "--yes", "--json")
        assert code == 0 and '"examples": 1' in out and '"exchanges": 1' in out
        left = (await s.get("/admin/examples")).json["examples"]
        assert [e["answer"] for e in left] == ["Madrid"]


async def test_nobody_else_on_the_machine_may_read_what_was_said(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        async with served(tmp_path) as s:
            await s.teach("What is the capital of France?", "Paris")
            assert (await s.run("backup", str(tmp_path / "copy.db")))[0] == 0
            assert (await s.run("export", str(tmp_path / "set.jsonl")))[0] == 0
            assert (await s.run("restore", str(tmp_path / "copy.db")))[0] == 0
            made = {f.name: stat.S_IMODE(f.stat().st_mode) for f in tmp_path.iterdir() if f.suffix != ".toml"}
    finally:
        os.umask(before)
    assert {"ic.db", "ic.db-wal", "copy.db", "set.jsonl", "ic.db.before-restore"} <= made.keys()
    assert not {name: oct(mode) for name, mode in made.items() if mode & 0o007}


async def test_a_key_is_changed_while_it_serves(tmp_path: Path) -> None:
    """Keys in files, as secrets are mounted: SIGHUP reads them again."""
    key = tmp_path / "key"
    key.write_text("old-key-1\n")
    tenants = [{"name": "team", "key_env": "TEAM_KEY"}]
    async with served(tmp_path, {"TEAM_KEY_FILE": str(key)}, tenants=tenants) as s:
        old, new = {"Authorization": "Bearer old-key-1"}, {"Authorization": "Bearer new-key-2"}
        assert (await s.get("/v1/models", old)).status == 200
        key.write_text("new-key-2\n")
        s.process.process.send_signal(1)
        await s.until(lambda: s.get("/v1/models", new), lambda answered: answered.status == 200)
        assert (await s.get("/v1/models", old)).status == 401
        key.unlink()
        s.process.process.send_signal(1)
        assert (await s.get("/v1/models", new)).status == 200


async def test_of_a_very_long_text_the_beginning_is_kept_and_no_half_of_an_address(tmp_path: Path) -> None:
    """All of it would be searched for what is to be redacted, and meanwhile nobody else be served."""
    for shift in (1, 9, 20):  # where the address is cut in two
        text = "x" * (MOST_CHARS - shift - 1) + " " + ANN + " and" * 200_000
        folder = tmp_path / str(shift)
        folder.mkdir()
        async with world(folder) as w:
            answered = await w.ask(text, "large")
            assert answered.status == 200 and w.large.requests[-1].json["messages"][0]["content"] == text
            kept = await w.recorded(answered.id)
            for part in (kept.task, kept.answer):
                assert MOST_CHARS * 0.9 < len(part) <= MOST_CHARS and part.endswith("x" + CUT)
            assert await w.examples() == 0


async def test_a_demonstration_that_is_too_long_is_refused_before_it_is_gone_through(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        answered = await w.ask("hello", "large")
        redactor = w.proxy.learner.in_force.redactor
        lengths: list[int] = []
        redact = redactor.redact
        redactor.redact = lambda text: lengths.append(len(text)) or redact(text)  # type: ignore[method-assign,func-returns-value]
        refused = await w.feedback(answered.id, demonstration="a" * 1_000_000)
        assert refused.status == 400 and "too_long" in refused.json["error"]["message"]
        assert max(lengths, default=0) < 1000
