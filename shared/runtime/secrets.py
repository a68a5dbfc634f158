"""Secrets that are kept in files, as orchestrators mount them.

pydantic-settings reads a folder of files named like the settings. It has no ``<NAME>_FILE``, and no bound on a file.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import SecretStr

from shared.runtime.settings import InvalidSettings

SECRET_MAX_BYTES = 64 * 1024


def either_secret(given: SecretStr, path: str, variable: str) -> str:
    """Return what stands in the file, if there is one, or else the secret that was given by itself.

    Raises InvalidSettings as `read_secret` does.
    """
    return read_secret(path, variable) if path else given.get_secret_value()


def read_secret(path: str, variable: str) -> str:
    """Return what stands in a file, without the line break at its end.

    Raises InvalidSettings, which names ``variable`` and never the content, if the file cannot be read, is empty,
    is no UTF-8 or is longer than a secret is.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(SECRET_MAX_BYTES + 1)
    except OSError as error:
        raise InvalidSettings(f"{variable}={path!r}: the file cannot be read: {error.strerror}") from error
    if len(content) > SECRET_MAX_BYTES:
        raise InvalidSettings(f"{variable}={path!r}: the file is longer than a secret is")
    try:
        secret = content.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise InvalidSettings(f"{variable}={path!r}: the file holds no UTF-8 text") from None
    if not secret:
        raise InvalidSettings(f"{variable}={path!r}: the file is empty")
    return secret
