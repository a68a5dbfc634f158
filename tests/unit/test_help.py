"""The programs that run tests on real servers."""

from __future__ import annotations

import pytest

from tests import apache_kafka, containers


@pytest.mark.parametrize("program", [apache_kafka, containers])
def test_help_starts_no_server(program: object, capsys: pytest.CaptureFixture[str]) -> None:
    """The option --help prints what the program does, and exits before it starts anything."""
    with pytest.raises(SystemExit) as exited:
        program.main(["--help"])  # type: ignore[attr-defined]  # each program has a main
    assert exited.value.code == 0
    assert "ARGUMENTS FOR PYTEST" in capsys.readouterr().out
