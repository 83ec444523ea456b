"""Records to rows of the tables, and back. Vectors are raw little-endian floats, structures are JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from iccache.errors import StoreError
from iccache.examples.sql.connection import Row
from iccache.types import (
    BackendScore,
    Considered,
    DecisionKind,
    Example,
    ExampleStats,
    Exchange,
    Hold,
    Reason,
    Usage,
    Vector,
)

EXCHANGE_COLUMNS = (
    *("request_id", "tenant", "subject", "session", "at", "dialect", "model", "stream", "backend", "decision"),
    *("reason", "status", "complete", "offloaded", "relative_cost", "text_bytes", "finish_reason", "input_tokens"),
    *("output_tokens", "example_tokens", "estimated", "cost_usd", "latency_s", "first_byte_s", "overhead_s"),
    *("propensity", "features", "shown", "considered", "backends", "extra", "system", "task", "answer"),
)
EXAMPLE_COLUMNS = (
    *("id", "tenant", "subject", "request_id", "at", "dialect", "backend", "digest", "original", "tokens"),
    *("text_bytes", "embedding_bytes", "embedder", "embedding", "system", "request", "answer", "held"),
)
STATS_COLUMNS = ExampleStats._fields


def _names(columns: Sequence[str]) -> str:
    return ", ".join(columns)


def _values(columns: Sequence[str]) -> str:
    return ", ".join(f":{column}" for column in columns)


def _assignments(columns: Sequence[str]) -> str:
    return ", ".join(f"{column} = :{column}" for column in columns)


# S608 below: made of the column names above, never of data
UPSERT_EXCHANGE = (
    f"INSERT INTO exchanges ({_names(EXCHANGE_COLUMNS)}) VALUES ({', '.join('?' * len(EXCHANGE_COLUMNS))})"  # noqa: S608
    f" ON CONFLICT (request_id) DO UPDATE SET {', '.join(f'{c} = excluded.{c}' for c in EXCHANGE_COLUMNS[1:])}"
)
INSERTED_AT_ONCE = (64, 32, 16, 8, 4, 2, 1)  # exchanges: few statements, so that each is prepared once
INSERT_EXCHANGES = {
    count: f"INSERT INTO exchanges ({_names(EXCHANGE_COLUMNS)}, counted) VALUES "  # noqa: S608
    + ", ".join([f"({', '.join('?' * (len(EXCHANGE_COLUMNS) + 1))})"] * count)
    for count in INSERTED_AT_ONCE
}
INSERT_EXAMPLE = f"INSERT INTO examples ({_names(EXAMPLE_COLUMNS)}) VALUES ({_values(EXAMPLE_COLUMNS)})"  # noqa: S608
REPLACE_EXAMPLE = f"UPDATE examples SET {_assignments(EXAMPLE_COLUMNS[1:])} WHERE id = :id"  # noqa: S608
INSERT_STATS = (
    f"INSERT INTO example_stats (example_id, {_names(STATS_COLUMNS)})"  # noqa: S608
    f" VALUES (:example_id, {_values(STATS_COLUMNS)})"
)
UPDATE_STATS = (
    f"UPDATE example_stats SET scored = :scored, {_assignments(STATS_COLUMNS)}"  # noqa: S608
    " WHERE example_id = :example_id"
)
UPDATE_EXAMPLE = """
UPDATE examples SET
    original = original AND :answer IS NULL,
    answer = coalesce(:answer, answer),
    text_bytes = :text_bytes,
    backend = coalesce(:backend, backend),
    tokens = coalesce(:tokens, tokens),
    embedder = coalesce(:embedder, embedder),
    embedding = coalesce(:embedding, embedding),
    embedding_bytes = coalesce(:embedding_bytes, embedding_bytes)
WHERE id = :id
"""


def inserted_together(exchanges: Sequence[Exchange]) -> Iterator[tuple[str, list[Any]]]:
    """Statements that insert exchanges of which none is there, as counted where they are complete; and their values."""
    at = 0
    while at < len(exchanges):
        count = next(count for count in INSERTED_AT_ONCE if count <= len(exchanges) - at)
        values: list[Any] = []
        for exchange in exchanges[at : at + count]:
            values += exchange_values(exchange)
            values.append(exchange.complete)
        yield INSERT_EXCHANGES[count], values
        at += count


def exchange_values(exchange: Exchange) -> list[Any]:
    """In the order of EXCHANGE_COLUMNS."""
    row = exchange_row(exchange)
    return [row[column] for column in EXCHANGE_COLUMNS]


def exchange_row(exchange: Exchange) -> dict[str, Any]:
    return {
        "request_id": exchange.request_id,
        "tenant": exchange.tenant,
        "subject": exchange.subject,
        "session": exchange.session,
        "at": exchange.at,
        "dialect": exchange.dialect,
        "model": exchange.model,
        "stream": exchange.stream,
        "backend": exchange.backend,
        "decision": exchange.decision.value,
        "reason": None if exchange.reason is None else exchange.reason.value,
        "status": exchange.status,
        "complete": exchange.complete,
        "offloaded": exchange.offloaded,
        "relative_cost": exchange.relative_cost,
        "text_bytes": size_of(exchange.system, exchange.task, exchange.answer),
        "finish_reason": exchange.finish_reason,
        "input_tokens": exchange.usage.input,
        "output_tokens": exchange.usage.output,
        "example_tokens": exchange.usage.example,
        "estimated": exchange.usage.estimated,
        "cost_usd": exchange.cost_usd,
        "latency_s": exchange.latency_s,
        "first_byte_s": exchange.first_byte_s,
        "overhead_s": exchange.overhead_s,
        "propensity": exchange.propensity,
        "features": None if exchange.features is None else np.asarray(exchange.features, dtype="<f8").tobytes(),
        "shown": to_json(list(exchange.shown)),
        "considered": to_json([list(c) for c in exchange.considered]),
        "backends": to_json([list(b) for b in exchange.backends]),
        "extra": to_json(exchange.extra),
        "system": exchange.system,
        "task": exchange.task,
        "answer": exchange.answer,
    }


def to_exchange(row: Row) -> Exchange:
    return Exchange(
        request_id=row["request_id"],
        tenant=row["tenant"],
        subject=row["subject"],
        session=row["session"],
        at=row["at"],
        dialect=row["dialect"],
        model=row["model"],
        stream=bool(row["stream"]),
        backend=row["backend"],
        decision=DecisionKind(row["decision"]),
        reason=None if row["reason"] is None else Reason(row["reason"]),
        status=row["status"],
        complete=bool(row["complete"]),
        offloaded=bool(row["offloaded"]),
        relative_cost=row["relative_cost"],
        system=row["system"],
        task=row["task"],
        answer=row["answer"],
        finish_reason=row["finish_reason"],
        usage=Usage(row["input_tokens"], row["output_tokens"], row["example_tokens"], bool(row["estimated"])),
        cost_usd=row["cost_usd"],
        latency_s=row["latency_s"],
        first_byte_s=row["first_byte_s"],
        overhead_s=row["overhead_s"],
        propensity=row["propensity"],
        features=None if row["features"] is None else _features(row["features"]),
        shown=tuple(orjson.loads(row["shown"])),
        considered=tuple(Considered(*item) for item in orjson.loads(row["considered"])),
        backends=tuple(BackendScore(*item) for item in orjson.loads(row["backends"])),
        quality=row["quality"],
        extra=orjson.loads(row["extra"]),
    )


def example_row(example: Example, digest: bytes, original: bool) -> dict[str, Any]:
    blob = to_blob(example.embedding)
    return {
        "id": example.id,
        "tenant": example.tenant,
        "subject": example.subject,
        "request_id": example.request_id,
        "at": example.at,
        "dialect": example.dialect,
        "backend": example.backend,
        "digest": digest,
        "original": original,
        "tokens": example.tokens,
        "text_bytes": size_of(example.system, example.request, example.answer),
        "embedding_bytes": len(blob),
        "embedder": example.embedder,
        "embedding": blob,
        "system": example.system,
        "request": example.request,
        "answer": example.answer,
        "held": None if example.held is None else example.held.value,
    }


def to_example(row: Row) -> Example:
    return Example(
        id=row["id"],
        tenant=row["tenant"],
        subject=row["subject"],
        request_id=row["request_id"],
        at=row["at"],
        dialect=row["dialect"],
        system=row["system"],
        request=row["request"],
        answer=row["answer"],
        backend=row["backend"],
        embedder=row["embedder"],
        embedding=to_vector(row["embedding"]),
        tokens=row["tokens"],
        stats=to_stats(row),
        held=None if row["held"] is None else Hold(row["held"]),
    )


def to_stats(row: Row) -> ExampleStats:
    return ExampleStats(*(row[name] for name in STATS_COLUMNS))


def digest_of(system: str, request: str) -> bytes:
    """Equal for duplicates. JSON keeps the two texts apart."""
    return hashlib.sha256(to_json([system, request]).encode()).digest()


def to_json(value: Any) -> str:
    try:
        return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode()
    except orjson.JSONEncodeError as exc:
        raise StoreError(f"the store takes JSON and Unicode text without lone surrogates only: {exc}") from exc


def size_of(*texts: str) -> int:
    """Bytes of the texts in UTF-8."""
    return sum(len(text.encode()) for text in texts)


def to_blob(vector: Vector) -> bytes:
    return np.asarray(vector, dtype="<f4").tobytes()


def to_vector(blob: bytes) -> Vector:
    return np.frombuffer(blob, dtype="<f4").astype(np.float32, copy=False)


def _features(blob: bytes) -> NDArray[np.float64]:
    return np.frombuffer(blob, dtype="<f8").astype(np.float64, copy=False)
