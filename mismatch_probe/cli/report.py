"""`mismatch-probe report`."""

from __future__ import annotations

from typing import Any

import click

import mismatch_probe
from mismatch_probe.cli.compare import show_result
from mismatch_probe.cli.options import json_option, run_argument, settings_command
from mismatch_probe.cli.output import print_json
from mismatch_probe.config.commands import ReportSettings
from mismatch_probe.errors import EXIT_OK


@settings_command(
    ReportSettings, epilog="Needs no engine. Exit codes: 0 within limits, 1 error, 2 usage, 3 limit exceeded."
)
@run_argument
@click.option("--tokens", type=int, metavar="SEQUENCE", help="Print this sequence with every token coloured by |d|.")
@json_option
def command(values: dict[str, Any], run: str, tokens: int | None, as_json: bool) -> int:
    """Computes summary, figures and reports of a finished RUN again, for example with other limits.

    \b
    Examples:
      mismatch-probe report runs/smollm2-135m-20260101-120000 --fail-on 'kl_k3>0.001@bfloat16'
      mismatch-probe report runs/smollm2-135m-20260101-120000 --tokens 12
    """
    opened = mismatch_probe.Run.open(run)
    if tokens is not None:
        return _show_tokens(opened, tokens, as_json)
    return show_result(opened.report(**values).result, as_json)


def _show_tokens(run: mismatch_probe.Run, sequence_id: int, as_json: bool) -> int:
    """One sequence in every pair of equal dtypes; computes and writes nothing."""
    from dataclasses import asdict

    from rich.console import Console

    from mismatch_probe.report.render.terminal import print_tokens

    found = run.tokens(sequence_id)
    if as_json:
        print_json([asdict(sequence) for sequence in found])
        return EXIT_OK
    console = Console()
    for sequence in found:
        print_tokens(sequence, console)
    return EXIT_OK
