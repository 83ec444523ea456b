"""All tenants' vectors in one file: a cache of the store, mapped into memory and shared by the processes that read it.

    magic | array | array | ... | description (JSON) | its length, its CRC-32, magic

A file is written apart and renamed when it is whole. Afterwards its bytes change in one way only: the vector of an
example that was deleted is overwritten with zeros (`scrub`). What the file is about stands in its description; what
cannot be understood, or does not fit the length of the file, is no snapshot.

    clustered   the vectors of a tenant by list (see index.clustered): codes of a list, then its row numbers
    flat        the vectors of a tenant as float16 (n, dim)

A row is a vector's place in its tenant's part of the file.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from iccache import private
from iccache.errors import IccacheError
from iccache.processes import is_running

MAGIC = b"iccache vectors 1\n"
TAIL = struct.Struct("<QI18s")  # bytes of the description, its CRC-32, magic
ROW_NUMBER_BYTES = 8
SUFFIX = ".vectors"


class SnapshotError(IccacheError):
    """A file that is no usable snapshot."""


class Array(msgspec.Struct, frozen=True):
    """Where an array is in the file."""

    at: int  # bytes
    dtype: str
    shape: tuple[int, ...]


class Part(msgspec.Struct, frozen=True):
    """One tenant's vectors."""

    tenant: str
    n: int
    probes: int  # lists to look into; 0: flat
    ids: dict[str, Array]
    arrays: dict[str, Array]


class About(msgspec.Struct, frozen=True):
    """What a snapshot holds, and of what it is the cache."""

    embedder: str
    dim: int
    restored_at: int
    cursor: int  # the change of the store that is surely included
    witness: str  # the key of that change: another store's change of that number has another
    parts: tuple[Part, ...]
    stale: Array  # ids of examples of another embedder, each ended by a zero byte


def beside(store: Path) -> Path:
    """Where the snapshot of the store in `store` is."""
    return store.with_name(store.name + SUFFIX)


class Memory:
    """A file on no disk. It ends with the last process that has it open."""

    def __init__(self, descriptor: int | None = None) -> None:
        """`descriptor`: of one that is there. Raises SnapshotError where the system has no such files."""
        if descriptor is None:
            if not hasattr(os, "memfd_create"):
                raise SnapshotError("this system has no files in memory")
            descriptor = os.memfd_create("iccache-vectors")
        self.descriptor = descriptor

    @property
    def path(self) -> Path:
        """Under which this process can open it."""
        return Path(f"/proc/self/fd/{self.descriptor}")

    def close(self) -> None:
        os.close(self.descriptor)


class Snapshot:
    """An open snapshot. Its arrays are views of the file, and live as long as somebody holds them."""

    def __init__(self, path: Path) -> None:
        """Raises SnapshotError when there is none in `path`, or none that is whole."""
        self.path = path
        try:
            self._file = path.open("rb")
            self.identity = _identity(os.fstat(self._file.fileno()))
            self.about = read_about(self._file)
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as exc:
            raise SnapshotError(f"{path}: {exc.strerror}") from exc
        self.size = len(self._map)

    def array(self, array: Array) -> NDArray[Any]:
        count = math.prod(array.shape)
        return np.frombuffer(self._map, array.dtype, count, array.at).reshape(array.shape)

    def ids(self, part: Part) -> Ids:
        return Ids({name: self.array(array) for name, array in part.ids.items()})

    def stale(self) -> list[str]:
        return self.array(self.about.stale).tobytes().decode().split("\0")[:-1]

    def name_to_map(self) -> str:
        """A name under which this very file can be opened, whatever has its own name by now."""
        return f"/dev/fd/{self._file.fileno()}"

    def read_ahead(self) -> None:
        """Ask the system to have the file in memory soon."""
        with suppress(AttributeError, OSError):
            self._map.madvise(mmap.MADV_WILLNEED)

    def is_current(self) -> bool:
        """Whether no other snapshot has taken its name."""
        try:
            return _identity(self.path.stat()) == self.identity
        except OSError:
            return False


class Ids:
    """Ids by row, and rows by id, in 28 bytes beside the ids themselves."""

    def __init__(self, arrays: dict[str, NDArray[Any]]) -> None:
        self._text = arrays["text"]  # uint8: the ids one after the other
        self._bytes = self._text.data
        self._ends = arrays["ends"]  # int64 (n,): where each ends
        self._hashes = arrays["hashes"]  # uint64 (n,), ascending
        self._rows = arrays["rows"]  # uint32 (n,): whose hash it is

    def __len__(self) -> int:
        return len(self._ends)

    def id(self, row: int) -> str:
        start = self._ends[row - 1] if row else 0
        return self._text[start : self._ends[row]].tobytes().decode()

    def some(self, rows: Sequence[int]) -> list[str]:
        """`id` of each: together they take a third of the time."""
        ends, text = self._ends, self._bytes
        return [str(text[ends.item(row - 1) if row else 0 : ends.item(row)], "utf-8") for row in rows]

    def row(self, id: str) -> int | None:
        """None where it is unknown."""
        wanted = np.uint64(id_hash(id))
        place = int(np.searchsorted(self._hashes, wanted))
        while place < len(self._hashes) and self._hashes[place] == wanted:
            row = int(self._rows[place])
            if self.id(row) == id:
                return row
            place += 1
        return None


def id_hash(id: str) -> int:
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "little")


class SnapshotWriter:
    """A new snapshot, not seen by anybody before `finish`. Use in a `with`: what was not finished is removed."""

    def __init__(self, path: Path, *, in_place: bool = False) -> None:
        """`in_place`: the file is there, and nobody's yet."""
        self.path = path
        self._partial = path
        if not in_place:
            sweep(path)
            self._partial = private.make(path.with_name(f"{path.name}.{os.getpid()}.partial"))
        self._file = self._partial.open("wb")
        self._file.write(MAGIC)

    def __enter__(self) -> SnapshotWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._partial != self.path:
            self._partial.unlink(missing_ok=True)

    def at(self) -> int:
        return self._file.tell()

    def write(self, array: NDArray[Any]) -> Array:
        """Append an array, aligned."""
        self._file.write(bytes(-self.at() % 64))
        at = self.at()
        self.append(array)
        return Array(at, array.dtype.str, array.shape)

    def append(self, array: NDArray[Any]) -> None:
        """The bytes of an array, right after what was written last."""
        self._file.write(np.ascontiguousarray(array).data.cast("B") if array.size else b"")

    def write_ids(self, text: bytes, ends: NDArray[np.int64], hashes: NDArray[np.uint64]) -> dict[str, Array]:
        order = np.argsort(hashes, kind="stable")
        return {
            "text": self.write(np.frombuffer(text, np.uint8)),
            "ends": self.write(ends),
            "hashes": self.write(hashes[order]),
            "rows": self.write(order.astype(np.uint32)),
        }

    def finish(self, about: About, like: Path | None = None) -> None:
        """Give the snapshot its name, and the permissions of the file `like`."""
        description = msgspec.json.encode(about)
        self._file.write(description + TAIL.pack(len(description), zlib.crc32(description), MAGIC))
        self._file.flush()
        if self._partial == self.path:
            return
        if like is not None:
            with suppress(OSError):
                os.fchmod(self._file.fileno(), like.stat().st_mode & 0o777)
        os.fsync(self._file.fileno())
        os.replace(self._partial, self.path)


def read_about(file: BinaryIO) -> About:
    """The description of the snapshot in `file`. Raises SnapshotError when it is none, or not whole."""
    size = file.seek(0, os.SEEK_END)
    if size < len(MAGIC) + TAIL.size:
        raise SnapshotError("is too short for a snapshot")
    file.seek(size - TAIL.size)
    length, crc, magic = TAIL.unpack(file.read(TAIL.size))
    start = size - TAIL.size - length
    if magic != MAGIC or start < len(MAGIC):
        raise SnapshotError("is no snapshot, or is cut off")
    file.seek(start)
    description = file.read(length)
    if zlib.crc32(description) != crc:
        raise SnapshotError("is damaged")
    try:
        about = msgspec.json.decode(description, type=About)
        fits = all(
            a.at >= 0 and a.at + math.prod(a.shape) * np.dtype(a.dtype).itemsize <= start for a in _arrays(about)
        )
    except (msgspec.MsgspecError, UnicodeDecodeError, TypeError, ValueError) as exc:
        raise SnapshotError(f"has another form: {exc}") from exc
    if not fits:
        raise SnapshotError("does not hold what it describes")
    return about


def _arrays(about: About) -> Iterator[Array]:
    yield about.stale
    for part in about.parts:
        yield from part.ids.values()
        yield from part.arrays.values()


def scrub(path: Path, ids: Sequence[str]) -> int:
    """Overwrite the vectors of `ids` in the snapshot in `path`; returns how many were there.

    Seen at once by every process that has the file mapped; on disk when this returns. Where there is no snapshot there
    is nothing to do. Raises OSError when it cannot be written.
    """
    try:
        snapshot = Snapshot(path)
    except SnapshotError:
        return 0
    places = [place for part in snapshot.about.parts for place in _vectors_of(snapshot, part, ids)]
    if places:
        descriptor = os.open(path, os.O_WRONLY)
        try:
            if _identity(os.fstat(descriptor)) == snapshot.identity:
                for at, length in places:
                    os.pwrite(descriptor, bytes(length), at)
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return len(places)


def _vectors_of(snapshot: Snapshot, part: Part, ids: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(offset, length) in bytes of the vectors of those of `ids` that are in a part."""
    known = snapshot.ids(part)
    for row in (row for id in ids if (row := known.row(id)) is not None):
        if part.probes == 0:
            vectors = part.arrays["vectors"]
            length = vectors.shape[1] * np.dtype(vectors.dtype).itemsize
            yield vectors.at + row * length, length
        else:
            starts = snapshot.array(part.arrays["starts"])
            list_no = int(np.searchsorted(starts, row, side="right")) - 1
            yield code_at(part.arrays["lists"].at, starts, list_no, row, snapshot.about.dim), snapshot.about.dim


def code_at(lists_at: int, starts: NDArray[np.int64], list_no: int, row: int, code_bytes: int) -> int:
    """Where in the file the code of a row is: each list is its codes, then its row numbers."""
    start = int(starts[list_no])
    return lists_at + start * (code_bytes + ROW_NUMBER_BYTES) + (row - start) * code_bytes


def _identity(status: os.stat_result) -> tuple[int, int]:
    """Which file it is, as long as somebody has it open."""
    return status.st_dev, status.st_ino


def sweep(path: Path) -> None:
    """Remove what processes that were killed have left."""
    for left in path.parent.glob(f"{path.name}.*.partial"):
        number = left.name.removeprefix(f"{path.name}.").removesuffix(".partial")
        if not (number.isdigit() and int(number) != os.getpid() and is_running(int(number))):
            left.unlink(missing_ok=True)
