"""Where the seconds of a whole `compare` go, by phase.

Engine phases are those that the run's manifest keeps; metrics and figures are timed while the report is computed again,
so `rest` is what the command spends outside of passes and report: its own start, prompts, files, the end of processes.

    python benchmarks/compare_phases.py
    python benchmarks/compare_phases.py --model smollm2-135m --num-prompts 2 --max-tokens 4
    python benchmarks/compare_phases.py --before FOLDER    # the same command with the code of another folder, by turns
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import click

_REPORT = """
import json, sys, time
import mismatch_probe.probes.comparison as comparison, mismatch_probe.report.figures as figures
seconds = {}
def timed(module, name, phase):
    before = getattr(module, name)
    def after(*arguments, **options):
        start = time.perf_counter()
        try:
            return before(*arguments, **options)
        finally:
            seconds[phase] = time.perf_counter() - start
    setattr(module, name, after)
timed(comparison, "analyse", "metrics")
timed(figures, "draw", "figures")
comparison.report_run(__import__("pathlib").Path(sys.argv[1]), [], None, None)
print(json.dumps(seconds))
"""
_PARALLEL = ("import",)  # while another process works, but for the first


def run_once(arguments: list[str], code: Path, out: Path) -> dict[str, float]:
    """Seconds of one run by phase, and in all."""
    environment = {**os.environ, "PYTHONPATH": str(code)}
    start = time.perf_counter()
    command = [sys.executable, "-m", "mismatch_probe", "compare", *arguments, "--out", str(out)]
    subprocess.run(command, check=True, env=environment, cwd=code, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    total = time.perf_counter() - start
    found: dict[str, float] = defaultdict(float)
    for name, record in json.loads((out / "manifest.json").read_text())["passes"].items():
        side = "trainer" if name.startswith("hf") else "rollout"
        for phase, seconds in record.get("timings", {}).items():
            if phase not in (*_PARALLEL, "wait"):
                found[f"{side} {phase}"] += seconds
    if code == Path.cwd():
        command = [sys.executable, "-c", _REPORT, str(out)]
        answer = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout
        found |= json.loads(answer.splitlines()[-1])
    found["rest"] = total - sum(found.values())
    return {**found, "total": total}


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--before", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Another checkout.")
@click.option("--repeats", default=1, show_default=True)
@click.argument("arguments", nargs=-1)
def main(before: Path | None, repeats: int, arguments: tuple[str, ...]) -> None:
    """ARGUMENTS go to `compare`."""
    trees = {"after": Path.cwd(), **({"before": before.resolve()} if before is not None else {})}
    runs: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(repeats):
            for name, code in trees.items():
                runs[name].append(run_once(list(arguments), code, Path(scratch) / f"{name}-{repeat}"))
                print(f"{name}: {runs[name][-1]['total']:.1f} s", file=sys.stderr)
    phases = {phase: None for name in runs for run in runs[name] for phase in run}
    print("seconds".ljust(22), *(name.rjust(8) for name in runs))
    for phase in phases:
        cells = [f"{statistics.median(run.get(phase, 0.0) for run in runs[name]):8.1f}" for name in runs]
        print(phase.ljust(22), *cells)
    if before is not None:
        ratios = [
            after["total"] / earlier["total"] for after, earlier in zip(runs["after"], runs["before"], strict=True)
        ]
        print(f"after / before: {statistics.median(ratios):.2f} (n = {repeats})")


if __name__ == "__main__":
    main()
