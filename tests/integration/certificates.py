"""A certificate authority for tests, and the certificates that it issues."""

from __future__ import annotations

import ssl
from pathlib import Path

import trustme

HOST = "127.0.0.1"


class Certificates:
    """An authority, files that hold its certificate and a client's, and a context for a server."""

    def __init__(self, folder: Path) -> None:
        self._authority = trustme.CA()
        self.ca_file = folder / "authority.pem"
        self._authority.cert_pem.write_to_path(self.ca_file)
        self.client_file = folder / "client.pem"
        self._authority.issue_cert("client@example.com").private_key_and_cert_chain_pem.write_to_path(self.client_file)

    def server(self, *, asks_for_a_certificate: bool = False) -> ssl.SSLContext:
        """Return the context of a server on the loopback address."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._authority.issue_cert(HOST).configure_cert(context)
        if asks_for_a_certificate:
            self._authority.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def server_pem(self) -> bytes:
        """Return the private key and the certificate of a server on the loopback address."""
        return self._authority.issue_cert(HOST).private_key_and_cert_chain_pem.bytes()
