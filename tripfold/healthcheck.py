"""Exits with 0 if the service in this container is ready: the HEALTHCHECK of the image.

The API listens on one port, every other service on another, so in a container one of the two responds. The command
``tripfold`` would load ten times as much code for each check.
"""

from __future__ import annotations

import http.client
import os
import sys

TIMEOUT_S = 4
PORTS = (("TRIPFOLD_HEALTH_PORT", 8081), ("TRIPFOLD_API_PORT", 8080))


def check() -> str:
    """Return an empty string if a service is ready, or else the reason."""
    reason = "no service listens"
    for variable, default in PORTS:
        connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get(variable, default)), timeout=TIMEOUT_S)
        try:
            connection.request("GET", "/health/ready")
            response = connection.getresponse()
            body = response.read().decode()
        except ConnectionRefusedError:
            continue
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            continue
        return "" if response.status == http.HTTPStatus.OK else body
    return reason


if __name__ == "__main__":
    sys.exit(check() or 0)
