"""`mismatch-probe ingest`."""

from __future__ import annotations

from typing import Any

import click

import mismatch_probe
from mismatch_probe.cli.options import json_option, out_option, settings_command
from mismatch_probe.cli.output import print_json
from mismatch_probe.config import DumpSettings
from mismatch_probe.errors import EXIT_OK


@settings_command(DumpSettings, epilog="Exit codes: 0 done, 1 error, 2 usage, 130 interrupted.", files=False)
@click.argument("dump")
@out_option("runs/DUMP-TIME")
@json_option
def command(values: dict[str, Any], dump: str, out: str | None, as_json: bool) -> int:
    """What does a dump of a framework hold, and what of it cannot be used?

    Reads a file or a folder with many steps and ranks into one Parquet file, a row per sequence, and says what cannot
    be log-probs or does not line up. `compare --from` and `audit --from` take its folder, or the dump itself.

    \b
    Examples:
      mismatch-probe ingest token_exports/ --out runs/export
      mismatch-probe ingest rollouts.jsonl --map output_ids=response_token_ids,old_lp=rollout_logprobs
      mismatch-probe ingest rollout_data/ --trust-pickle
    """
    from mismatch_probe.cli.progress import shown_progress

    with shown_progress() as progress:
        found = mismatch_probe.read_dump(dump, out=out, progress=progress, **values)
    if as_json:
        print_json(found.document.content())
    else:
        from rich.console import Console

        from mismatch_probe.report.recorded import ingest_report
        from mismatch_probe.report.render.terminal import print_report

        print_report(ingest_report(found.document, found.path), Console())
    click.echo(f"Report: {found.path / 'report.html'}", err=True)
    return EXIT_OK
