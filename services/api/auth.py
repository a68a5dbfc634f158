"""Who may use the API: keys with scopes, and a rate limit for each key. Without keys, for each client that processes.

Of a key only the SHA-256 is known here. A key is 256 random bits, so nothing slower is needed to keep it.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import math
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import msgspec
from litestar.connection import ASGIConnection
from litestar.exceptions import HTTPException
from litestar.handlers import BaseRouteHandler

from shared.domain.errors import OperatorError
from shared.runtime.settings import PREFIX, Settings

KEY_HEADER = "X-API-Key"
KEYS_MAX = 1_000
RATES_MAX = 10_000
CALLER = "caller"
SCOPE = "scope"

_ENTRY = re.compile(r"([A-Za-z0-9._-]{1,60}):(read|process|read\+process):([0-9a-f]{64})")


class Scope(enum.Enum):
    """What a key is good for: reading, or asking for dates too."""

    READ = "read"
    PROCESS = "process"


READ = frozenset({Scope.READ})
PROCESS = frozenset({Scope.PROCESS})
READ_OR_PROCESS = frozenset(Scope)


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key as it is kept: a name for people, what it is good for, and the SHA-256 of the key in hexadecimal."""

    name: str
    scopes: frozenset[Scope]
    sha256: str


class AccessUnclear(OperatorError):
    """The settings do not say who may use the API. The message says how to."""


class Refused(HTTPException):
    """Who asks may not have this: 401, 403 or 429."""


class Rate:
    """How often each key or client may ask: so many a minute, saved up for a minute at most."""

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str) -> float:
        """Take one for this name; return 0, or the seconds until there is one."""
        now_s = self._clock()
        left, at_s = self._left.get(name, (float(self._per_minute), now_s))
        left = min(float(self._per_minute), left + (now_s - at_s) * self._per_minute / 60)
        taken = left >= 1
        self._left[name] = (left - 1 if taken else left, now_s)
        self._left.move_to_end(name)
        if len(self._left) > RATES_MAX:
            self._left.popitem(last=False)
        return 0.0 if taken else (1 - left) * 60 / self._per_minute


class Access:
    """Decides who may use what. Without keys, everybody may use everything."""

    def __init__(self, keys: Iterable[ApiKey], rate: Rate) -> None:
        self._keys = tuple(keys)
        self._rate = rate

    @property
    def needs_key(self) -> bool:
        """Whether only those with a key may use the API."""
        return bool(self._keys)

    def guard(self, connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        """Let a request pass, or raise Refused.

        An operation needs one of the scopes in its ``opt``; without them, the scope to read. Without keys, only
        operations that process are limited: a client is then known by its address alone.
        """
        needed = handler.opt.get(SCOPE, READ)
        if not self._keys:
            if needed == PROCESS:
                client = connection.client.host if connection.client else "unknown"
                self._limit(client, f"The client {client} asks for too much.")
            return
        key = self._find(presented(connection.headers.get("authorization", ""), connection.headers.get(KEY_HEADER, "")))
        if key is None:
            raise Refused(
                status_code=HTTPStatus.UNAUTHORIZED,
                detail=f"This needs an API key, in {KEY_HEADER} or as a bearer token. There is none, or it is unknown.",
                headers={"WWW-Authenticate": 'Bearer realm="tripfold"'},
            )
        self._limit(key.name, f"The key {key.name} is used too often.")
        if not needed & key.scopes:
            scopes = " or ".join(sorted(scope.value for scope in needed))
            raise Refused(
                status_code=HTTPStatus.FORBIDDEN,
                detail=f"This needs a key with the scope {scopes}; {key.name} has not got it.",
            )
        connection.state[CALLER] = key.name

    def _limit(self, name: str, detail: str) -> None:
        wait_s = self._rate.take(name)
        if wait_s:
            seconds = math.ceil(wait_s)
            raise Refused(
                status_code=HTTPStatus.TOO_MANY_REQUESTS,
                detail=f"{detail} Try again in {seconds} s.",
                headers={"Retry-After": str(seconds)},
            )

    def _find(self, key: str) -> ApiKey | None:
        digest = digest_of(key)
        found = None
        for known in self._keys:  # all of them, so that the time tells nothing
            if hmac.compare_digest(known.sha256, digest):
                found = known
        return found


def access_of(settings: Settings) -> Access:
    """Return the access that the settings ask for. Keys that are named are required.

    Raises AccessUnclear if the settings need keys and name none, or name keys and let everybody in.
    """
    rate = Rate(settings.api_requests_per_minute)
    named = bool(settings.api_keys or settings.api_keys_file)
    if settings.api_access == "open" and named:
        raise AccessUnclear(
            f"{PREFIX}API_ACCESS=open lets everybody in, but API keys are named: unset {PREFIX}API_ACCESS to require "
            f"a key, or remove {PREFIX}API_KEYS and {PREFIX}API_KEYS_FILE"
        )
    if settings.api_access != "keys" and not named:
        return Access((), rate)
    lines = settings.api_keys.split(",")
    if settings.api_keys_file:
        try:
            lines += Path(settings.api_keys_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise AccessUnclear(f"{PREFIX}API_KEYS_FILE={settings.api_keys_file!r} cannot be read: {error}") from error
    keys = parse_keys(lines)
    if not keys:
        raise AccessUnclear(
            f"nobody may use the API: name keys in {PREFIX}API_KEYS or {PREFIX}API_KEYS_FILE (`tripfold api-key NAME` "
            f"makes one), or let everybody in with {PREFIX}API_ACCESS=open"
        )
    return Access(keys, rate)


def parse_keys(lines: Iterable[str]) -> tuple[ApiKey, ...]:
    """Read keys, one a line as ``name:scopes:sha256``; empty lines and lines that begin with # are left out.

    Raises AccessUnclear for a line that is none, without repeating it: it might hold a key.
    """
    keys: dict[str, ApiKey] = {}
    for number, line in enumerate(lines, start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise AccessUnclear(
                f"API key {number} cannot be read: expected name:scopes:sha256, where scopes are read, process or "
                "read+process, and sha256 is that of the key, in hexadecimal"
            )
        name, scopes, digest = match.groups()
        if name in keys:
            raise AccessUnclear(f"there are two API keys called {name}: give each a name of its own")
        keys[name] = ApiKey(name=name, scopes=frozenset(Scope(scope) for scope in scopes.split("+")), sha256=digest)
    if len(keys) > KEYS_MAX:
        raise AccessUnclear(f"there are {len(keys)} API keys, and {KEYS_MAX} can be kept")
    return tuple(keys.values())


def mint_key() -> str:
    """Return a new key."""
    return f"tripfold_{secrets.token_urlsafe(32)}"


def digest_of(key: str) -> str:
    """Return what is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def presented(authorization: str, key_header: str) -> str:
    """Return the key that a request comes with, or nothing."""
    scheme, _, token = authorization.partition(" ")
    return key_header or (token.strip() if scheme.lower() == "bearer" else "")
