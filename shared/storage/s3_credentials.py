"""Credentials from shared files and profiles (``~/.aws``), which obstore does not read.

obstore itself finds credentials in the environment, from a web identity, a container and an instance role. botocore
is imported only if the environment or the home folder has shared files.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from obstore.store import S3Credential

LIFETIME = dt.timedelta(minutes=10)
"""obstore asks again 5 minutes before this ends; botocore renews what expires within 15."""


def uses_shared_files(environment: Mapping[str, str]) -> bool:
    """Tell whether credentials may be in shared files: a profile is named, or a file exists.

    Keys and web identities in the environment come first, as in every AWS client.
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
    """Gives obstore the credentials that botocore finds: in files, from roles, single sign-on or a command."""

    def __init__(self) -> None:
        self._found: Any = None

    def __call__(self) -> S3Credential:
        if self._found is None:
            from botocore.session import Session  # noqa: PLC0415  # see the module's docstring

            self._found = Session().get_credentials()
        if self._found is None:
            raise RuntimeError("no AWS credentials in the environment, in shared files or from a role")
        frozen = self._found.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": dt.datetime.now(dt.UTC) + LIFETIME,
        }
