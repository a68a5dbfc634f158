"""The ``tripfold`` command: its help, and the loading of its commands."""

from __future__ import annotations

import asyncio
import datetime as dt
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from services.api.auth import Scope, digest_of, parse_keys
from tripfold import cli
from tripfold.cli import Commands, loaded_commands

HEAVY = ("aiokafka", "aioboto3", "obstore", "litestar", "faststream", "pydantic", "services.aggregate", "services.api")


async def test_help_loads_no_heavy_module() -> None:
    """``tripfold --help`` answers at once: it loads no library of Kafka, S3 or HTTP, and no service."""
    script = (
        "import sys; from typer.testing import CliRunner; from tripfold import cli;"
        "assert CliRunner().invoke(cli.app, ['--help']).exit_code == 0;"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert out.decode().strip() == "[]"


@pytest.mark.parametrize("name", Commands.lazy_commands)
def test_lazy_command_shows_its_own_help(name: str) -> None:
    """Each command that is loaded when it is called has its help, with an example or a list of commands."""
    result = CliRunner().invoke(cli.app, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert "Example: tripfold" in result.output or "Commands" in result.output


def test_help_lists_every_command_with_a_line() -> None:
    """The list of commands has a line for each command, in the panel of its purpose."""
    output = CliRunner().invoke(cli.app, ["--help"], env={"COLUMNS": "100"}).output
    assert [name for name in loaded_commands().commands if f"│ {name} " not in output] == []
    assert [panel for panel in Commands.panels if f"─ {panel} ─" not in output] == []


def commands_below(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Yield every command, with the words that call it."""
    yield name, command
    for below, one in getattr(command, "commands", {}).items():
        yield from commands_below(f"{name} {below}".strip(), one)


def test_every_command_has_a_short_help_option() -> None:
    """``-h`` prints the same as ``--help``, of each command."""
    for words in ("", "serve", "serve ingest", "backfills", "backfills list", "verify", "dead-letters show"):
        short, long = (CliRunner().invoke(cli.app, [*words.split(), option]) for option in ("-h", "--help"))
        assert (short.exit_code, short.output) == (0, long.output), words
        assert "-h" in short.output
        assert "<bool>" not in short.output  # an option without a value has no type


def test_help_fits_a_terminal_of_80_columns() -> None:
    """Paragraphs wrap at the width of the terminal."""
    output = CliRunner().invoke(cli.app, ["gc", "--help"], env={"COLUMNS": "80"}).output
    lines = [line.strip() for line in output.splitlines()]
    assert "have an age of their own, TRIPFOLD_QUARANTINE_DAYS." in lines


def test_every_option_names_the_form_of_its_value() -> None:
    """No option or argument has a value that the help calls by a type of Python, such as TEXT."""
    types = {
        f"{words} {param.name}"
        for words, command in commands_below("", loaded_commands())
        for param in command.params
        if not getattr(param, "is_flag", False) and param.metavar is None and not param.type_descriptor.is_choice
    }
    assert types == set()


def test_error_shows_text_that_looks_like_markup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error shows a value as it was given, also if it looks like markup."""
    monkeypatch.setattr(sys, "argv", ["tripfold", "request", "[bold]x"])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert "'[bold]x'" in capsys.readouterr().err


def test_an_api_key_is_printed_with_an_entry_that_the_api_reads() -> None:
    """The entry has the name, the scopes, the digest of the key and its expiry."""
    arguments = ["api-key", "nightly", "--scope", "process", "--expires", "2027-01-31"]
    output = CliRunner().invoke(cli.app, arguments).output
    key, entry = (line.rpartition(": ")[2] for line in output.strip().splitlines())
    (read,) = parse_keys([entry])
    assert (read.name, read.scopes, read.sha256) == ("nightly", frozenset({Scope.PROCESS}), digest_of(key))
    assert read.expires_at == dt.datetime(2027, 1, 31, tzinfo=dt.UTC)


def test_unknown_command_names_similar_ones() -> None:
    """A misspelt command fails with the commands that it resembles."""
    result = CliRunner().invoke(cli.app, ["verfy"])
    assert result.exit_code == 2
    assert "verify" in result.output
