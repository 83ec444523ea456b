"""The address of a PostgreSQL database, as libpq reads it: postgresql://user:password@host:port/database?..."""

from __future__ import annotations

from urllib.parse import urlsplit

SCHEMES = ("postgresql", "postgres")
NO_KEY = "store.key_env: is for SQLite files; encrypt the disk of the PostgreSQL server instead"


def is_postgres(url: str) -> bool:
    return url.partition("://")[0] in SCHEMES


def shown(url: str) -> str:
    """`url` as it may be printed: without a password, and without what follows `?`, where there may be another."""
    parts = urlsplit(url)
    credentials, at, host = parts.netloc.rpartition("@")
    return f"{parts.scheme}://{credentials.partition(':')[0]}{at}{host}{parts.path}"


def unfit(url: str) -> str | None:
    """What is wrong where part of a password would be taken for something else. It does not repeat the url."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "is no address of a PostgreSQL database"
    if parts.netloc.count("@") > 1 or "@" in parts.path + parts.query + parts.fragment or parts.fragment:
        return "in a user's name or password write @ as %40, : as %3A, / as %2F, ? as %3F and # as %23"
    return None
