"""Decides which redirects of the upstream may be followed, and which hosts may see its credentials. Pure.

httpx follows the redirects to every host or to none.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import httpx

from services.ingest.upstream.errors import PermanentUpstreamError

REDIRECTS_MAX: Final = 5
REDIRECT_STATUSES: Final = frozenset({301, 302, 303, 307, 308})


class RedirectRules:
    """The rules for one upstream: its own origin, and the other ``hosts`` to which it may redirect."""

    def __init__(self, base_url: str, hosts: Collection[str]) -> None:
        self._own = _origin(httpx.URL(base_url))
        self._hosts = frozenset(host.lower() for host in hosts)

    def may_see_credentials(self, url: httpx.URL) -> bool:
        """Tell whether a URL is on the upstream itself, and not on a host to which it redirects."""
        return _origin(url) in {self._own, *_upgraded({self._own})}

    def follow(self, requested: str, at: httpx.URL, location: str) -> httpx.URL:
        """Return the target of a redirect. Raises PermanentUpstreamError if the rules do not allow it.

        ``requested`` is the first URL of the request, and ``at`` the URL that responded with ``location``.
        """
        shown = f"{requested} was redirected to {location[:200]!r}"
        try:
            target = at.join(location)
            host = target.host  # decodes an internationalized name (IDNA), which can be invalid
        except (httpx.InvalidURL, ValueError) as error:
            raise PermanentUpstreamError(f"{shown}, which is no URL") from error
        if target.port == 0:
            raise PermanentUpstreamError(f"{shown}, and no server listens on port 0")
        if target.scheme not in {"http", "https"} or (at.scheme, target.scheme) == ("https", "http"):
            raise PermanentUpstreamError(f"{shown}, which is not as safe")
        known = {_origin(at), _origin(httpx.URL(requested))}
        named = {host, f"{host}:{_origin(target)[1]}"}
        if _origin(target) not in known | _upgraded(known) and not named & self._hosts:
            raise PermanentUpstreamError(f"{shown}, a host that TRIPFOLD_UPSTREAM_REDIRECT_HOSTS does not name")
        return target


def _origin(url: httpx.URL) -> tuple[str, int]:
    return url.host, url.port or (443 if url.scheme == "https" else 80)


def _upgraded(origins: set[tuple[str, int]]) -> set[tuple[str, int]]:
    """Return the HTTPS origins of the hosts that are on the default port of plain HTTP."""
    return {(host, 443) for host, port in origins if port == 80}
