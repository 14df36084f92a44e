"""`mismatch-probe rl gradient`."""

from __future__ import annotations

from typing import Any

import mismatch_probe
from mismatch_probe.cli.options import (
    json_option,
    out_option,
    resume_option,
    run_asked,
    run_of_source,
    settings_command,
)
from mismatch_probe.cli.output import print_json, show_report
from mismatch_probe.cli.progress import shown_progress
from mismatch_probe.config import GradientOptions
from mismatch_probe.config.commands import GradientSettings


@settings_command(GradientSettings, epilog="Exit codes: 0 done, 1 error, 2 usage, 130 interrupted (--resume goes on).")
@out_option("runs/MODEL-TIME")
@resume_option
@json_option
def command(values: dict[str, Any], out: str | None, resume: str | None, as_json: bool) -> None:
    """What does the mismatch do to the policy gradient of a batch?

    Takes the rollouts and log-probs of a finished run (--from), or runs `compare` first, adds one backward pass of the
    trainer in FP32 per sequence and weighting, and compares the gradient under each correction with the
    reference: weights π/μ per sequence, π by the FP32 trainer. No task is needed: advantages are synthetic.

    \b
    Examples:
      mismatch-probe rl gradient --from runs/smollm2-135m-20260101-120000
      mismatch-probe rl gradient --model ./my-checkpoint --num-prompts 32 --max-tokens 128
      mismatch-probe rl gradient --from my-rollouts.jsonl --model ./my-checkpoint
      mismatch-probe rl gradient --resume runs/smollm2-135m-20260101-120000
    """
    from mismatch_probe.report.gradient import gradient_report

    source = run_of_source(values)
    path = run_asked(values, source, resume, GradientOptions.model_fields, {"out": out})
    with shown_progress("sequences") as progress:
        if path is not None:
            result = mismatch_probe.Run.open(path).gradient(engines=source is None, progress=progress, **values)
        else:
            result = mismatch_probe.rl_gradient(out=out, progress=progress, **values)
    if as_json:
        print_json(result.document.content())
    else:
        show_report(gradient_report(result.document), result.path / "gradient")
