"""`mismatch-probe diagnose`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import mismatch_probe
from mismatch_probe.cli.options import json_option, settings_command
from mismatch_probe.cli.output import print_json
from mismatch_probe.config.commands import DiagnoseSettings
from mismatch_probe.errors import EXIT_LIMIT, EXIT_OK

if TYPE_CHECKING:
    from mismatch_probe.results.diagnosis import Diagnosis


@settings_command(
    DiagnoseSettings, epilog="Exit codes: 0 no fault found, 1 error, 2 usage, 3 a fault, 130 interrupted.", files=False
)
@click.argument("dump")
@click.option(
    "--audit", type=click.Path(), metavar="PATH", help="audit.json of the model or its folder, as a baseline."
)
@click.option(
    "--pair", metavar="ROLLOUT/TRAINER", help="Pair of the audit.  [default: the pair that its verdict is of]"
)
@click.option("--strict", is_flag=True, help="Exit with 3 as well where it cannot be told.")
@click.option("--out", type=click.Path(), metavar="FOLDER", help="Write report.html, report.md and diagnosis.json.")
@json_option
def command(
    values: dict[str, Any], dump: str, audit: str | None, pair: str | None, strict: bool, out: str | None, as_json: bool
) -> int:
    """Is this gap numerics or a bug, and which kind of bug?

    DUMP is a dump of a framework with log-probs of both sides, the folder of `ingest`, or that of `compare --from` a
    dump. Signatures of known faults compete for its tokens; what one explains is taken off, and the rest is looked at
    again. The answer names the class that tables can tell apart, the tokens that show it, its usual causes and the fix.

    \b
    Examples:
      mismatch-probe diagnose token_exports/
      mismatch-probe diagnose rollouts.jsonl --audit runs/before/audit --pair bf16/bf16
    """
    from mismatch_probe.cli.progress import shown_progress

    with shown_progress() as progress:
        document = mismatch_probe.diagnose(dump, audit=audit, pair=pair, progress=progress, **values)
    if out is not None:
        _write(document, Path(out))
    if as_json:
        print_json(document.content())
    else:
        from rich.console import Console

        from mismatch_probe.report.diagnose import diagnosis_report
        from mismatch_probe.report.render.terminal import print_report

        print_report(diagnosis_report(document), Console())
    failed = document.outcome == "fault" or (strict and document.outcome == "cannot-tell")
    return EXIT_LIMIT if failed else EXIT_OK


def _write(document: Diagnosis, folder: Path) -> None:
    from mismatch_probe.report.diagnose import diagnosis_report
    from mismatch_probe.report.render import write_report

    document.write(folder / "diagnosis.json")
    write_report(diagnosis_report(document), {}, folder)
