"""`mismatch-probe`: the commands, each imported only when it is called."""

from __future__ import annotations

import io
import signal
import sys
from types import FrameType
from typing import Any

import click

from mismatch_probe.cli.lazy import LazyGroup
from mismatch_probe.cli.output import printable
from mismatch_probe.errors import EXIT_INTERRUPTED, ProbeError

_COMMANDS = {
    "compare": "How large is the mismatch, per dtype pair?",
    "attribute": "Where does the mismatch come from: which rung, which setting, which layer?",
    "audit": "May this model go into RL, in which precision, with which correction?",
    "ingest": "What does a dump of a framework hold, and what of it cannot be used?",
    "preflight": "Can this checkpoint be compared, and what would surprise its user? Starts no engine.",
    "explain": "What do the metrics that a training run logs say of its mismatch? Needs no tokens.",
    "diagnose": "Is a dump's gap numerics or a bug, and which kind of bug?",
    "report": "Write summary and report of a finished run again, without engines.",
    "plot": "Draw the figures of a finished run again, without engines.",
    "show": "What a run folder is, how far it has come, and what continues it.",
    "runs": "Run folders in a folder: kind, model, date, status, answer.",
    "rl": "What does the mismatch do to training? RL runs with both engines.",
    "models": "Built-in models: list, fetch, locate.",
    "env": "What is installed, and which engines and dtypes are usable here.",
}


@click.group(
    cls=LazyGroup,
    modules=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done and within limits, 1 error, 2 usage, 3 limit exceeded, 130 interrupted.",
)
@click.version_option(package_name="mismatch-probe")
def cli() -> None:
    """Measure how far a rollout engine (vLLM) and a trainer (Hugging Face) disagree about the same tokens.

    \b
    Example:
      mismatch-probe compare --model smollm2-135m
    """


def main(arguments: list[str] | None = None) -> None:
    """Runs a command and ends the process with its exit code. Users' errors are sentences, bugs are tracebacks."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = cli.main(args=arguments, prog_name="mismatch-probe", standalone_mode=False)
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        click.echo(printable(shown.getvalue()), err=True, nl=False)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("Stopped.", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except ProbeError as error:
        click.echo(f"Error: {printable(error.what)}", err=True)
        if error.fix:
            click.echo(f"  {printable(error.fix)}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(number: int, frame: FrameType | None) -> Any:
    """A polite kill ends a run as Ctrl-C does: passes kept, processes ended."""
    raise KeyboardInterrupt
