"""`mismatch-probe preflight`."""

from __future__ import annotations

from typing import Any

import click

import mismatch_probe
from mismatch_probe.cli.options import json_option, settings_command
from mismatch_probe.cli.output import print_json
from mismatch_probe.config.commands import PreflightSettings
from mismatch_probe.errors import EXIT_LIMIT, EXIT_OK


@settings_command(
    PreflightSettings, epilog="Exit codes: 0 it can be compared, 1 error, 2 usage, 3 something will fail."
)
@click.argument("model")
@json_option
def command(values: dict[str, Any], model: str, as_json: bool) -> int:
    """Can this checkpoint be compared, and what would surprise its user? Starts no engine.

    Reads headers and configuration, no weights: files, shapes, tokenizer, lengths, declarations that an engine ignores,
    memory. Every command that starts an engine does the same first.

    \b
    Examples:
      mismatch-probe preflight ./my-checkpoint
      mismatch-probe preflight ./my-checkpoint --prompts chats.jsonl --max-tokens 4096 --rollout-dtypes bf16,fp16
    """
    document = mismatch_probe.preflight(model, **values)
    if as_json:
        print_json(document.content())
    else:
        from rich.console import Console

        from mismatch_probe.report.preflight import preflight_report
        from mismatch_probe.report.render.terminal import print_report

        print_report(preflight_report(document), Console())
    return EXIT_LIMIT if document.of("fail") else EXIT_OK
