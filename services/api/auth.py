"""Access control: API keys with scopes, and a rate limit for each key, or for each client that processes dates.

The service knows only the SHA-256 of a key. A key has 256 random bits, so a slow password hash is not needed. The keys
can be replaced while the service runs (``key_file.py``).
"""

from __future__ import annotations

import datetime as dt
import enum
import hashlib
import hmac
import math
import re
import secrets
import stat
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
from litestar.types import Scope as LitestarScope

from shared.domain.errors import OperatorError
from shared.domain.ids import utc_now
from shared.domain.requests import Caller
from shared.runtime.settings import PREFIX, Settings

KEY_HEADER = "X-API-Key"
KEYS_MAX = 1_000
UNKNOWN_KEYS_PER_MINUTE = 30
"""The unknown keys of a client address. Beyond them it gets 429; a known key works all the same."""
RATES_MAX = 10_000
ADDRESS_LENGTH_MAX = 100
KEY_FILE_BYTES_MAX = 1024 * 1024
API_KEY = "api_key"
SCOPE = "scope"

_ENTRY = re.compile(
    r"([A-Za-z0-9._-]{1,60}):(read|process|read\+process):([0-9a-f]{64})(?::(\d{4}-\d\d-\d\d(?:T\d\d:\d\d(?::\d\d)?Z)?))?"
)


class Scope(enum.Enum):
    """A permission of a key: to read, or to request processing."""

    READ = "read"
    PROCESS = "process"


READ = frozenset({Scope.READ})
PROCESS = frozenset({Scope.PROCESS})
READ_OR_PROCESS = frozenset(Scope)


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """A stored API key: its name, its scopes, the SHA-256 of the key in hexadecimal, and when it expires, if ever."""

    name: str
    scopes: frozenset[Scope]
    sha256: str
    expires_at: dt.datetime | None = None

    def expired(self, now: dt.datetime) -> bool:
        """Return whether the key has expired."""
        return self.expires_at is not None and self.expires_at <= now


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
    """Decides which operations a client may use.

    ``keys`` is None if every client may use all of them. Without any key in ``keys``, no client may.
    """

    def __init__(
        self, keys: Iterable[ApiKey] | None, rate: RateLimiter, *, clock: Callable[[], dt.datetime] = utc_now
    ) -> None:
        self.needs_key = keys is not None
        self._keys = tuple(keys or ())
        self._rate = rate
        self._unknown = RateLimiter(UNKNOWN_KEYS_PER_MINUTE)
        self._clock = clock

    @property
    def keys(self) -> tuple[ApiKey, ...]:
        """The known keys, expired ones included."""
        return self._keys

    def replace_keys(self, keys: Iterable[ApiKey]) -> None:
        """Know these keys from now on, and no others. Clients need a key even if there is none."""
        self.needs_key = True
        self._keys = tuple(keys)

    def guard(self, connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        """Raise AccessDenied if a request may not use its operation.

        An operation needs one of the scopes in its ``opt``, or the scope to read if it names none. Without keys, the
        rate limit applies only to operations that process, and a client is identified by its address. The state of the
        connection then has the key under API_KEY, also that of a denied request.
        """
        needed = handler.opt.get(SCOPE, READ)
        if not self.needs_key:
            if needed == PROCESS:
                _limit(self._rate, named(caller_of(connection)), "exceeded its rate limit")
            return
        given = key_in_headers(connection.headers.get("authorization", ""), connection.headers.get(KEY_HEADER, ""))
        key = self._find(given)
        if key is None:
            if given:
                _limit(self._unknown, named(caller_of(connection)), "sent too many unknown API keys")
            raise _unauthorized(
                f"The API key is missing or unknown. Send a valid key in {KEY_HEADER} or as a bearer token."
            )
        connection.state[API_KEY] = key
        if key.expired(self._clock()):
            raise _unauthorized(f'Key "{key.name}" expired at {key.expires_at:%Y-%m-%d %H:%M} UTC. Use a new key.')
        _limit(self._rate, named(caller_of(connection)), "exceeded its rate limit")
        if not needed & key.scopes:
            granted = " and ".join(sorted(scope.value for scope in key.scopes))
            needed_text = " or ".join(sorted(f'"{scope.value}"' for scope in needed))
            raise AccessDenied(
                status_code=HTTPStatus.FORBIDDEN,
                detail=f'Key "{key.name}" can only {granted}. Use a key with the {needed_text} scope.',
            )

    def still_allows(self, connection: ASGIConnection[Any, Any, Any, Any]) -> bool:
        """Return whether the key of a request that passed the guard is still known and has not expired."""
        if not self.needs_key:
            return True
        key = connection.state.get(API_KEY)
        return key in self._keys and not key.expired(self._clock())

    def _find(self, key: str) -> ApiKey | None:
        digest = digest_of(key)
        found = None
        for known in self._keys:  # always all keys, so that the time reveals nothing about them
            if hmac.compare_digest(known.sha256, digest):
                found = known
        return found


def _limit(rate: RateLimiter, caller: str, reason: str) -> None:
    """Raise AccessDenied if a caller has no token left."""
    if wait_s := rate.take(caller):
        seconds = math.ceil(wait_s)
        raise AccessDenied(
            status_code=HTTPStatus.TOO_MANY_REQUESTS,
            detail=f"{caller} has {reason}. Try again in {seconds} s.",
            headers={"Retry-After": str(seconds)},
        )


def access_of(settings: Settings, *, clock: Callable[[], dt.datetime] = utc_now) -> Access:
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
        return Access(None, rate)
    keys = read_keys(settings)
    if not keys:
        raise InvalidAccessSettings(
            f"no client can use the API: name keys in {PREFIX}API_KEYS or {PREFIX}API_KEYS_FILE (`tripfold api-key "
            f"NAME` makes one), or open the API to everybody with {PREFIX}API_ACCESS=open"
        )
    return Access(keys, rate, clock=clock)


def read_keys(settings: Settings) -> tuple[ApiKey, ...]:
    """Return the keys of the settings and of the file that they name.

    Raises InvalidAccessSettings if the file cannot be read, or a line is malformed.
    """
    lines = [entry for entry in settings.api_keys.split(",") if entry]
    if settings.api_keys_file:
        try:
            with Path(settings.api_keys_file).open("rb") as file:
                content = file.read(KEY_FILE_BYTES_MAX + 1)
            lines += content.decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise InvalidAccessSettings(
                f"{PREFIX}API_KEYS_FILE={settings.api_keys_file!r} cannot be read: {reason}"
            ) from error
        if len(content) > KEY_FILE_BYTES_MAX:
            raise InvalidAccessSettings(
                f"{PREFIX}API_KEYS_FILE={settings.api_keys_file!r} is longer than {KEY_FILE_BYTES_MAX:,} bytes"
            )
    return parse_keys(lines)


def key_file_is_exposed(settings: Settings) -> bool:
    """Return whether every user of the machine may read or change the file of keys."""
    if not settings.api_keys_file:
        return False
    try:
        return bool(Path(settings.api_keys_file).stat().st_mode & (stat.S_IROTH | stat.S_IWOTH))
    except OSError:
        return False


def parse_keys(lines: Iterable[str]) -> tuple[ApiKey, ...]:
    """Parse keys from lines of ``name:scopes:sha256[:expires]``. Skip empty lines and lines that begin with #.

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
                f"API key {number} cannot be read: expected name:scopes:sha256 or name:scopes:sha256:expires, where "
                "scopes are read, process or read+process, sha256 is the SHA-256 of the key in hexadecimal, and "
                "expires is a time in UTC like 2027-01-31 or 2027-01-31T18:00Z"
            )
        name, scopes, digest, expires = match.groups()
        if name in keys:
            raise InvalidAccessSettings(f"two API keys have the name {name}: give each a different name")
        keys[name] = ApiKey(
            name=name,
            scopes=frozenset(Scope(scope) for scope in scopes.split("+")),
            sha256=digest,
            expires_at=_expiry(name, expires) if expires else None,
        )
    if len(keys) > KEYS_MAX:
        raise InvalidAccessSettings(f"there are {len(keys)} API keys; the limit is {KEYS_MAX}")
    return tuple(keys.values())


def _expiry(name: str, text: str) -> dt.datetime:
    try:
        return dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC)
    except ValueError as error:
        raise InvalidAccessSettings(f"API key {name} expires at {text}, which is no valid time") from error


def caller_of(connection: ASGIConnection[Any, Any, Any, Any]) -> Caller:
    """Return who sent a request: the name of the API key, and the address."""
    key = connection.state.get(API_KEY)
    return Caller(key=key.name if key else "", client=client_address(connection.scope))


def named(by: Caller) -> str:
    """Return how messages call a caller. The limits of each caller go by this name."""
    return f'Key "{by.key}"' if by.key else f"Client {by.client}"


def client_address(scope: LitestarScope) -> str:
    """Return the address of a client, or "unknown" on a socket without addresses."""
    client = scope.get("client")
    return client[0][:ADDRESS_LENGTH_MAX] if client else "unknown"


def _unauthorized(detail: str) -> AccessDenied:
    return AccessDenied(
        status_code=HTTPStatus.UNAUTHORIZED, detail=detail, headers={"WWW-Authenticate": 'Bearer realm="tripfold"'}
    )


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
