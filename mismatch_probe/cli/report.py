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


@click.command(epilog="Needs no engine. Exit codes: 0 within limits, 1 error, 2 usage, 3 limit exceeded.")
@click.argument("run", type=click.Path())
@predict_length_option
@extrapolate_option
@fail_on_option
@json_option
def command(
    run: str, predict_lengths: tuple[int, ...], extrapolate: bool | None, fail_on: tuple[str, ...], as_json: bool
) -> int:
    """Computes summary, figures and reports of a finished RUN again, for example with other limits.

    \b
    Example:
      mismatch-probe report runs/smollm2-135m-20260101-120000 --fail-on 'kl_k3>0.001@bfloat16'
    """
    result = mismatch_probe.write_report(
        run, fail_on=fail_on, predict_lengths=predict_lengths or None, extrapolate=extrapolate
    )
    return show_result(result, as_json)
