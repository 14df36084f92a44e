"""`mismatch-probe explain`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

import mismatch_probe
from mismatch_probe.cli.options import json_option
from mismatch_probe.cli.output import print_json
from mismatch_probe.errors import EXIT_OK

if TYPE_CHECKING:
    from mismatch_probe.results.explanation import Explanation


@click.command(epilog="Exit codes: 0 explained, 1 error, 2 usage.")
@click.argument("file", type=click.Path())
@click.option("--audit", type=click.Path(), metavar="PATH", help="audit.json or its folder, to place sizes against.")
@click.option(
    "--pair", metavar="ROLLOUT/TRAINER", help="Pair of the audit.  [default: the pair that its verdict is of]"
)
@click.option("--out", type=click.Path(), metavar="FOLDER", help="Write report.html, report.md and explanation.json.")
@json_option
def command(file: str, audit: str | None, pair: str | None, out: str | None, as_json: bool) -> int:
    """What do the metrics that a training run logs say of its mismatch? Needs no tokens.

    FILE is a log, a pasted line, JSON, JSON Lines, CSV (wandb's export, too), a TensorBoard event file or a folder of
    them; - is standard input. Metrics of TRL, verl, NeMo-RL, prime-rl, slime, miles, SkyRL, open-instruct, OpenRLHF and
    Tinker are known. The report says what each is and how it is biased, places it against published limits, shows its
    course over steps, checks metrics against each other, and names the dump that would settle the cause.

    \b
    Examples:
      mismatch-probe explain train.log
      mismatch-probe explain runs/tensorboard --audit runs/before/audit/audit.json --pair bf16/bf16
      echo "{'sampling/sampling_logp_difference/mean': 0.012}" | mismatch-probe explain -
    """
    if file == "-":
        document = mismatch_probe.explain(sys.stdin.buffer, name="standard input", audit=audit, pair=pair)
    else:
        document = mismatch_probe.explain(file, audit=audit, pair=pair)
    if out is not None:
        _write(document, Path(out))
    if as_json:
        print_json(document.content())
    else:
        from rich.console import Console

        from mismatch_probe.report.explain import explain_report
        from mismatch_probe.report.render.terminal import print_report

        print_report(explain_report(document), Console())
    return EXIT_OK


def _write(document: Explanation, folder: Path) -> None:
    from mismatch_probe.report.explain import explain_report
    from mismatch_probe.report.render import write_report

    document.write(folder / "explanation.json")
    write_report(explain_report(document), {}, folder)
