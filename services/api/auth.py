"""Access control: API keys with scopes, and a rate limit for each key, or for each client that processes dates.

The service knows only the SHA-256 of a key. A key has 256 random bits, so a slow password hash is not needed.
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
    """A permission of a key: to read, or to request processing."""

    READ = "read"
    PROCESS = "process"


READ = frozenset({Scope.READ})
PROCESS = frozenset({Scope.PROCESS})
READ_OR_PROCESS = frozenset(Scope)


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """A stored API key: its name, its scopes, and the SHA-256 of the key in hexadecimal."""

    name: str
    scopes: frozenset[Scope]
    sha256: str


class InvalidAccessSettings(OperatorError):
    """The settings do not say who may use the API. The message names the remedy."""


class AccessDenied(HTTPException):
    """The client may not use the operation: 401, 403 or 429."""


class RateLimiter:
    """A token bucket for each key or client, which holds the tokens of a minute at most.

    Litestar's rate limit middleware runs before the guard identifies the key, and stores the time of each request.
    """

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str) -> float:
        """Take a token of this name; return 0, or the seconds until the next token if there is none."""
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
    """Decides which operations a client may use. Without keys, every client may use all of them."""

    def __init__(self, keys: Iterable[ApiKey], rate: RateLimiter) -> None:
        self._keys = tuple(keys)
        self._rate = rate

    @property
    def needs_key(self) -> bool:
        """Whether clients need a key."""
        return bool(self._keys)

    def guard(self, connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        """Raise AccessDenied if a request may not use its operation.

        An operation needs one of the scopes in its ``opt``, or the scope to read if it names none. Without keys, the
        rate limit applies only to operations that process, and a client is identified by its address.
        """
        needed = handler.opt.get(SCOPE, READ)
        if not self._keys:
            if needed == PROCESS:
                client = connection.client.host if connection.client else "unknown"
                self._limit(client, f"Client {client} has exceeded its rate limit.")
            return
        key = self._find(
            key_in_headers(connection.headers.get("authorization", ""), connection.headers.get(KEY_HEADER, ""))
        )
        if key is None:
            raise AccessDenied(
                status_code=HTTPStatus.UNAUTHORIZED,
                detail=f"The API key is missing or unknown. Send a valid key in {KEY_HEADER} or as a bearer token.",
                headers={"WWW-Authenticate": 'Bearer realm="tripfold"'},
            )
        self._limit(key.name, f'Key "{key.name}" has exceeded its rate limit.')
        if not needed & key.scopes:
            granted = " and ".join(sorted(scope.value for scope in key.scopes))
            needed_text = " or ".join(sorted(f'"{scope.value}"' for scope in needed))
            raise AccessDenied(
                status_code=HTTPStatus.FORBIDDEN,
                detail=f'Key "{key.name}" can only {granted}. Use a key with the {needed_text} scope.',
            )
        connection.state[CALLER] = key.name

    def _limit(self, name: str, detail: str) -> None:
        wait_s = self._rate.take(name)
        if wait_s:
            seconds = math.ceil(wait_s)
            raise AccessDenied(
                status_code=HTTPStatus.TOO_MANY_REQUESTS,
                detail=f"{detail} Try again in {seconds} s.",
                headers={"Retry-After": str(seconds)},
            )

    def _find(self, key: str) -> ApiKey | None:
        digest = digest_of(key)
        found = None
        for known in self._keys:  # always all keys, so that the time reveals nothing about them
            if hmac.compare_digest(known.sha256, digest):
                found = known
        return found


def access_of(settings: Settings) -> Access:
    """Return the access control of the settings. If they name keys, clients need one.

    Raises InvalidAccessSettings if the settings require keys and name none, or name keys and open the API to everybody.
    """
    rate = RateLimiter(settings.api_requests_per_minute)
    named = bool(settings.api_keys or settings.api_keys_file)
    if settings.api_access == "open" and named:
        raise InvalidAccessSettings(
            f"{PREFIX}API_ACCESS=open opens the API to everybody, but API keys are named: unset {PREFIX}API_ACCESS to "
            f"require a key, or remove {PREFIX}API_KEYS and {PREFIX}API_KEYS_FILE"
        )
    if settings.api_access != "keys" and not named:
        return Access((), rate)
    lines = settings.api_keys.split(",")
    if settings.api_keys_file:
        try:
            lines += Path(settings.api_keys_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidAccessSettings(
                f"{PREFIX}API_KEYS_FILE={settings.api_keys_file!r} cannot be read: {error}"
            ) from error
    keys = parse_keys(lines)
    if not keys:
        raise InvalidAccessSettings(
            f"no client can use the API: name keys in {PREFIX}API_KEYS or {PREFIX}API_KEYS_FILE (`tripfold api-key "
            f"NAME` makes one), or open the API to everybody with {PREFIX}API_ACCESS=open"
        )
    return Access(keys, rate)


def parse_keys(lines: Iterable[str]) -> tuple[ApiKey, ...]:
    """Parse keys from lines of ``name:scopes:sha256``. Skip empty lines and lines that begin with #.

    Raises InvalidAccessSettings for a malformed line. The message does not repeat the line, which might have a key.
    """
    keys: dict[str, ApiKey] = {}
    for number, line in enumerate(lines, start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise InvalidAccessSettings(
                f"API key {number} cannot be read: expected name:scopes:sha256, where scopes are read, process or "
                "read+process, and sha256 is the SHA-256 of the key in hexadecimal"
            )
        name, scopes, digest = match.groups()
        if name in keys:
            raise InvalidAccessSettings(f"two API keys have the name {name}: give each a different name")
        keys[name] = ApiKey(name=name, scopes=frozenset(Scope(scope) for scope in scopes.split("+")), sha256=digest)
    if len(keys) > KEYS_MAX:
        raise InvalidAccessSettings(f"there are {len(keys)} API keys; the limit is {KEYS_MAX}")
    return tuple(keys.values())


def mint_key() -> str:
    """Return a new key."""
    return f"tripfold_{secrets.token_urlsafe(32)}"


def digest_of(key: str) -> str:
    """Return the SHA-256 of a key in hexadecimal, as the settings hold it."""
    return hashlib.sha256(key.encode()).hexdigest()


def key_in_headers(authorization: str, key_header: str) -> str:
    """Return the key in the headers of a request, or an empty string."""
    scheme, _, token = authorization.partition(" ")
    return key_header or (token.strip() if scheme.lower() == "bearer" else "")
