"""SQLite's SQL in PostgreSQL's words, as far as the rooms of `sql` and replay use it.

They keep to what both say in the same way, but for the handful below. Values are `%s` and `%(name)s` here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

MISSING = "_is_missing"
WORDS = (
    # rows of a JSON list of texts; the collation is that of the columns they are compared with
    (re.compile(r"SELECT value FROM json_each\("), 'SELECT value COLLATE "C" FROM listed('),
    (re.compile(r"json_extract\((\w+), '\$\.(\w+)'\)"), r"(CAST(\1 AS json) ->> '\2')"),
    (re.compile(r"\bmax\((\w+), \?\)"), r"greatest(\1, ?)"),
    (re.compile(r"\blength\(CAST\(([\w.]+) AS BLOB\)\)"), r"octet_length(\1)"),
    (re.compile(r"\bdate\((\w+), 'unixepoch'\)"), r"to_char(to_timestamp(\1) AT TIME ZONE 'UTC', 'YYYY-MM-DD')"),
)
VALUES = re.compile(r"'[^']*'|%|\?|(?<![:\w]):([a-z_]+)( IS NULL)?")


class Words(NamedTuple):
    """A statement for psycopg."""

    text: bytes
    missing: tuple[str, ...]  # values of which is asked whether they are None

    def values(self, given: Sequence[Any] | dict[str, Any]) -> Sequence[Any] | dict[str, Any]:
        if not self.missing:
            return given
        assert isinstance(given, dict)
        return given | {f"{name}{MISSING}": given[name] is None for name in self.missing}


@lru_cache(maxsize=1024)
def translated(sql: str) -> Words:
    """PostgreSQL cannot tell the type of a value that is only compared with NULL: it is told the outcome instead."""
    for pattern, words in WORDS:
        sql = pattern.sub(words, sql)
    missing = [found[1] for found in VALUES.finditer(sql) if found[2]]
    return Words(VALUES.sub(_value, sql).encode(), tuple(missing))


def _value(found: re.Match[str]) -> str:
    text = found[0]
    if text.startswith("'") or text == "%":
        return text.replace("%", "%%")
    return "%s" if text == "?" else f"%({found[1]}{MISSING if found[2] else ''})s"
