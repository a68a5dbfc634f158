"""The options of ``tripfold verify``."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from tripfold.operate.verify import verify_command


def test_a_metrics_file_that_cannot_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    """A missing directory is named at once, not after hours of verification."""
    with pytest.raises(typer.BadParameter, match=f"cannot write into {tmp_path / 'missing'}: make this directory"):
        verify_command(metrics_file=tmp_path / "missing" / "verify.prom")
