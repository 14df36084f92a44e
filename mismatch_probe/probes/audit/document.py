"""From a run and an audit's parts to `audit.json`: verdicts, reasons, recommendation, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mismatch_probe.engines.audit.names import layer_of
from mismatch_probe.errors import TableError
from mismatch_probe.metrics.corrections import CORRECTIONS, touched_shares
from mismatch_probe.metrics.frame import pair_chunks
from mismatch_probe.probes.analysis import analyse
from mismatch_probe.probes.audit.advice import advise, best_pair
from mismatch_probe.probes.audit.checks import Checks
from mismatch_probe.probes.audit.judge import Check, verdict
from mismatch_probe.probes.audit.measure import Calibration, Measurements, Part
from mismatch_probe.probes.audit.options import AuditOptions
from mismatch_probe.probes.audit.precisions import precisions
from mismatch_probe.probes.audit.profile import Profile
from mismatch_probe.probes.audit.ranges import backward_document, forward_document, lag_document, weights_document
from mismatch_probe.probes.audit.snippets import snippets
from mismatch_probe.probes.pairs import PassPair
from mismatch_probe.probes.planning import RolloutPass, TrainerPass
from mismatch_probe.report.names import precision_label
from mismatch_probe.results.comparison import Comparison, Pair, PairName
from mismatch_probe.runs import RunDirectory
from mismatch_probe.types import DTYPES, MetricValue

SCHEMA_VERSION = 1
_GAP = "mean_abs_logprob_diff"
_PARTS = {
    "weights": "conversion of the weights to 16 bits",
    "forward": "range of activations",
    "backward": "range of gradients",
    "lag": "lag of the engine behind FP32 masters",
    "proof": "a real FP16 forward and backward pass",
}


def audit_document(
    run: RunDirectory,
    options: AuditOptions,
    profile: Profile,
    measurements: Measurements,
    refused: Mapping[str, str],
) -> dict[str, Any]:
    """Judges a run.

    Args:
        run: The comparison.
        options: Of the audit.
        profile: Its thresholds.
        measurements: On the model itself.
        refused: By rollout dtype that the engine refuses, the sentence that says so.

    Raises:
        TableError: A table is missing or corrupt.
    """
    summary, config = _summary(run, options), run.manifest.config
    parts = measurements.load()
    ranges, why_missing = ranges_of(parts, measurements.calibration, options), measurements.why_missing()
    planned = options.planned(run)
    checks = Checks(profile, summary, ranges, why_missing, planned)
    pairs = [_pair(pair, checks.of_pair(pair)) for pair in summary.pairs]
    pairs += [_pair(row, checks.refused(why)) for row, why in _refused_pairs(run, refused)]
    # Of pairs that were asked for, one of these is recommended.
    asked = [pair for pair in pairs if _names(pair)[:2] in options.wanted_pairs] if options.pairs else pairs
    best = best_pair([pair for pair in asked if pair["n_tokens"]])
    recommendation: dict[str, Any] | None = None
    if best is not None:
        source = next(p for p in summary.pairs if _names(dict(p)) == _names(best))
        touched = touched_shares(pair_chunks(run, source.rollout_pass, source.trainer_pass))
        choice = advise(best, pairs, summary, ranges, touched, planned)
        recommendation = {
            **choice.as_dict(),
            "corrections": [
                {**vars(c), "touched": touched[c.name].as_dict()} for c in CORRECTIONS if c.name in touched
            ],
            "snippets": [found.as_dict() for found in snippets(choice, config.model or "MODEL", config.temperature)],
        }
    return {
        "schema_version": SCHEMA_VERSION,
        "model": run.manifest.model.name,
        "verdict": _overall(pairs, best, options),
        "decided_by": [precision_label(pair) for pair in _deciding(pairs, best, options)],
        "precisions": precisions(pairs, [dict(row) for row in summary.missing]),
        "profile": {"name": profile.name, "description": profile.description},
        "options": options.as_dict() | {"planned_tokens": planned, "step_tokens": options.loss_tokens(run)},
        "pairs": pairs,
        "recommendation": recommendation,
        "range": ranges,
        "missing": _missing(summary, ranges, why_missing, refused, options),
        "provenance": _provenance(run) | {"measured_with": {n: facts["made_with"] for n, (facts, _) in parts.items()}},
        "baseline": None,
    }


def ranges_of(
    parts: Mapping[str, Part], calibration: Calibration, options: AuditOptions
) -> dict[str, dict[str, Any] | None]:
    """The parts as documents, None for one that was not measured."""
    found: dict[str, dict[str, Any] | None] = dict.fromkeys(_PARTS)
    prompts = calibration.prompts
    if "weights" in parts:
        found["weights"] = weights_document(parts["weights"][0])
    if "forward" in parts:
        found["forward"] = forward_document(*parts["forward"], prompts)
    if "backward" in parts:
        found["backward"] = backward_document(*parts["backward"], prompts)
    if "lag" in parts:
        n = int(parts["lag"][1]["sequence"].max()) + 1
        backward = parts.get("backward")
        layers = [] if backward is None else [layer_of(name) for name in backward[0]["tensors"]]
        found["lag"] = lag_document(parts["lag"], backward, prompts[:n], options.learning_rates, layers)
    if "proof" in parts:
        found["proof"] = {name: value for name, value in parts["proof"][0].items() if name != "made_with"}
    return found


def _summary(run: RunDirectory, options: AuditOptions) -> Comparison:
    try:
        return analyse(run, predict_lengths=(options.planned(run),), extrapolate=True).summary
    except TableError as error:
        if not error.what.startswith("Nothing can be compared"):
            raise
        return Comparison(**Comparison.stamp(), model=run.manifest.model.name, reference=None, pairs=())


def _pair(pair: Pair | PairName, checks: list[Check]) -> dict[str, Any]:
    gap = pair.metrics[_GAP] if isinstance(pair, Pair) else MetricValue(None, why="the pair was not run")
    return {
        **{key: getattr(pair, key) for key in ("rollout_dtype", "trainer_dtype", "trainer_mode")},
        "n_tokens": pair.n_tokens if isinstance(pair, Pair) else 0,
        "n_prompts": pair.n_prompts if isinstance(pair, Pair) else 0,
        "verdict": verdict(checks),
        _GAP: gap.as_dict(),
        "checks": [check.as_dict() for check in checks],
    }


def _refused_pairs(run: RunDirectory, refused: Mapping[str, str]) -> list[tuple[PairName, str]]:
    config = run.manifest.config
    rollouts = [RolloutPass(dtype, "decode") for dtype in DTYPES if dtype in refused]
    trainers = [
        TrainerPass(dtype, "cast" if dtype == "float32" else config.trainer_modes[0]) for dtype in config.trainer_dtypes
    ]
    return [(PassPair(rollout, trainer).name, refused[rollout.dtype]) for rollout in rollouts for trainer in trainers]


def _deciding(
    pairs: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None, options: AuditOptions
) -> list[Mapping[str, Any]]:
    """The pairs that the verdict is of: those that were asked for, or the recommended one."""
    if options.pairs:
        return [pair for pair in pairs if _names(pair)[:2] in options.wanted_pairs]
    return [] if best is None else [best]


def _overall(pairs: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None, options: AuditOptions) -> str:
    found = [pair["verdict"] for pair in _deciding(pairs, best, options)]
    there = {_names(pair)[:2] for pair in pairs}
    if any(pair not in there for pair in options.wanted_pairs):
        found.append("not judged")
    if not found:
        return "fail" if pairs else "not judged"
    return next((level for level in ("fail", "not judged", "warn") if level in found), "pass")


def _missing(
    summary: Comparison,
    ranges: Mapping[str, Any],
    why_missing: Mapping[str, str],
    refused: Mapping[str, str],
    options: AuditOptions,
) -> list[dict[str, str]]:
    rows = [{"what": precision_label(dict(row)), "why": row.why} for row in summary.missing]
    rows += [{"what": f"{dtype} rollouts", "why": why} for dtype, why in refused.items()]
    there = {_names(dict(row))[:2] for row in (*summary.pairs, *summary.missing)}
    rows += [
        {"what": f"{rollout} → {trainer}", "why": "It was asked for, and the run has no such pair."}
        for rollout, trainer in options.wanted_pairs
        if (rollout, trainer) not in there and rollout not in refused
    ]
    rows += [{"what": _PARTS[name], "why": why_missing[name]} for name, found in ranges.items() if found is None]
    return rows


def _provenance(run: RunDirectory) -> dict[str, Any]:
    """What could make the same audit come out differently."""
    manifest = run.manifest
    return {
        "created": manifest.created,
        "tool_version": manifest.tool_version,
        "versions": manifest.environment.versions,
        "machine": manifest.environment.machine,
        "variables": manifest.environment.variables,
        "device": manifest.device,
        "config": manifest.content()["config"],
        "prompts_sha256": manifest.prompts.token_ids_sha256,
        "model_files": manifest.model.files or {},
    }


def _names(pair: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(pair[key] for key in ("rollout_dtype", "trainer_dtype", "trainer_mode"))
