"""`mismatch-probe audit`."""

from __future__ import annotations

from typing import Any

import click

import mismatch_probe
from mismatch_probe.cli.options import (
    json_option,
    out_option,
    resume_option,
    run_asked,
    run_of_source,
    settings_command,
)
from mismatch_probe.cli.output import print_json
from mismatch_probe.cli.progress import shown_progress
from mismatch_probe.config import AuditOptions
from mismatch_probe.config.commands import AuditSettings
from mismatch_probe.errors import EXIT_LIMIT, EXIT_OK


@settings_command(
    AuditSettings,
    epilog="Exit codes: 0 ok or warn, 1 error, 2 usage, 3 fail, inconclusive or worse than the baseline (--strict: a "
    "warning, too), 130 interrupted.",
)
@out_option("runs/MODEL-TIME")
@resume_option
@json_option
def command(values: dict[str, Any], resume: str | None, out: str | None, as_json: bool) -> int:
    """May this model go into RL, in which precision, with which correction?

    Runs `compare`, measures what FP16 can hold of the model (activations, weights, gradients, a real forward and
    backward pass) and how far a 16-bit engine lags behind its trainer, and judges every precision pair. With --from
    RUN it judges a finished run without engines.

    \b
    Examples:
      mismatch-probe audit --model ./my-checkpoint --planned-tokens 4096
      mismatch-probe audit --model ./my-checkpoint --pair bf16/bf16 --profile nemo-rl --strict
      mismatch-probe audit --from runs/smollm2-135m-20260101-120000
      mismatch-probe audit --model ./my-checkpoint --baseline runs/before/audit/audit.json
    """
    from rich.console import Console

    from mismatch_probe.report.audit import audit_report
    from mismatch_probe.report.render.terminal import print_report

    source = run_of_source(values)
    path = run_asked(values, source, resume, {*AuditOptions.model_fields, "baseline"}, {"out": out})
    with shown_progress() as progress:
        if path is not None:
            run = mismatch_probe.Run.open(path)
            result = run.audit(engines=source is None, progress=progress, **values)
        else:
            result = mismatch_probe.audit(out=out, progress=progress, **values)
    if as_json:
        print_json(result.audit.content())
    else:
        print_report(audit_report(result.audit, result.path), Console())
    click.echo(f"Report: {result.path / 'audit' / 'report.html'}", err=True)
    return EXIT_LIMIT if result.failed else EXIT_OK
