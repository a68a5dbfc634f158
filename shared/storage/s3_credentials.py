"""AWS credentials from shared files and profiles (``~/.aws``), which obstore does not read.

obstore itself reads credentials from the environment, a web identity, a container or an instance role. botocore is
imported only if shared files exist or the environment names a profile.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from obstore.store import S3Credential

LIFETIME = dt.timedelta(minutes=10)
"""obstore asks again 5 minutes before this ends; botocore renews credentials that expire within 15 minutes."""


def uses_shared_files(environment: Mapping[str, str]) -> bool:
    """Return whether credentials may be in shared files: a profile is named, or a file exists.

    Keys and web identities in the environment have precedence, as in every AWS client.
    """
    if environment.get("AWS_ACCESS_KEY_ID") or environment.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
        return False
    if environment.get("AWS_PROFILE") or environment.get("AWS_DEFAULT_PROFILE"):
        return True
    files = (
        environment.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials",
        environment.get("AWS_CONFIG_FILE") or "~/.aws/config",
    )
    return any(Path(file).expanduser().exists() for file in files)


class SharedFileCredentials:
    """Provides obstore with botocore's credentials: from files, roles, single sign-on or a command."""

    def __init__(self) -> None:
        self._found: Any = None

    def __call__(self) -> S3Credential:
        if self._found is None:
            from botocore.session import Session  # noqa: PLC0415  # see the module's docstring

            self._found = Session().get_credentials()
        if self._found is None:
            raise RuntimeError(
                "no AWS credentials in the environment, shared files or a role; set AWS_ACCESS_KEY_ID or AWS_PROFILE"
            )
        frozen = self._found.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": dt.datetime.now(dt.UTC) + LIFETIME,
        }
