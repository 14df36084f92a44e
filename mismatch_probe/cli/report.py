"""`mismatch-probe report`."""

from __future__ import annotations

import click

import mismatch_probe
from mismatch_probe.cli.compare import (
    extrapolate_option,
    fail_on_option,
    json_option,
    predict_length_option,
    show_result,
)
from mismatch_probe.cli.output import print_json
from mismatch_probe.errors import EXIT_OK


@click.command(epilog="Needs no engine. Exit codes: 0 within limits, 1 error, 2 usage, 3 limit exceeded.")
@click.argument("run", type=click.Path())
@predict_length_option
@extrapolate_option
@fail_on_option
@click.option("--tokens", type=int, metavar="SEQUENCE", help="Print this sequence with every token coloured by |d|.")
@json_option
def command(
    run: str,
    predict_lengths: tuple[int, ...],
    extrapolate: bool | None,
    fail_on: tuple[str, ...],
    tokens: int | None,
    as_json: bool,
) -> int:
    """Computes summary, figures and reports of a finished RUN again, for example with other limits.

    \b
    Examples:
      mismatch-probe report runs/smollm2-135m-20260101-120000 --fail-on 'kl_k3>0.001@bfloat16'
      mismatch-probe report runs/smollm2-135m-20260101-120000 --tokens 12
    """
    if tokens is not None:
        return _show_tokens(run, tokens, as_json)
    result = mismatch_probe.write_report(
        run, fail_on=fail_on, predict_lengths=predict_lengths or None, extrapolate=extrapolate
    )
    return show_result(result, as_json)


def _show_tokens(run: str, sequence_id: int, as_json: bool) -> int:
    """One sequence in every pair of equal dtypes; computes and writes nothing."""
    from dataclasses import asdict

    from rich.console import Console

    from mismatch_probe.report.render.terminal import print_tokens

    found = mismatch_probe.tokens(run, sequence_id)
    if as_json:
        print_json([asdict(sequence) for sequence in found])
        return EXIT_OK
    console = Console()
    for sequence in found:
        print_tokens(sequence, console)
    return EXIT_OK
