"""psycopg itself: the one place that opens a connection, and where what it raises becomes ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from types import TracebackType
from typing import Any, cast

try:
    import psycopg
    from psycopg import conninfo, errors
    from psycopg.types.numeric import Int8BinaryDumper, NumericBinaryLoader
    from psycopg.types.string import StrDumperUnknown, TextBinaryLoader
except ImportError as exc:
    from iccache.errors import ConfigError

    raise ConfigError(f"store.url: PostgreSQL needs `pip install 'iccache[postgres]'`: {exc}") from exc

from iccache.errors import ConfigError, StoreError
from iccache.postgres_url import shown, unfit

Native = psycopg.Connection["Row"]

BUSY_TIMEOUT_S = 10.0
STATEMENTS_PREPARED = 300  # at most, in each connection
# libpq's own names; what the url or the environment says goes before. A host that is gone is noticed within seconds.
BY_DEFAULT = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "fallback_application_name": "iccache",
}
SCHEMA = "iccache"
MARK = "\ufdd0"  # no character, by Unicode
# the server lets go within seconds of a writer whose machine is gone: nobody else could write meanwhile
SESSION = f"""
SET search_path = {SCHEMA};
SET client_min_messages = warning;
SET lock_timeout = '{BUSY_TIMEOUT_S:.0f}s';
SET idle_in_transaction_session_timeout = '60s';
SET tcp_keepalives_idle = 5;
SET tcp_keepalives_interval = 2;
SET tcp_keepalives_count = 3;
SET tcp_user_timeout = '10s';
SET jit = off;
"""


class Row(tuple[Any, ...]):
    """By the name or the place of its columns."""

    __slots__ = ()
    places: dict[str, int]

    def __getitem__(self, key: Any) -> Any:
        return tuple.__getitem__(self, self.places[key] if key.__class__ is str else key)

    def keys(self) -> list[str]:
        return list(self.places)


@lru_cache(maxsize=512)
def _row_class(names: tuple[str, ...]) -> type[Row]:
    """Of one selection; where a name comes twice, it is the first."""
    places = {name: place for place, name in reversed(list(enumerate(names)))}
    return type("Row", (Row,), {"__slots__": (), "places": places})


def _rows(cursor: psycopg.Cursor[Any]) -> Callable[[Sequence[Any]], Row]:
    result = cursor.pgresult
    if result is None or not result.nfields:
        return Row
    return _row_class(tuple((result.fname(i) or b"").decode() for i in range(result.nfields)))


class _Text(StrDumperUnknown):
    """PostgreSQL takes no NUL in a text: MARK and 0 are in its place, and MARK and 1 in that of MARK."""

    def dump(self, obj: str) -> Any:
        if "\0" in obj or MARK in obj:
            obj = obj.replace(MARK, f"{MARK}1").replace("\0", f"{MARK}0")
        return super().dump(obj)


class _TextBack(TextBinaryLoader):
    def load(self, data: Any) -> Any:
        text = cast(str, super().load(data))
        return text.replace(f"{MARK}0", "\0").replace(f"{MARK}1", MARK) if MARK in text else text


class _Number(NumericBinaryLoader):
    """Sums of integers are `numeric` there."""

    def load(self, data: Any) -> Any:
        number = super().load(data)
        return int(number) if number == number.to_integral_value() else float(number)


def connect(url: str, *, read_only: bool = False) -> Native:
    """A connection that begins no transaction by itself. Raises ConfigError for a url that is none, and as psycopg."""
    parameters = _parameters(url)
    connection = psycopg.Connection.connect(
        **parameters, autocommit=True, row_factory=_rows, prepare_threshold=3, client_encoding="utf8"
    )
    try:
        connection.prepared_max = STATEMENTS_PREPARED
        connection.adapters.register_dumper(str, _Text)
        connection.adapters.register_dumper(int, Int8BinaryDumper)  # one type, so that a statement is prepared once
        connection.adapters.register_loader("numeric", _Number)
        connection.adapters.register_loader("text", _TextBack)
        connection.execute(SESSION + ("SET default_transaction_read_only = on;" if read_only else ""))
    except BaseException:
        connection.close()
        raise
    return cast(Native, connection)


def _parameters(url: str) -> dict[str, Any]:
    if problem := unfit(url):
        raise ConfigError(f"store.url: {problem}")
    try:
        given = conninfo.conninfo_to_dict(url)
    except psycopg.Error:
        raise ConfigError(f"store.url: {shown(url)} is no address that libpq can read") from None  # it repeats parts
    given.pop("client_encoding", None)
    return {**BY_DEFAULT, **given}


class Translated:
    """Turns what psycopg raises inside the block into a StoreError that names the database and the cure."""

    def __init__(self, place: str) -> None:
        self._place = place

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(exc, psycopg.Error):
            raise StoreError(f"{self._place}: {_cure(exc)}") from exc
        if isinstance(exc, UnicodeEncodeError):
            raise StoreError(f"{self._place}: text with lone surrogates cannot be stored") from exc


def is_lost(exc: BaseException) -> bool:
    """Whether there is no connection any more, or cannot be one: what comes later may go well."""
    return isinstance(exc, psycopg.OperationalError | psycopg.InterfaceError) and not isinstance(
        exc, errors.LockNotAvailable | errors.DiskFull | errors.OutOfMemory | errors.QueryCanceled
    )


CURES: tuple[tuple[type[psycopg.Error], str], ...] = (
    (errors.InsufficientPrivilege, "this user may not do that: give it the right to create in the database"),
    (errors.ReadOnlySqlTransaction, "cannot be written: this connection, or the server, is for reading only"),
    (errors.DiskFull, "cannot be written: the server's disk is full; free some space"),
    (errors.LockNotAvailable, f"was locked by another process for more than {BUSY_TIMEOUT_S:.0f} s: try again"),
    (errors.TooManyConnections, "takes no more connections: raise max_connections of the server"),
    (errors.AdminShutdown, "the server shut down: it is tried again by itself"),
    (errors.CannotConnectNow, "the server is starting up or shutting down: it is tried again by itself"),
)


def _cure(exc: psycopg.Error) -> str:
    """What is wrong and what helps. Never the detail of an error, which may hold what somebody wrote."""
    for kind, cure in CURES:
        if isinstance(exc, kind):
            return cure
    said = " ".join((exc.diag.message_primary or str(exc)).split())
    if "password authentication failed" in said:  # while connecting, psycopg tells no code
        return "lets nobody in with this name and password: see store.url, PGPASSWORD or ~/.pgpass"
    if "database" in said and "does not exist" in said:
        return "there is no such database: make it with `createdb`"
    if "password" in said and "supplied" in said:
        return "asks for a password: set it in store.url, PGPASSWORD or ~/.pgpass"
    if is_lost(exc):
        return f"cannot be reached: {said}"
    return f"{type(exc).__name__}: {said}"
