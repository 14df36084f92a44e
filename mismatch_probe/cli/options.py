"""Options of commands, made of settings: names, types, choices, help and completion come from the fields."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from mismatch_probe.config.settings import Setting, Settings
from mismatch_probe.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


class RunPath(click.Path):
    """A run folder; those under `runs/` complete."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from mismatch_probe.runs.folder import kind_of

        folder = Path(incomplete if incomplete.endswith("/") else Path(incomplete or "runs/x").parent)
        found = [
            CompletionItem(str(path))
            for path in (sorted(folder.iterdir()) if folder.is_dir() else ())
            if str(path).startswith(incomplete) and kind_of(path) is not None
        ]
        return found or [CompletionItem(incomplete, type="dir")]


class _Value(click.ParamType[str]):
    """The text of a value, which its settings check."""

    def __init__(self, of: Setting) -> None:
        self._of = of
        self.name = of.kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        if self._of.kind == "path":
            return [CompletionItem(incomplete, type="file")]
        names = self._of.choices if self._of.known is None else tuple(self._of.known())
        before, comma, last = incomplete.rpartition(",") if self._of.several else ("", "", incomplete)
        return [CompletionItem(f"{before}{comma}{name}") for name in names if name.startswith(last)]


def _option(of: Setting) -> click.Option:
    default = f"  [default: {of.default}]" if of.default else ""
    if of.kind == "flag":
        off = of.flag.replace("--", "--no-", 1)
        return click.Option([f"{of.flag}/{off}", of.name], default=None, help=f"{of.help}{default}")
    return click.Option(
        [of.flag, of.name],
        type=_Value(of),
        multiple=of.several or of.kind == "pairs",
        nargs=of.n,
        metavar=f"{of.metavar},…" if of.several else of.metavar,
        help=f"{of.help}{default}",
    )


class SettingsCommand(click.Command):
    """A command that makes something of settings; its help lists them by group."""

    def __init__(self, *args: Any, settings: type[Settings], **rest: Any) -> None:
        super().__init__(*args, **rest)
        self.settings = settings
        self._sections = {title: [_option(found) for found in group] for title, group in settings.sections().items()}
        self.params += [option for group in self._sections.values() for option in group]

    def sections(self, ctx: click.Context) -> dict[str, Sequence[click.Parameter]]:
        """The command's own options, then settings by group."""
        theirs = {id(option) for group in self._sections.values() for option in group}
        own = [parameter for parameter in self.get_params(ctx) if id(parameter) not in theirs]
        return {"Options": own, **self._sections}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes a section per group."""
        for title, group in self.sections(ctx).items():
            rows = [row for parameter in group if (row := parameter.get_help_record(ctx)) is not None]
            with formatter.section(title):
                formatter.write_dl(rows)


def settings_command(
    settings: type[Settings], *, epilog: str, files: bool = True
) -> Callable[[Callable[..., Any]], click.Command]:
    """Makes a command of a function. Its first argument is what was given: values by name, of the file of `--config`
    and of options, which win; the other arguments are the command's own options.

    Args:
        settings: Whose fields become options.
        epilog: End of the help.
        files: Whether settings are read from and written to files.
    """

    def make(function: Callable[..., Any]) -> click.Command:
        @functools.wraps(function)
        def run(config: str | None = None, save_config: str | None = None, **parameters: Any) -> Any:
            given = {name: parameters.pop(name) for name in settings.model_fields}
            values = {name: value for name, value in given.items() if value is not None and value != ()}
            if config is not None:
                from mismatch_probe.runs.settings import values_from

                values = {**values_from(config, settings), **values}
            asked = settings.of(values)
            if save_config is not None:
                from mismatch_probe.config.toml import toml_of
                from mismatch_probe.files import write_text

                write_text(Path(save_config), toml_of(asked))
            return function({name: getattr(asked, name) for name in values}, **parameters)

        for option in (_save_config, _config) if files else ():
            run = option(run)
        return click.command(cls=SettingsCommand, settings=settings, epilog=epilog)(run)

    return make


_config = click.option("--config", type=RunPath(), help="TOML file or run folder with settings; options win.")
_save_config = click.option(
    "--save-config", type=click.Path(), metavar="FILE", help="Write the settings to a TOML file; defaults as comments."
)


def only_new(values: dict[str, Any], others: dict[str, Any], instead: str) -> None:
    """Checks that nothing is asked for that only a new run can have.

    Args:
        values: Settings that were given.
        others: Further options, by name.
        instead: The option or argument that names the run.

    Raises:
        UsageError: Something is.
    """
    given = [*values, *(name for name, value in others.items() if value not in (None, False, ()))]
    if given:
        raise UsageError(
            f"{_flag(given[0])} cannot be combined with {instead}: it applies only to new runs.", "Leave it out."
        )


def run_asked(
    values: dict[str, Any], source: str | None, resume: str | None, own: Iterable[str], others: dict[str, Any]
) -> str | None:
    """The run that `--from` or `--resume` names; None where a new one is asked for.

    Args:
        values: Settings that were given.
        source: The run of `--from`.
        resume: The run of `--resume`.
        own: Settings that apply to a run that is there.
        others: Further options that do not.

    Raises:
        UsageError: Both are given, or something that only a new run can have.
    """
    if source is not None and resume is not None:
        raise UsageError(
            "--from and --resume cannot be combined.",
            "Use --from to take a run as it is, --resume to run missing passes.",
        )
    path = source or resume
    if path is not None:
        only_new({name: value for name, value in values.items() if name not in own}, others, "--from or --resume")
    return path


def run_of_source(values: dict[str, Any]) -> str | None:
    """Takes the run of `--from` out of the settings; None where there is none, or it is a dump."""
    from mismatch_probe.runs.folder import DUMP, kind_of

    source = values.get("source")
    return None if source is None or kind_of(Path(source)) in (None, DUMP) else str(values.pop("source"))


def _flag(name: str) -> str:
    context = click.get_current_context(silent=True)
    parameters = () if context is None else context.command.params
    return next((max(one.opts, key=len) for one in parameters if one.name == name), f"--{name}")


def out_option(default: str) -> Callable[[F], F]:
    """`--out`."""
    return click.option("-o", "--out", type=click.Path(), help=f"New folder.  [default: {default}]")


resume_option = click.option(
    "--resume", type=RunPath(), metavar="RUN", help="Run what is missing of this run; what is finished is kept."
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout; all else on stderr.")
run_argument = click.argument("run", type=RunPath())
