"""From a run's tables to its summary and its report. No engine: `compare`, `report` and `plot` all end here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from mismatch_probe.config import CompareConfig, Limit
from mismatch_probe.errors import TableError
from mismatch_probe.metrics import curves
from mismatch_probe.metrics.accumulate import PairSums
from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.metrics.frame import null_of
from mismatch_probe.metrics.length import fit_length
from mismatch_probe.metrics.length_prediction import LengthForecast, forecast
from mismatch_probe.metrics.paired import compare_pairs
from mismatch_probe.metrics.ratio_test import adjusted_together
from mismatch_probe.metrics.where import where
from mismatch_probe.probes.findings import excluded_findings, findings
from mismatch_probe.probes.pairs import Cell, PairResult, analyse_pair, why_missing
from mismatch_probe.probes.planning import null_pass_id, passes_of
from mismatch_probe.probes.worst import worst_tokens
from mismatch_probe.report.data import Curves, ReportData
from mismatch_probe.tables import SCHEMA_VERSION, RunDirectory, read_json

# What a report shows of an attribution.
_ATTRIBUTED = {"gap", "ladder", "knobs", "two_sided", "layers", "fixes", "experts", "failed", "nulls", "causes"}
_ATTRIBUTED |= {"conclusions", "left_in_fp32"}


def analyse(
    run: RunDirectory,
    limits: Sequence[Limit] = (),
    *,
    predict_lengths: Sequence[int] | None = None,
    extrapolate: bool | None = None,
) -> ReportData:
    """Computes everything that is shown of a run, from its tables alone.

    Args:
        run: A run directory; passes that are missing leave their cells empty, with the reason.
        limits: What `--fail-on` asked for.
        predict_lengths: Response lengths to predict; those of the run's configuration for None.
        extrapolate: Whether to predict beyond 8 times the observed length; likewise.

    Raises:
        TableError: A table is missing or corrupt, or nothing can be compared.
    """
    config = CompareConfig.from_dict(run.manifest["config"])
    passes = passes_of(config, run.manifest.get("recorded"))
    nulls = {name: null for name in run.finished_passes() if (null := _null_row(run, name)) is not None}
    results: list[PairResult] = []
    missing: list[dict[str, Any]] = []
    for cell in [Cell(rollout, trainer) for rollout in passes.rollouts for trainer in passes.trainers]:
        why = why_missing(run, cell.rollout.pass_id, cell.trainer.pass_id)
        if why:
            missing.append({**cell.as_dict(), "why": why})
        else:
            results.append(analyse_pair(run, passes, cell, config.seed))
    if not results:
        reasons = "; ".join(sorted({row["why"].rstrip(".") for row in missing}))
        raise TableError(
            f"Nothing can be compared: {reasons}.", "See the reasons, mend them, and continue with --resume."
        )
    together = adjusted_together([result.ratio_tests for result in results])
    results = [replace(result, ratio_tests=tests) for result, tests in zip(results, together, strict=True)]
    # Of several trainer modes the first one stands for the dtype.
    diagonal = {r.cell.diagonal: r for r in reversed(results) if r.cell.diagonal}
    diagonal = {name: diagonal[name] for name in reversed(diagonal)}
    lengths = config.predict_lengths if predict_lengths is None else predict_lengths
    far = config.extrapolate if extrapolate is None else extrapolate
    forecasts = {
        name: forecast(fit_length(result.prefixes, seed=config.seed), lengths=lengths, extrapolate=far)
        for name, result in diagonal.items()
        if result.prefixes is not None
    }
    pairs = [{**result.as_dict(), "null": _nulls_of(result.cell, nulls)} for result in results]
    summary = {
        "schema_version": SCHEMA_VERSION,
        "model": run.manifest["model"]["name"],
        "reference": None if passes.reference is None else passes.reference.pass_id,
        "pairs": pairs,
        "missing": missing,
        "nulls": list(nulls.values()),
        "where": {name: _where(result) for name, result in diagonal.items()},
        "comparisons": [row.as_dict() for row in compare_pairs(_sums(diagonal), seed=config.seed)],
        "length": {name: found.as_dict() for name, found in forecasts.items()},
        "findings": excluded_findings(pairs) + findings(diagonal, forecasts, config.seed),
        "limits": [row for limit in limits for row in judge(limit, pairs, missing)],
    }
    worst = [token for name, result in diagonal.items() for token in worst_tokens(run, name, result)]
    return ReportData(
        summary=summary,
        manifest=run.manifest,
        curves=_curves(diagonal, forecasts),
        worst_tokens=worst,
        attribution=read_attribution(run),
    )


def read_attribution(run: RunDirectory) -> dict[str, Any] | None:
    """The content of a run's `attribute/attribution.json`; None where there is none.

    Raises:
        TableError: It is damaged, or of an unknown schema version.
    """
    path = run.path / "attribute" / "attribution.json"
    if not path.exists():
        return None
    fix = f"Run `mismatch-probe attribute --from {run.path}` again."
    try:
        document: dict[str, Any] = read_json(path)
    except TableError as error:
        raise TableError(error.what, fix) from None
    lacking = _ATTRIBUTED - document.keys()
    if lacking:
        raise TableError(f"{path} lacks {', '.join(sorted(lacking))}.", fix)
    return document


def _sums(diagonal: Mapping[str, PairResult]) -> dict[str, PairSums]:
    return {name: result.sums for name, result in diagonal.items()}


def _where(result: PairResult) -> dict[str, list[dict[str, Any]]]:
    return {name: [row.as_dict() for row in bins] for name, bins in where(result.sums).items()}


def _nulls_of(cell: Cell, nulls: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"rollout": nulls.get(cell.rollout.pass_id), "trainer": nulls.get(cell.trainer.pass_id)}


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
        if cell.get("n_excluded"):
            why = f"{cell['n_excluded']} of {cell['n_tokens']} tokens have no usable log-probs, so the pair cannot pass"
        if CATALOG[limit.metric].level == "exact" and cell.get("n_nonfinite_exact"):
            why = f"the exact KL is not finite at {cell['n_nonfinite_exact']} compared positions, so it cannot pass"
        broken = cell.get("n_excluded") or (CATALOG[limit.metric].level == "exact" and cell.get("n_nonfinite_exact"))
        exceeded = value is None or bool(broken) or limit.exceeded_by(value)
        kept = {key: cell[key] for key in ("rollout_dtype", "trainer_dtype", "trainer_mode")}
        rows.append({"limit": limit.text, **kept, "value": value, "exceeded": exceeded, "why": why})
    return rows


def _curves(diagonal: Mapping[str, PairResult], forecasts: Mapping[str, LengthForecast]) -> Curves:
    sums = _sums(diagonal)
    return Curves(
        density={name: curves.policy_density(pair) for name, pair in sums.items()},
        length={name: curves.length_curve(pair) for name, pair in sums.items()},
        ccdf={name: curves.abs_diff_ccdf(pair) for name, pair in sums.items()},
        by_probability={name: curves.abs_diff_by_probability(pair) for name, pair in sums.items()},
        by_position={name: curves.abs_diff_by_position(pair) for name, pair in sums.items()},
        forecast=dict(forecasts),
    )
