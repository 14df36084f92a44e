"""A group of commands that knows them by name and loads a command's module when it is asked for: help stays fast."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click


class LazyGroup(click.Group):
    """Commands of modules of `mismatch_probe.cli`, each with an attribute `command`.

    Args:
        modules: By command its line of help; the module is `prefix` and the command's name.
        prefix: What the modules' names begin with.
    """

    def __init__(self, *args: Any, modules: Mapping[str, str], prefix: str = "", **options: Any) -> None:
        super().__init__(*args, **options)
        self._modules, self._prefix = modules, prefix

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._modules:
            return None
        module = f"mismatch_probe.cli.{self._prefix}{cmd_name}".replace("-", "_")
        command: click.Command = importlib.import_module(module).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self._modules.items()))
