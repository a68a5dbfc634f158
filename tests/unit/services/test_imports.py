"""The libraries that services import when they start."""

from __future__ import annotations

import subprocess
import sys

SERVICES = """
import os, sys
import services.aggregate.app, services.api.app, services.ingest.app
from shared.runtime.settings import load_settings
from shared.runtime.tracing import configure_tracing
configure_tracing("tripfold-worker")
settings = load_settings()
services.ingest.app.create_app(settings)
services.aggregate.app.create_app(settings)
unwanted = ("botocore", "opentelemetry", "pyarrow")
print(sorted(name for name in sys.modules if name.split(".")[0] in unwanted), flush=True)
os._exit(0)  # the services were not started, and need no shutdown
"""


def test_a_service_starts_without_libraries_that_few_processes_use() -> None:
    """Services pay nothing for traces that are off, for tables that they do not read or write, and for botocore.

    FastStream looks for an empty package of OpenTelemetry.
    """
    environment = {"TRIPFOLD_API_ACCESS": "open", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    loaded = subprocess.run(
        [sys.executable, "-c", SERVICES], env=environment, check=True, capture_output=True, text=True, timeout=60
    )
    assert loaded.stdout == "['opentelemetry', 'opentelemetry.semconv']\n"
