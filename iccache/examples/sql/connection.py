"""What the rooms of a store ask of their database: transactions, and statements.

Their SQL is SQLite's, with the values as `?` or `:name`, and keeps to what another database says in the same way or
what its driver can put into its own words.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

Params = Sequence[Any] | dict[str, Any]


class Row(Protocol):
    """By the name or the place of its columns."""

    def __getitem__(self, key: Any, /) -> Any: ...

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int: ...

    def keys(self) -> Sequence[str]: ...


class Connection(ABC):
    """Belongs to the thread that opened it. All raise StoreError."""

    @abstractmethod
    def transaction(self) -> AbstractContextManager[None]:
        """The contract is store.ExampleStore's."""

    @abstractmethod
    def _rows(self, sql: str, params: Params = ()) -> Sequence[Row]:
        """All that `sql` selects, or that it returns of what it writes."""

    @abstractmethod
    def _write(self, sql: str, params: Params) -> int:
        """Returns how many rows it touched. Only inside a transaction."""

    @abstractmethod
    def _note_deleted(self, ids: Sequence[str]) -> None:
        """These examples were deleted in the transaction that is open: after its commit nothing is to hold them."""

    @abstractmethod
    def _note_erased(self) -> None:
        """Text was erased in the transaction that is open: after its commit nothing is to hold it."""

    @abstractmethod
    def checkpoint(self) -> bool:
        """As the rest below, the contract is store.ExampleStore's."""

    @abstractmethod
    def backup(self, path: Path | str) -> None: ...

    @abstractmethod
    def close(self) -> None: ...

    def _row(self, sql: str, params: Params = ()) -> Row | None:
        rows = self._rows(sql, params)
        return rows[0] if rows else None

    def _number(self, sql: str, params: Params = ()) -> float:
        """The one number that `sql` selects."""
        return float(self._rows(sql, params)[0][0])
