"""From a run's tables to its summary and its report. No engine: `compare`, `report` and `plot` all end here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from mismatch_probe.config import CompareConfig, Limit
from mismatch_probe.errors import TableError
from mismatch_probe.files import write_json, write_text
from mismatch_probe.metrics import curves
from mismatch_probe.metrics.accumulate import PairSums, accumulate
from mismatch_probe.metrics.frame import null_of, pair_chunks, pass_sequences
from mismatch_probe.metrics.sample import count_nonfinite
from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.probes.findings import findings
from mismatch_probe.probes.planning import TrainerPass, null_pass_id, rollout_pass_id, trainer_passes
from mismatch_probe.report.data import Curves, ReportData, WorstToken
from mismatch_probe.tables import SCHEMA_VERSION, RunDirectory
from mismatch_probe.types import MetricValue

_CONTEXT_TOKENS = 16


def analyse(run: RunDirectory, limits: Sequence[Limit] = ()) -> ReportData:
    """Computes everything that is shown of a run, from its tables alone.

    Args:
        run: A run directory; passes that are missing leave their cells empty, with the reason.
        limits: What `--fail-on` asked for.

    Raises:
        TableError: A table is missing or corrupt, or nothing can be compared.
    """
    config = CompareConfig.from_dict(run.manifest["config"])
    nulls = {name: null for name in run.finished_passes() if (null := _null_row(run, name)) is not None}
    pairs: list[dict[str, Any]] = []
    missing: list[dict[str, Any]] = []
    diagonal: dict[str, PairSums] = {}
    metrics_of: dict[str, dict[str, MetricValue]] = {}
    for dtype in config.rollout_dtypes:
        for trainer in trainer_passes(config):
            cell = _cell(dtype, trainer)
            why = _why_missing(run, cell["rollout_pass"], cell["trainer_pass"])
            if why:
                missing.append({**cell, "why": why})
                continue
            pair = accumulate(pair_chunks(run, cell["rollout_pass"], cell["trainer_pass"]))
            metrics = compute_metrics(pair, seed=config.seed)
            if trainer.dtype == dtype and dtype not in diagonal:
                # Of several trainer modes the first one stands for the dtype.
                diagonal[dtype], metrics_of[dtype] = pair, metrics
            pairs.append(_pair_row(cell, pair, metrics, nulls))
    if not pairs:
        reasons = "; ".join(sorted({row["why"].rstrip(".") for row in missing}))
        raise TableError(
            f"Nothing can be compared: {reasons}.", "See the reasons, mend them, and continue with --resume."
        )
    summary = {
        "schema_version": SCHEMA_VERSION,
        "model": run.manifest["model"]["name"],
        "pairs": pairs,
        "missing": missing,
        "nulls": list(nulls.values()),
        "findings": findings(diagonal, metrics_of, config.seed),
        "limits": [row for limit in limits for row in judge(limit, pairs, missing)],
    }
    worst = [token for dtype, pair in diagonal.items() for token in _worst_tokens(run, dtype, pair)]
    return ReportData(summary=summary, manifest=run.manifest, curves=_curves(diagonal), worst_tokens=worst)


def _cell(dtype: str, trainer: TrainerPass) -> dict[str, Any]:
    return {
        "rollout_pass": rollout_pass_id(dtype),
        "trainer_pass": trainer.pass_id,
        "rollout_dtype": dtype,
        "trainer_dtype": trainer.dtype,
        "trainer_mode": trainer.mode,
    }


def _why_missing(run: RunDirectory, rollout_pass: str, trainer_pass: str) -> str:
    passes = run.manifest["passes"]
    for name in (rollout_pass, trainer_pass):
        if not run.finished(name):
            return str(passes.get(name, {}).get("why", "this pass has not run yet; continue the run with --resume"))
    if rollout_pass not in passes[trainer_pass].get("covers", []):
        not_yet = "the trainer has not scored these sequences yet; continue the run with --resume"
        return str(passes[trainer_pass].get("extension_failure", not_yet))
    return ""


def _pair_row(
    cell: dict[str, Any], pair: PairSums, metrics: dict[str, MetricValue], nulls: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    return {
        **cell,
        "on_policy": pair.on_policy,
        "n_tokens": pair.n_tokens,
        "n_sequences": len(pair.prompt),
        "n_prompts": len(pair.prompt_ids),
        "n_nonfinite": count_nonfinite(pair),
        "metrics": {key: value.as_dict() for key, value in metrics.items()},
        "null": {"rollout": nulls.get(cell["rollout_pass"]), "trainer": nulls.get(cell["trainer_pass"])},
    }


def _null_row(run: RunDirectory, pass_id: str) -> dict[str, Any] | None:
    null_pass = null_pass_id(pass_id)
    if not run.finished(null_pass):
        return None
    engine, dtype = pass_id.split("-")[:2]
    stat = asdict(null_of(run, pass_id, null_pass))
    return {"pass_id": pass_id, "null_pass": null_pass, "engine": engine, "dtype": dtype, **stat}


def judge(limit: Limit, pairs: Sequence[dict[str, Any]], missing: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per pair that a limit applies to. What cannot be judged does not pass, and says why."""
    rows = []
    for cell in (*pairs, *missing):
        if not limit.applies_to(cell["rollout_dtype"], cell["trainer_dtype"]):
            continue
        metric = cell.get("metrics", {}).get(limit.metric, {})
        value, why = metric.get("value"), cell.get("why") or metric.get("why", "")
        if cell.get("n_nonfinite"):
            why = f"{cell['n_nonfinite']} of {cell['n_tokens']} log-probs are not finite, so the pair cannot pass"
        exceeded = value is None or bool(cell.get("n_nonfinite")) or limit.exceeded_by(value)
        kept = {key: cell[key] for key in ("rollout_dtype", "trainer_dtype", "trainer_mode")}
        rows.append({"limit": limit.text, **kept, "value": value, "exceeded": exceeded, "why": why})
    return rows


def _curves(diagonal: dict[str, PairSums]) -> Curves:
    return Curves(
        density={dtype: curves.policy_density(pair) for dtype, pair in diagonal.items()},
        length={dtype: curves.length_curve(pair) for dtype, pair in diagonal.items()},
        ccdf={dtype: curves.abs_diff_ccdf(pair) for dtype, pair in diagonal.items()},
        by_probability={dtype: curves.abs_diff_by_probability(pair) for dtype, pair in diagonal.items()},
        by_position={dtype: curves.abs_diff_by_position(pair) for dtype, pair in diagonal.items()},
    )


def _worst_tokens(run: RunDirectory, dtype: str, pair: PairSums) -> list[WorstToken]:
    """The tokens of a pair that differ most, each with the text before it."""
    pass_id = rollout_pass_id(dtype)
    sequences = pass_sequences(run, pass_id)
    tokens = []
    for row, sequence, position, rollout, trainer in zip(*vars(pair.largest).values(), strict=True):
        first = int(row) - min(int(position), _CONTEXT_TOKENS)
        batches = run.iter_tokens(pass_id, ["token_id", "token_text"], rows=range(first, int(row) + 1))
        rows = [piece for batch in batches for piece in batch.to_pylist()]
        *before, text = [piece["token_text"] or "" for piece in rows]
        tokens.append(
            WorstToken(
                pair=dtype,
                sequence_id=int(sequences.ids[sequence]),
                prompt_id=sequences.prompt_ids[sequences.prompt[sequence]],
                position=int(position),
                token_id=rows[-1]["token_id"],
                token_text=text,
                context="".join(before),
                rollout_logprob=float(rollout),
                trainer_logprob=float(trainer),
                log_ratio=float(trainer - rollout),
            )
        )
    return tokens


def summary_frame(summary: dict[str, Any]) -> pd.DataFrame:
    """The pairs' metrics flat, a row per pair and metric: what `summary.csv` holds."""
    about = ["rollout_pass", "trainer_pass", "rollout_dtype", "trainer_dtype", "trainer_mode", "on_policy"]
    about += ["n_tokens", "n_sequences", "n_nonfinite"]
    rows = [
        {**{name: pair[name] for name in about}, "metric": key, **metric}
        for pair in summary["pairs"]
        for key, metric in pair["metrics"].items()
    ]
    return pd.DataFrame(rows, columns=[*about, "metric", "value", "ci_low", "ci_high", "why"])


def write_outputs(run: RunDirectory, data: ReportData) -> dict[str, Path]:
    """Writes summary, figures and reports into the run's folder; returns the figures."""
    from mismatch_probe.report.html import render_html
    from mismatch_probe.report.markdown import render_markdown

    write_json(run.path / "summary.json", data.summary)
    write_text(run.path / "summary.csv", summary_frame(data.summary).to_csv(index=False, lineterminator="\n"))
    figures = draw_figures(run, data)
    write_text(run.path / "report.html", render_html(data, figures))
    relative = {name: path.relative_to(run.path) for name, path in figures.items()}
    write_text(run.path / "report.md", render_markdown(data, relative))
    return figures


def draw_figures(run: RunDirectory, data: ReportData) -> dict[str, Path]:
    """Draws every figure into `figures/`."""
    from mismatch_probe.report.figures import draw_all

    return draw_all(data, run.path / "figures")
