"""From a run and an audit's parts to `audit.json`: verdicts, reasons, recommendation, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mismatch_probe.config import AuditOptions
from mismatch_probe.metrics.corrections import touched_shares
from mismatch_probe.metrics.frame import pair_chunks
from mismatch_probe.probes.analysis import Analysis, growth_of
from mismatch_probe.probes.audit.advice import Evidence, recommend
from mismatch_probe.probes.audit.checks import Checks
from mismatch_probe.probes.audit.checks.gap import planned_ess
from mismatch_probe.probes.audit.judge import verdict_of
from mismatch_probe.probes.audit.measure import Measurements, loss_tokens, planned_tokens
from mismatch_probe.probes.audit.profile import Profile
from mismatch_probe.probes.audit.ranges import range_of
from mismatch_probe.results.audit import (
    VERDICTS,
    Answer,
    AskedFor,
    Audit,
    AuditedPair,
    AuditProvenance,
    Check,
    PrecisionPair,
    ProfileName,
    Recommendation,
    Settle,
    Verdict,
)
from mismatch_probe.results.comparison import LengthGrowth, MissingPair, Pair
from mismatch_probe.results.finding import Finding, Severity, Value
from mismatch_probe.results.ranges import PARTS, PartName, Range
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.types import MetricValue

TRAINED = ("float16", "bfloat16", "float32")
_RANK: dict[Verdict, int] = {"ok": 0, "warn": 1, "inconclusive": 2, "fail": 3}
_UNSUPPORTED = "fp16_unsupported"
_GAP = "mean_abs_logprob_diff"


def best_pair(pairs: Sequence[AuditedPair]) -> AuditedPair | None:
    """The pair with the best verdict, of equal ones the one whose sides are closest, among those of one dtype on both
    sides where there are any. FP32 costs several times as much: it is chosen where no 16-bit pair is ok or warns.
    """
    candidates = [p for p in pairs if p.rollout_dtype == p.trainer_dtype] or list(pairs)

    def order(pair: AuditedPair) -> tuple[bool, bool, int, float]:
        gap, rank = pair.mean_abs_logprob_diff.value, _RANK[pair.verdict]
        return rank > _RANK["warn"], "float32" in pair.dtypes, rank, float("inf") if gap is None else gap

    return min(candidates, key=order, default=None)


def answers(
    pairs: Sequence[AuditedPair],
    decided_by: Sequence[PrecisionPair],
    missing: Sequence[MissingPair],
    asked: Sequence[tuple[str, str]],
) -> tuple[Answer, ...]:
    """An answer for FP16, BF16 and FP32 each, then for what else was asked for.

    Of a dtype that several trainer modes ran in each mode has an answer; of one that the rollout engine did not run in,
    the best pair that the trainer ran in it.

    Args:
        pairs: Every pair with its checks.
        decided_by: Those that the audit's verdict is of.
        missing: Pairs of the comparison that were not made.
        asked: Rollout and trainer dtype of pairs that the user asked for.
    """
    deciding = {name.key for name in decided_by}
    found: list[Answer] = []
    for dtype in TRAINED:
        same = [pair for pair in pairs if pair.dtypes == (dtype, dtype)]
        best = best_pair([pair for pair in pairs if pair.trainer_dtype == dtype])
        chosen = same or ([] if best is None else [best])
        found += [_answer(pair, pair.key in deciding) for pair in chosen] or [_absent(dtype, dtype, missing, asked)]
    there = {answer.key for answer in found}
    found += [_answer(pair, True) for pair in pairs if pair.key in deciding and pair.key not in there]
    answered = {answer.dtypes for answer in found}
    return (*found, *(_absent(*dtypes, missing, asked) for dtypes in asked if dtypes not in answered))


def _absent(rollout: str, trainer: str, missing: Sequence[MissingPair], asked: Sequence[tuple[str, str]]) -> Answer:
    why = next((row.why for row in missing if (row.rollout_dtype, row.trainer_dtype) == (rollout, trainer)), "")
    return Answer(
        rollout_dtype=rollout,
        trainer_dtype=trainer,
        trainer_mode="",
        compared=False,
        decides=(rollout, trainer) in asked,
        verdict="inconclusive",
        check="",
        finding=Finding(code="audit-pair-not-compared", severity="note", values={"why": why}),
        also=(),
        settle=Settle(dtypes=tuple(dict.fromkeys((rollout, trainer)))),
    )


def _answer(pair: AuditedPair, decides: bool) -> Answer:
    checks = deciding_checks(pair)
    if checks:
        first, evidence = checks[0].name, checks[0].finding
    else:
        severity: Severity = "info" if pair.checks else "note"
        first, evidence = "", Finding(code="audit-all-ok", severity=severity, values={"n": len(pair.checks)})
    # What is certain needs nothing that settles it.
    open_ = [check for check in checks if check.verdict == "inconclusive"]
    needs = [check.settle for check in open_ if check.settle is not None] if open_ == checks else []
    return Answer(
        **dict(pair.name),
        compared=True,
        decides=decides,
        verdict=pair.verdict,
        check=first,
        finding=evidence,
        also=tuple(check.name for check in checks[1:] if check.verdict == checks[0].verdict),
        settle=Settle.all_of(needs) if needs else None,
    )


def deciding_checks(pair: AuditedPair) -> list[Check]:
    """The checks that make a pair's verdict, the one that says most first: what is certain before what is open, the
    engine's own word, then what names a tensor, then the others in the profile's order."""
    if pair.verdict == "ok":
        return []
    if pair.verdict == "inconclusive":
        found = [check for check in pair.checks if check.worst == "fail"]
    elif pair.verdict == "fail":
        found = [check for check in pair.checks if check.best == "fail"]
    else:
        found = [check for check in pair.checks if check.worst == "warn"]
    return sorted(found, key=_order)


def _order(check: Check) -> tuple[bool, bool, bool]:
    named = bool(check.finding.where) and check.name.startswith("fp16_")
    return check.verdict == "inconclusive", check.name != _UNSUPPORTED, not named


def audit_of(
    analysis: Analysis,
    options: AuditOptions,
    profile: Profile,
    measurements: Measurements,
    unsupported: Mapping[str, str],
) -> Audit:
    """Judges a run.

    Args:
        analysis: Of the comparison.
        options: Of the audit.
        profile: Its limits.
        measurements: On the model itself.
        unsupported: By rollout dtype that the engine does not support, its reason.

    Raises:
        TableError: A table is missing or corrupt.
    """
    run, compared, missing = analysis.run, analysis.pairs, analysis.missing
    parts, stale, planned = measurements.load(), measurements.stale(), planned_tokens(options, run)
    forecasts = analysis.forecasts((planned,), extrapolate=True)
    length = {name: growth_of(found) for name, found in forecasts.items()}
    measured = range_of(parts, measurements.calibration.prompts, options.learning_rates)
    checks = Checks(profile, compared, length, measured, stale, planned)
    pairs = tuple(_pairs(run, compared, checks, unsupported))
    # Of pairs that were asked for, one of these is recommended.
    wanted = options.wanted_pairs
    asked = [pair for pair in pairs if pair.dtypes in wanted] if wanted else pairs
    best = best_pair([pair for pair in asked if pair.n_tokens])
    decided_by = tuple(pair.name for pair in asked) if wanted else () if best is None else (best.name,)
    return Audit(
        **Audit.stamp(),
        model=run.manifest.model.name,
        n_prompts=run.manifest.sizes.num_prompts,
        max_tokens=run.manifest.sizes.max_tokens,
        verdict=overall(pairs, decided_by, wanted),
        decided_by=decided_by,
        answers=answers(pairs, decided_by, missing, wanted),
        findings=not_finite(compared, measured),
        profile=ProfileName(name=profile.name, description=profile.description),
        options=AskedFor(
            profile=options.profile,
            planned_tokens=planned,
            step_tokens=loss_tokens(options, run),
            learning_rates=options.learning_rates,
            pairs=options.pairs,
            strict=options.strict,
        ),
        pairs=pairs,
        recommendation=None if best is None else _recommendation(run, best, compared, length, measured, planned),
        range=measured,
        missing=tuple(_missing(missing, compared, measured, stale, unsupported, wanted)),
        provenance=_provenance(run, {name: facts["made_with"] for name, (facts, _) in parts.items()}),
        baseline=None,
    )


def overall(
    pairs: Sequence[AuditedPair], decided_by: Sequence[PrecisionPair], wanted: Sequence[tuple[str, str]]
) -> Verdict:
    """The worst verdict of the pairs that decide; inconclusive where one that was asked for is not there."""
    keys = {name.key for name in decided_by}
    found: list[Verdict] = [pair.verdict for pair in pairs if pair.key in keys]
    there = {pair.dtypes for pair in pairs}
    if any(dtypes not in there for dtypes in wanted):
        found.append("inconclusive")
    if not found:
        return "fail" if pairs else "inconclusive"
    return next(verdict for verdict in VERDICTS if verdict in found)


def not_finite(pairs: Sequence[Pair], measured: Range) -> tuple[Finding, ...]:
    """Told where no token of any pair has a usable log-prob, with the first tensor that is not finite."""
    if not pairs or any(pair.n_excluded < pair.n_tokens or not pair.n_tokens for pair in pairs):
        return ()
    weights = () if measured.weights is None else measured.weights.tensors
    weight = next((row.name for row in weights if row.n_nonfinite), None)
    tensor = None if measured.forward is None else measured.forward.first_nonfinite
    values = {
        "n_tokens": sum(pair.n_tokens for pair in pairs),
        "n_pairs": len(pairs),
        "weight": weight,
        "tensor": tensor,
        "measured": measured.forward is not None,
    }
    return (Finding(code="audit-no-finite-logprob", severity="fail", where=weight or tensor or "", values=values),)


def _pairs(
    run: RunDirectory, compared: Sequence[Pair], checks: Checks, unsupported: Mapping[str, str]
) -> Iterator[AuditedPair]:
    for pair in compared:
        found = checks.of_pair(pair)
        yield AuditedPair(
            rollout_dtype=pair.rollout_dtype,
            trainer_dtype=pair.trainer_dtype,
            trainer_mode=pair.trainer_mode,
            n_tokens=pair.n_tokens,
            n_prompts=pair.n_prompts,
            verdict=verdict_of(found),
            mean_abs_logprob_diff=pair.metrics[_GAP],
            checks=found,
        )
    config = run.manifest.config
    for rollout, why in unsupported.items():
        for trainer in config.trainer_dtypes:
            mode = "cast" if trainer == "float32" else config.trainer_modes[0]
            found = checks.of_unsupported(rollout, trainer, mode, why)
            yield AuditedPair(
                rollout_dtype=rollout,
                trainer_dtype=trainer,
                trainer_mode=mode,
                n_tokens=0,
                n_prompts=0,
                verdict=verdict_of(found),
                mean_abs_logprob_diff=MetricValue(None, why="the pair was not run"),
                checks=found,
            )


def _recommendation(
    run: RunDirectory,
    best: AuditedPair,
    compared: Sequence[Pair],
    length: Mapping[str, LengthGrowth],
    measured: Range,
    planned: int,
) -> Recommendation:
    pair = next(p for p in compared if (p.rollout_dtype, p.trainer_dtype, p.trainer_mode) == best.key)
    config = run.manifest.config
    evidence = Evidence(
        pair=pair,
        touched=touched_shares(pair_chunks(run, pair.rollout_pass, pair.trainer_pass)),
        planned_ess=planned_ess(compared, length, pair),
        planned_tokens=planned,
        model=config.model or "MODEL",
        temperature=config.temperature,
    )
    return recommend(best, measured, evidence)


def _missing(
    missing: Sequence[MissingPair],
    compared: Sequence[Pair],
    measured: Range,
    stale: Sequence[PartName],
    unsupported: Mapping[str, str],
    wanted: Sequence[tuple[str, str]],
) -> Iterator[Finding]:
    by_why: dict[str, list[str]] = {}
    for row in missing:
        by_why.setdefault(row.why, []).append("/".join((row.rollout_dtype, row.trainer_dtype, row.trainer_mode)))
    for why, names in by_why.items():
        yield _note("audit-pairs-missing", pairs=tuple(names), why=why)
    there = {(row.rollout_dtype, row.trainer_dtype) for row in (*compared, *missing)}
    lost = tuple("/".join(pair) for pair in wanted if pair not in there and pair[0] not in unsupported)
    if lost:
        yield _note("audit-pairs-not-in-run", pairs=lost)
    absent = [part for part in PARTS if getattr(measured, part) is None]
    for code, parts in (
        ("audit-parts-missing", tuple(part for part in absent if part not in stale)),
        ("audit-parts-stale", tuple(part for part in absent if part in stale)),
    ):
        if parts:
            yield _note(code, parts=parts)


def _note(code: str, **values: Value) -> Finding:
    return Finding(code=code, severity="note", values=values)


def _provenance(run: RunDirectory, measured_with: Mapping[PartName, dict[str, str]]) -> AuditProvenance:
    manifest = run.manifest
    return AuditProvenance(
        created=manifest.created,
        tool_version=manifest.tool_version,
        environment=manifest.environment,
        device=manifest.device,
        config=manifest.config,
        prompts_sha256=manifest.prompts.token_ids_sha256,
        model_files=manifest.model.files,
        measured_with=dict(measured_with),
    )
