"""`mismatch-probe rl demo`."""

from __future__ import annotations

from typing import Any

import mismatch_probe
from mismatch_probe.cli.options import json_option, out_option, settings_command
from mismatch_probe.cli.output import show_result
from mismatch_probe.cli.progress import shown_progress
from mismatch_probe.rl.config import DemoSettings


@settings_command(
    DemoSettings,
    files=False,
    epilog="Exit codes: 0 done, 1 error or a run failed, 2 usage, 3 a run without injected stress collapsed or "
    "diverged, 130 interrupted (rl sweep --resume goes on).",
)
@out_option("runs/rl-demo-lines-TIME")
@json_option
def command(values: dict[str, Any], out: str | None, as_json: bool) -> int:
    """Three precisions, and BF16 without mismatch, each a short RL fine-tune: does rounding alone do harm?

    Trains a small model that comes with the tool, and whose tokens are so uncertain that rounding in BF16 more than
    halves the effective sample size; within 10 minutes on 2 cores. Writes one report.

    \b
    Example:
      mismatch-probe rl demo --out runs/rl-demo
    """
    with shown_progress("steps") as progress:
        result = mismatch_probe.rl_demo(out=out, progress=progress, **values)
    return show_result(result, as_json)
