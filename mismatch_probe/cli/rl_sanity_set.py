"""`mismatch-probe rl sanity-set`."""

from __future__ import annotations

from typing import Any

import mismatch_probe
from mismatch_probe.cli.options import json_option, only_new, out_option, resume_option, settings_command
from mismatch_probe.cli.output import print_json, show_report
from mismatch_probe.cli.progress import shown_progress
from mismatch_probe.rl.config import SanityConfig


@settings_command(SanityConfig, epilog="Exit codes: 0 done, 1 error, 2 usage, 130 interrupted (--resume goes on).")
@out_option("runs/sanity-set-MODEL-TIME")
@resume_option
@json_option
def command(values: dict[str, Any], out: str | None, resume: str | None, as_json: bool) -> int:
    """Keep the problems that a model solves sometimes: an RL run that is sound must learn all of them.

    The construction of arXiv 2510.26788: 40 samples of each problem, kept where 20 to 80 % of them are right. `rl run`
    on the set passes where its reward exceeds 95 %.

    \b
    Examples:
      mismatch-probe rl sanity-set --task chain
      mismatch-probe rl sanity-set --model ./checkpoint --task math --problems math.jsonl --max-tokens 8192 --chat
      mismatch-probe rl sanity-set --resume runs/sanity-set-chain-20260101-120000
    """
    if resume is not None:
        only_new(values, {"out": out}, "--resume")
    with shown_progress() as progress:
        if resume is not None:
            result = mismatch_probe.rl_sanity_set_resume(resume, progress=progress)
        else:
            result = mismatch_probe.rl_sanity_set(out=out, progress=progress, **values)
    if as_json:
        print_json({"path": str(result.path), **result.document.content()})
    else:
        show_report(result.report(), result.path)
    return 0
