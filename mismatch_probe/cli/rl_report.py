"""`mismatch-probe rl report`."""

from __future__ import annotations

from typing import Any

import mismatch_probe
from mismatch_probe.cli.options import json_option, run_argument, settings_command
from mismatch_probe.cli.output import show_result
from mismatch_probe.rl.config import PlaceSettings


@settings_command(PlaceSettings, files=False, epilog="Needs no engine. Exit codes: as those of the sweep or run.")
@run_argument
@json_option
def command(values: dict[str, Any], run: str, as_json: bool) -> int:
    """Computes the report of a sweep or an RL run in RUN again. A sweep can have your own model placed among its arms.

    \b
    Example:
      mismatch-probe rl report runs/rl-demo --place runs/my-model --planned-tokens 2048
    """
    result = mismatch_probe.rl_report(run, **values)
    return show_result(result, as_json)
