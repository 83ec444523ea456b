"""What the contract of a store does not say: other connections, lost ones, other versions, and what is never shown."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iccache import config, postgres_url
from iccache.errors import ConfigError, StoreError, StoreVersionError
from iccache.examples.postgres import connection, dialect
from iccache.examples.postgres.store import PostgresStore
from iccache.examples.sqlite.key import Key
from iccache.examples.store import ExampleStore, is_there, open_store, restore_store
from replay.store import SqliteReplayStore, open_replay_store
from tests.contracts.test_store import KEY
from tests.factories import AT, make_example, make_exchange, make_feedback
from tests.postgres import PASSWORD, WITH_STORE, Server


@pytest.fixture
def store(postgres_url: str) -> Any:
    with closing(open_store(postgres_url)) as opened:
        yield opened


# several connections


def test_the_feed_has_no_gap_and_nothing_comes_late_while_many_write(store: PostgresStore) -> None:
    seen: list[int] = []
    done = threading.Event()

    def follow() -> None:
        with closing(store.reader()) as reader:
            while True:
                last = done.is_set()
                seen.extend(change.seq for change in reader.changes(seen[-1] if seen else 0))
                if last:
                    return

    def write(worker: int) -> None:
        with closing(open_store(store.url)) as mine:
            for n in range(25):
                with suppress(ZeroDivisionError), mine.transaction():
                    mine.admit(make_example(f"e{worker}-{n}"))
                    if n % 5 == 0:
                        raise ZeroDivisionError

    follower = threading.Thread(target=follow)
    follower.start()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    done.set()
    follower.join()
    assert seen == list(range(1, 4 * 20 + 1))
    assert store.count_examples() == 80


def test_a_budget_that_many_reserve_from_at_once_is_never_exceeded(store: PostgresStore) -> None:
    def reserve(worker: int) -> int:
        with closing(open_store(store.url)) as mine:
            return sum(mine.reserve_judging(AT, f"r{worker}", "answer", 10, 205) is not None for _ in range(10))

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(reserve, range(4))) == 20
    assert store.judged_usd(0.0) == pytest.approx(200e-9)


def test_who_waits_too_long_for_the_others_is_told(store: PostgresStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BEGIN", "SET lock_timeout = '50ms'; " + connection.BEGIN)
    with closing(open_store(store.url)) as other:
        with store.transaction(), pytest.raises(StoreError, match="locked by another process"):
            other.record(make_exchange())
        other.record(make_exchange())
    assert store.exchange("r1") is not None


# parts of transactions


class Part:
    """Some writes, of which a part may fail."""

    def __init__(self, steps: Sequence[Any], fails: bool) -> None:
        self.steps, self.fails = steps, fails

    def __repr__(self) -> str:
        return f"Part({self.steps}, {self.fails})"

    def run(self, store: ExampleStore) -> None:
        for step in self.steps:
            if isinstance(step, Part):
                with suppress(ZeroDivisionError), store.transaction():
                    step.run(store)
            else:
                store.save_state(step, 1, b"")
        if self.fails:
            raise ZeroDivisionError


names = st.text("abcdefgh", min_size=1, max_size=2)
parts = st.recursive(
    names, lambda inner: st.builds(Part, st.lists(inner, max_size=4), st.booleans()), max_leaves=25
).filter(lambda step: isinstance(step, Part))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part=parts)
def test_parts_that_fail_undo_the_same_as_in_sqlite(postgres_server: Server, part: Part) -> None:
    with closing(open_store("sqlite:///:memory:")) as expected, postgres_server.empty_store() as url:
        store = open_store(url)
        for each in (expected, store):
            with suppress(ZeroDivisionError), each.transaction():
                part.run(each)
        for name in (a + b for a in "abcdefgh" for b in ("", *"abcdefgh")):
            assert (store.load_state(name) is None) == (expected.load_state(name) is None), name
        store.close()


def test_a_statement_that_fails_ends_its_part_and_no_more(store: PostgresStore) -> None:
    with store.transaction():
        store.record(make_exchange("r1"))
        with pytest.raises(StoreError), store.transaction():
            store._write("INSERT INTO exchanges (request_id) VALUES (?)", ["half"])
        store.record(make_exchange("r2"))
    assert store.exchange("r1") and store.exchange("r2")
    with pytest.raises(StoreError), store.transaction():
        store.record(make_exchange("r3"))
        with suppress(StoreError):
            store._write("INSERT INTO exchanges (request_id) VALUES (?)", ["half"])
    assert store.exchange("r3") is None, "what was caught by hand is undone all the same, and says so"


# lost connections


def test_a_lost_connection_is_made_anew(store: PostgresStore, postgres_server: Server) -> None:
    with closing(store.reader()) as reader:
        store.record(make_exchange("r1"))
        assert reader.exchange("r1")
        postgres_server.cut_connections(WITH_STORE)
        assert reader.exchange("r1")
        postgres_server.cut_connections(WITH_STORE)
        store.record(make_exchange("r2"))
        assert reader.exchange("r2")
        with pytest.raises(StoreError, match="read"):
            reader.record(make_exchange("r3"))  # the new one is for reading only, too


def test_a_transaction_whose_connection_is_lost_fails_and_leaves_nothing(
    store: PostgresStore, postgres_server: Server
) -> None:
    with pytest.raises(StoreError), store.transaction():
        store.record(make_exchange("r1"))
        postgres_server.cut_connections(WITH_STORE)
        with suppress(StoreError):
            store.record(make_exchange("r2"))
        with suppress(StoreError):
            store.exchange("r1")
    assert store.exchange("r1") is None and store.exchange("r2") is None
    store.record(make_exchange("r3"))
    assert store.exchange("r3")


def test_a_database_that_cannot_be_reached_is_not_tried_for_every_request(postgres_server: Server) -> None:
    now = [0.0]
    with postgres_server.database() as url:
        store = PostgresStore(url)
        store._monotonic = lambda: now[0]
        tried = []
        store._open = lambda: tried.append(1) or PostgresStore._open(store)  # type: ignore[func-returns-value,method-assign]
        postgres_server.sql(f"ALTER DATABASE {url.rpartition('/')[2]} WITH ALLOW_CONNECTIONS false")
        postgres_server.cut_connections(url.rpartition("/")[2])
        for _ in range(5):
            with pytest.raises(StoreError) as caught:
                store.last_change()
            assert PASSWORD not in str(caught.value)
        assert len(tried) == 1
        postgres_server.sql(f"ALTER DATABASE {url.rpartition('/')[2]} WITH ALLOW_CONNECTIONS true")
        now[0] = 1.5
        assert store.last_change() == 0
        store.close()


# opening


def test_many_may_open_an_empty_database_at_once(postgres_server: Server) -> None:
    def admit(n: int) -> None:
        with closing(open_store(url)) as mine:
            mine.admit(make_example(f"e{n}"))

    with postgres_server.database() as url:
        assert not is_there(url)
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(admit, range(6)))
        assert is_there(url)
        with closing(open_store(url)) as store:
            assert store.count_examples() == 6


def test_another_versions_and_another_programs_tables_are_left_alone(postgres_server: Server) -> None:
    with postgres_server.database() as url:
        name = url.rpartition("/")[2]
        postgres_server.sql("CREATE SCHEMA iccache; CREATE TABLE iccache.theirs (x int)", name)
        with pytest.raises(StoreError, match="another program"):
            open_store(url)
        postgres_server.sql("DROP SCHEMA iccache CASCADE", name)
        with closing(open_store(url)) as store:
            postgres_server.sql("INSERT INTO iccache.steps VALUES ('iccache', '0099_of_tomorrow')", name)
            with pytest.raises(StoreVersionError, match="99"):
                open_store(url)
            with pytest.raises(StoreVersionError):
                store.reader()


def test_a_database_of_another_encoding_is_refused(postgres_server: Server) -> None:
    postgres_server.sql("CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0")
    with pytest.raises(StoreError, match="LATIN1, not UTF8"):
        open_store(postgres_server.url("latin"))
    postgres_server.sql("DROP DATABASE latin")


def test_the_tables_are_those_of_sqlite(postgres_server: Server, tmp_path: Path) -> None:
    """Whoever adds a step to one adds it to the other."""
    ours: dict[str, set[str]] = {}
    with closing(SqliteReplayStore(tmp_path / "store.db")) as sqlite:
        for table, kind in sqlite.rows("SELECT name, type FROM sqlite_master WHERE type IN ('table', 'view', 'index')"):
            if not table.startswith(("sqlite_", "_sqlite", "idx__sqlite")):
                columns = sqlite.rows("SELECT name FROM pragma_table_info(?)", [table])
                ours[table] = {row[0] for row in columns} if kind != "index" else set()
    with postgres_server.database() as url:
        open_replay_store(config.parse({"store": {"url": url}})).close()
        found = postgres_server.sql(
            "SELECT relname, coalesce(array_agg(attname::text) FILTER (WHERE relkind <> 'i'), '{}') FROM pg_class c"
            " JOIN pg_attribute ON attrelid = c.oid AND attnum > 0 WHERE relnamespace = 'iccache'::regnamespace"
            " AND relkind IN ('r', 'v', 'i') AND relname !~ '_(pkey|key)$' GROUP BY relname",
            url.rpartition("/")[2],
        )
    theirs = {str(name): set(columns) for name, columns in found}  # type: ignore[call-overload]
    del theirs["steps"], theirs["trimmed"]
    assert theirs == ours


# addresses


def refused(url: str) -> str:
    with pytest.raises((ConfigError, StoreError)) as caught:
        open_store(url)
    return str(caught.value)


def test_what_is_wrong_is_said_in_a_line_without_the_password(postgres_server: Server) -> None:
    right = postgres_server.url("postgres")
    free = postgres_server.free_port()
    for url, said in (
        (right.replace(PASSWORD, "s3cret-wrong"), "password"),
        (right.replace(f":{PASSWORD}", ""), "asks for a password"),
        (postgres_server.url("nowhere"), "createdb"),
        (right.replace(f":{postgres_server.port}", f":{free}"), "cannot be reached"),
        (f"postgresql://me:s3cret-wrong@no.such.host.invalid/x?password={PASSWORD}", "cannot be reached"),
        (f"postgresql://me@127.0.0.1/x?password={PASSWORD}&sslmod=require", "libpq"),
        ("postgresql://me:s3cret@wrong@127.0.0.1/x", "%40"),
        ("postgresql://me:s3cret/wrong@127.0.0.1/x", "%2F"),
    ):
        message = refused(url)
        assert said in message and "\n" not in message, message
        assert PASSWORD not in message and "s3cret" not in message


def test_what_libpq_users_expect_of_the_environment_and_the_url_works(
    postgres_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with postgres_server.database() as url:
        bare = url.replace(f":{PASSWORD}", "")
        monkeypatch.setenv("PGPASSWORD", PASSWORD)
        open_store(f"{bare}?sslmode=prefer&connect_timeout=3").close()
        assert "SSL" in refused(f"{bare}?sslmode=require")


def test_a_printed_configuration_shows_no_password() -> None:
    for url in ("postgresql://me:hush@db/x", "postgresql://me@db/x?sslmode=require&password=hush&sslpassword=hush"):
        settings = config.parse({"store": {"url": url}})
        for text in (config.to_toml(settings), config.to_json(settings)):
            assert "hush" in text and "hush" not in config.without_passwords(text)
        assert "hush" not in postgres_url.shown(url)


def test_settings_that_are_for_files_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    url = "postgresql://me@db/x"
    with pytest.raises(ConfigError, match="for SQLite files"):
        config.parse({"store": {"url": url, "key_env": "KEY"}})
    with pytest.raises(ConfigError, match="for SQLite files"):
        open_store(url, key=Key(KEY.reveal()))
    with pytest.raises(ConfigError, match="pg_restore"):
        restore_store(url, tmp_path / "copy.db")


def test_a_backup_names_the_tool(store: PostgresStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="pg_dump") as caught:
        store.backup(tmp_path / "copy")
    assert PASSWORD not in str(caught.value)


def test_where_psycopg_is_missing_it_is_said_what_to_install() -> None:
    code = (
        "import sys; sys.modules['psycopg'] = None\n"
        "from iccache.errors import ConfigError\nfrom iccache.examples.store import open_store\n"
        "open_store('sqlite:///:memory:').close()\n"
        "try:\n    open_store('postgresql://db/x')\nexcept ConfigError as exc:\n    print(exc)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'iccache[postgres]'" in done.stdout


# words


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("a = ? AND b LIKE 'x%?:y'", "a = %s AND b LIKE 'x%%?:y'"),
        ("a = :a OR a % :b = 0", "a = %(a)s OR a %% %(b)s = 0"),
        ("x IN (SELECT value FROM json_each(?))", 'x IN (SELECT value COLLATE "C" FROM listed(%s))'),
        ("SET at = max(at, ?), n = max(n)", "SET at = greatest(at, %s), n = max(n)"),
    ],
)
def test_sqlites_words_become_postgresqls(ours: str, theirs: str) -> None:
    assert dialect.translated(ours).text.decode() == theirs


def test_what_may_be_missing_is_told() -> None:
    words = dialect.translated(":tenant IS NULL OR tenant = :tenant")
    assert words.text == b"%(tenant_is_missing)s OR tenant = %(tenant)s"
    assert words.values({"tenant": None}) == {"tenant": None, "tenant_is_missing": True}
    assert words.values({"tenant": "t"}) == {"tenant": "t", "tenant_is_missing": False}


def test_feedback_in_a_lost_transaction_can_be_given_again(store: PostgresStore, postgres_server: Server) -> None:
    store.record(make_exchange())
    with pytest.raises(StoreError), store.transaction():
        store.add_feedback(make_feedback(), tenant="t")
        postgres_server.cut_connections(WITH_STORE)
    assert store.feedback("r1") == []
    assert store.add_feedback(make_feedback(), tenant="t")
    assert [f.score for f in store.feedback("r1")] == [1.0]
