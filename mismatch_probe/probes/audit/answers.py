"""What an audit says of each precision: verdict, the evidence that decides, and what would settle an open one."""

from __future__ import annotations

from collections.abc import Sequence

from mismatch_probe.results.audit import Answer, AuditedPair, Check, PrecisionPair, Settle, Verdict
from mismatch_probe.results.comparison import MissingPair
from mismatch_probe.results.finding import Finding, Severity

TRAINED = ("float16", "bfloat16", "float32")
_RANK: dict[Verdict, int] = {"ok": 0, "warn": 1, "inconclusive": 2, "fail": 3}
_UNSUPPORTED = "fp16_unsupported"


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
