"""Loads a command when it is called, so ``tripfold --help`` loads none of them. Typer has no such option."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

HELP_OPTION_NAMES = ["-h", "--help"]


class LazyCommand(msgspec.Struct, frozen=True, kw_only=True):
    """Where a command is, as ``module:name``, and its line in the list of commands.

    The name is that of a function, or of a Typer app that groups several commands.
    """

    target: str
    help: str
    panel: str


class LazyGroup(TyperGroup):
    """A group of commands that also has the commands of ``lazy_commands``, in the order of their panels."""

    lazy_commands: ClassVar[Mapping[str, LazyCommand]] = {}
    panels: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, lazy in self.lazy_commands.items():
            self.add_command(TyperCommand(name, help=lazy.help, rich_help_panel=lazy.panel))
        _tidy_help(self)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help; Typer has added options of its own by now."""
        _tidy_help(self)
        super().format_help(ctx, formatter)

    def list_commands(self, ctx: Any) -> list[str]:
        """List the commands by their panels."""
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: self.panels.index(self._panel_of(name)))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Find the command that the arguments name, and load it."""
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None and name in self.lazy_commands:
            command = self.load(name)
        return name, command, rest

    def load(self, name: str) -> Any:
        """Return a command of ``lazy_commands`` with its parameters."""
        module_name, _, attribute = self.lazy_commands[name].target.partition(":")
        found = getattr(importlib.import_module(module_name), attribute)
        if not isinstance(found, typer.Typer):
            function, found = found, typer.Typer(add_completion=False)
            found.command(name)(function)
        command = get_command(found)
        command.name = name
        _tidy_help(command)
        return command

    def load_all(self) -> None:
        """Load every command, for a program that inspects them."""
        self.commands.update({name: self.load(name) for name in self.lazy_commands})

    def _panel_of(self, name: str) -> str:
        panel = getattr(self.commands[name], "rich_help_panel", None)
        return panel if panel in self.panels else self.panels[-1]


def _tidy_help(command: Any) -> None:
    """Let the terminal wrap each paragraph of a command's help, and show no type for an option without a value.

    Typer keeps the line breaks of a docstring, which is written for 120 columns, and calls such an option ``<bool>``.
    """
    command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in (command.help or "").split("\n\n"))
    help_option = command.get_help_option(typer.Context(command, help_option_names=HELP_OPTION_NAMES))
    for parameter in (*command.params, help_option):
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    for below in getattr(command, "commands", {}).values():
        _tidy_help(below)
