"""What a run leaves behind: summary, figures and reports, written from what was computed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pandas as pd

from mismatch_probe.files import write_text
from mismatch_probe.report.data import ReportData
from mismatch_probe.results.comparison import Comparison
from mismatch_probe.runs.comparison import RunDirectory


def summary_frame(summary: Comparison) -> pd.DataFrame:
    """The pairs' metrics flat, a row per pair and metric: what `summary.csv` holds."""
    about = ["rollout_pass", "trainer_pass", "rollout_dtype", "trainer_dtype", "trainer_mode", "on_policy"]
    about += ["n_tokens", "n_sequences", "n_nonfinite", "n_excluded"]
    rows = [
        {**{name: getattr(pair, name) for name in about}, "metric": key, **asdict(value)}
        for pair in summary.pairs
        for key, value in pair.metrics.items()
    ]
    return pd.DataFrame(rows, columns=[*about, "metric", "value", "ci_low", "ci_high", "why"])


def write_outputs(run: RunDirectory, data: ReportData) -> dict[str, Path]:
    """Writes summary, figures and reports into the run's folder; returns the figures."""
    from mismatch_probe.report.compare import compare_report
    from mismatch_probe.report.render.files import write_report

    data.summary.write(run.path / "summary.json")
    write_text(run.path / "summary.csv", summary_frame(data.summary).to_csv(index=False, lineterminator="\n"))
    figures = draw_figures(run, data)
    write_report(compare_report(data), figures, run.path)
    return figures


def draw_figures(run: RunDirectory, data: ReportData) -> dict[str, Path]:
    """Draws every figure into `figures/`."""
    from mismatch_probe.report.figures import draw

    return draw(data, run.path / "figures")
