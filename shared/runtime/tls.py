"""TLS as a client: whose certificates are trusted, and the one that is shown."""

from __future__ import annotations

import ssl

from shared.runtime.settings import InvalidSettings


def client_context(ca_file: str, *, certificate_file: str = "", key_file: str = "") -> ssl.SSLContext:
    """Return a context that verifies the server's name and certificate: TLS 1.2 or later.

    It trusts the authorities in ``ca_file`` (PEM) alone, or the system's if that is empty, and shows the
    certificate in ``certificate_file`` (PEM, with its chain) if there is one; ``key_file`` may be the same file.
    Raises InvalidSettings if a file cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise InvalidSettings(f"the certificates in {ca_file} cannot be used: {error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if certificate_file:
        try:
            context.load_cert_chain(certificate_file, key_file or None)
        except (OSError, ssl.SSLError) as error:
            raise InvalidSettings(f"the certificate in {certificate_file} cannot be used: {error}") from error
    return context
