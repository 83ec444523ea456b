"""Who is asking. A tenant comes from its API key and from nothing else."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from iccache import config
from iccache.errors import ConfigError, RequestError

DEFAULT_TENANT = "default"


@dataclass(slots=True)
class Bucket:
    """A token bucket: `rate` a second, `size` at once."""

    rate: float
    size: float
    level: float
    at: float

    def take(self, now: float) -> float:
        """0.0 and one token less, or the seconds until there is one."""
        self.level = min(self.size, self.level + (now - self.at) * self.rate)
        self.at = now
        if self.level >= 1:
            self.level -= 1
            return 0.0
        return (1 - self.level) / self.rate


@dataclass(slots=True)
class Gate:
    """The tenants, their keys (as digests) and their limits."""

    tenants: Mapping[str, config.Tenant]
    digests: list[tuple[bytes, str]]
    buckets: dict[str, Bucket] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def of(cls, settings: config.Config, environ: Mapping[str, str]) -> Gate:
        """Reads every tenant's keys. Raises ConfigError for a missing key, or one that two tenants share."""
        digests: list[tuple[bytes, str]] = []
        for tenant in settings.tenants:
            for name in tenant.key_envs:
                digest = _digest(config.secret(environ, name, f"tenants: {tenant.name}"))
                owner = next((t for d, t in digests if d == digest), tenant.name)
                if owner != tenant.name:
                    raise ConfigError(f"tenants: {owner} and {tenant.name} have the same key")
                digests.append((digest, tenant.name))
        return cls({t.name: t for t in settings.tenants}, digests)

    def continue_from(self, before: Gate) -> None:
        """A reload is no fresh allowance: what was used of an unchanged limit stays used."""
        for name, tenant in self.tenants.items():
            known = before.tenants.get(name)
            if known and known.requests_per_minute == tenant.requests_per_minute and name in before.buckets:
                self.buckets[name] = before.buckets[name]

    def tenant(self, headers: Mapping[str, str]) -> str:
        """The tenant whose key the headers carry. Raises RequestError 401 where there is none; where nobody needs one,
        403 for web pages from elsewhere."""
        if not self.tenants:
            _refuse_foreign_pages(headers)
            return DEFAULT_TENANT
        given = _digest(bearer(headers))
        found = None
        for digest, name in self.digests:  # every one is compared, so that time tells nothing
            if hmac.compare_digest(digest, given):
                found = name
        if found is None:
            raise RequestError(401, "missing or unknown API key", type="authentication_error", code="invalid_api_key")
        return found

    def admit(self, tenant: str, spent_today: float) -> None:
        """Count one request. Raises RequestError 429 above the tenant's limits."""
        limits = self.tenants.get(tenant)
        if limits is None:
            return
        if limits.requests_per_minute:
            rate = limits.requests_per_minute / 60
            now = self.clock()
            full = float(limits.requests_per_minute)
            wait = self.buckets.setdefault(tenant, Bucket(rate, full, full, now)).take(now)
            if wait > 0:
                raise _too_many(f"more than {limits.requests_per_minute} requests a minute", wait)
        if limits.usd_per_day and spent_today >= limits.usd_per_day:
            raise _too_many(
                f"today's budget of {limits.usd_per_day:g} USD is spent",
                86400 - time.time() % 86400,
                "insufficient_quota",
            )


def _refuse_foreign_pages(headers: Mapping[str, str]) -> None:
    """A browser lets any page send requests to this machine, and says in `Origin` which page it was.

    Refused are pages of another machine and those that hide where they are from ("null"). A page that a proxy in front
    of us has served itself is none of them: its browser says `Sec-Fetch-Site: same-origin`.
    """
    origin = headers.get("Origin")
    if origin is None or headers.get("Sec-Fetch-Site") == "same-origin":
        return
    scheme, _, place = origin.partition("://")
    if origin != "null" and (scheme not in ("http", "https") or config.is_loopback(config.host_of(place))):
        return
    raise RequestError(
        403, "without [[tenants]], web pages from elsewhere are not served", type="permission_error", code="forbidden"
    )


def bearer(headers: Mapping[str, str]) -> str:
    """The key of a request: `Authorization: Bearer KEY`, `x-api-key` or `api-key`; "" where there is none."""
    scheme, _, key = headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key", headers.get("api-key", "")).strip()


def same_key(given: str, wanted: str) -> bool:
    """Whether two keys are equal, in constant time."""
    return hmac.compare_digest(_digest(given), _digest(wanted))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _too_many(what: str, wait_s: float, code: str = "rate_limit_exceeded") -> RequestError:
    return RequestError(429, f"{what}; try again later", type="rate_limit_error", code=code, retry_after_s=wait_s)
