"""The checks of every precision pair, from a comparison and the model's own numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.metrics.floats import FIRST_SCALE, FP16, NO_SCALE
from mismatch_probe.metrics.intervals import poisson_interval
from mismatch_probe.metrics.length_prediction import FURTHEST
from mismatch_probe.metrics.ratio_test import MIN_PROMPTS
from mismatch_probe.probes.audit.judge import judged, judged_event, judged_extreme, made, missing, unseen_rate
from mismatch_probe.probes.audit.profile import RARE, Profile, is_extreme
from mismatch_probe.results.audit import Bounds, Check, Settle
from mismatch_probe.results.comparison import LengthGrowth, Pair
from mismatch_probe.results.finding import Finding, Value
from mismatch_probe.results.ranges import Activations, Fp16Pass, Gradients, PartName, Range, Weights
from mismatch_probe.types import MetricValue

_FLOOR = "mean_abs_logprob_diff"
# What each check of FP16's range is made of, and which of them ask nothing of an engine that only samples.
_PART: dict[str, PartName] = {
    "fp16_headroom": "forward",
    "fp16_overflow_rate": "forward",
    "fp16_attention_headroom": "forward",
    "fp16_weights": "weights",
    "fp16_loss_scale": "backward",
    "fp16_loss_scale_start": "backward",
    "fp16_pass": "proof",
}
_OF_TRAINERS = ("fp16_attention_headroom", "fp16_loss_scale", "fp16_loss_scale_start", "fp16_pass")
_UNSUPPORTED = "fp16_unsupported"


class Checks:
    """Makes the checks that a profile asks for.

    Args:
        profile: Limits.
        pairs: Of the comparison.
        length: Of the comparison, with a prediction at the planned length.
        measured: On the model itself.
        stale: Parts that were measured with other settings.
        planned_tokens: Response length at which sequence weights have to serve.
    """

    def __init__(
        self,
        profile: Profile,
        pairs: Sequence[Pair],
        length: Mapping[str, LengthGrowth],
        measured: Range,
        stale: Sequence[PartName],
        planned_tokens: int,
    ) -> None:
        self._bounds, self._pairs, self._length = profile.checks, pairs, length
        self._measured, self._stale, self._planned = measured, stale, planned_tokens

    def of_pair(self, pair: Pair) -> tuple[Check, ...]:
        """Every check that concerns a compared pair, in the profile's order."""
        found: list[Check | None] = []
        for name, bounds in self._bounds.items():
            if name.startswith("fp16_"):
                found.append(self._fp16(name, bounds, pair.rollout_dtype, pair.trainer_dtype, pair.trainer_mode))
            elif name in CATALOG:
                found.append(self._metric(name, bounds, pair))
            else:
                found.append(getattr(self, f"_{name}")(bounds, pair))
        return tuple(check for check in found if check is not None)

    def of_unsupported(self, rollout: str, trainer: str, mode: str, why: str) -> tuple[Check, ...]:
        """The checks of a pair whose rollout dtype the engine does not support: that, and what the model's own range
        says of FP16 all the same."""
        bounds = self._bounds.get(_UNSUPPORTED, Bounds(fail_above=0.0, source="the installed vLLM"))
        told = _finding("audit-dtype-unsupported", why=why)
        found = [judged(_UNSUPPORTED, MetricValue(1.0), bounds, told, exact=True)]
        for name, limits in self._bounds.items():
            part = _PART.get(name)
            check = self._fp16(name, limits, rollout, trainer, mode) if part is not None else None
            if check is not None and check.value.value is not None:
                found.append(check)
        return tuple(found)

    def _metric(self, name: str, bounds: Bounds, pair: Pair) -> Check | None:
        value, info, n_prompts = pair.metrics[name], CATALOG[name], pair.n_prompts_usable
        if info.level == "exact" and pair.n_nonfinite_exact:
            found = _finding("audit-exact-not-finite", metric=name, n=pair.n_nonfinite_exact)
            return missing(name, bounds, "compared positions are not finite", found)
        if info.level == "exact" and value.value is None:
            return None  # a check of runs that kept rows of logits
        if value.value is None:
            return missing(name, bounds, value.why, _finding("audit-metric-missing", metric=name, why=value.why))
        if name in RARE:
            count = int(pair.metrics["confident_disagreement_count"].value or 0)
            told = _finding(
                "audit-metric-count", metric=name, n=count, n_tokens=pair.n_tokens, upper=_upper(count, n_prompts)
            )
            return judged_event(name, count, value, bounds, told, n_prompts=n_prompts)
        told = _finding("audit-metric-value", metric=name, value=value)
        if is_extreme(name):
            return judged_extreme(name, value, bounds, told, n_prompts=n_prompts)
        return judged(name, value, bounds, told, n_prompts=n_prompts)

    def _nonfinite_logprobs(self, bounds: Bounds, pair: Pair) -> Check:
        n, total, n_prompts = pair.n_excluded, pair.n_tokens, pair.n_prompts_usable
        low, high = poisson_interval(n)
        rate = MetricValue(n / total if total else None, low / max(1, total), high / max(1, total))
        told = _finding(
            "audit-logprobs-not-finite" if n else "audit-logprobs-finite",
            n=n,
            n_tokens=total,
            values=tuple(f"{row.side} {row.value}: {row.n:,}" for row in pair.excluded),
            upper=_upper(n, n_prompts),
        )
        return judged_event("nonfinite_logprobs", n, rate, bounds, told, n_prompts=n_prompts)

    def _fp32_floor(self, bounds: Bounds, pair: Pair) -> Check:
        name = "fp32_floor"
        floor = next((p for p in self._pairs if (p.rollout_dtype, p.trainer_dtype) == ("float32", "float32")), None)
        if floor is None:
            settle = Settle(dtypes=("float32",))
            return missing(name, bounds, "the run has no FP32 pair", _finding("audit-no-fp32-pair"), settle)
        if floor.n_excluded:
            told = _finding("audit-fp32-pair-not-finite", n=floor.n_excluded, n_tokens=floor.n_tokens)
            return missing(name, bounds, "tokens of the FP32 pair have no usable log-probs", told)
        value = floor.metrics[_FLOOR]
        return judged(name, value, bounds, _finding("audit-fp32-floor", value=value), n_prompts=floor.n_prompts_usable)

    def _one_sided(self, bounds: Bounds, pair: Pair) -> Check | None:
        """Whether the mean importance ratio is 1: shown where no test is violated and its interval lies near 1."""
        if not pair.on_policy:
            return None
        name, mean, n_prompts = "one_sided", pair.metrics["mean_ratio"], pair.n_prompts_usable
        if mean.value is None or bounds.within is None:
            return missing(name, bounds, mean.why, _finding("audit-metric-missing", metric="mean_ratio", why=mean.why))
        broken = [test for test in pair.ratio_tests if test.verdict == "violated"]
        if broken:
            worst = max(broken, key=lambda test: abs((test.mean_ratio.value or 0.0) - 1))
            level = bounds.event or "fail"
            told = _finding("audit-mean-ratio-off", value=worst.mean_ratio, family=worst.family)
            return made(name, level, level, worst.mean_ratio, bounds, told)
        overall = next((test for test in pair.ratio_tests if test.family == "overall"), None)
        if overall is None or overall.verdict == "inconclusive":
            why = "no test was made" if overall is None else overall.mean_ratio.why
            more = max(0, MIN_PROMPTS - n_prompts) or None
            settle = None if more is None else Settle(more_prompts=more)
            told = _finding("audit-mean-ratio-untested", value=mean, why=why)
            return made(name, "ok", bounds.event or "warn", mean, bounds, told, settle=settle)
        near = Bounds(fail_below=1 - bounds.within, fail_above=1 + bounds.within)
        shown = judged(name, mean, near, _finding("audit-mean-ratio"), n_prompts=n_prompts)
        negligible = overall.verdict == "violated but negligible"
        if shown.verdict == "ok":
            return made(name, "ok", "ok", mean, bounds, _finding("audit-mean-ratio", value=mean, negligible=negligible))
        told = _finding("audit-mean-ratio-open", value=mean, negligible=negligible, within=bounds.within)
        return made(name, "ok", bounds.event or "fail", mean, bounds, told, settle=shown.settle)

    def _ess_seq_planned(self, bounds: Bounds, pair: Pair) -> Check | None:
        name, value = "ess_seq_planned", planned_ess(self._pairs, self._length, pair)
        if value is None:
            return None
        if value.value is None:
            told = _finding("audit-planned-ess-missing", length=self._planned, why=value.why)
            return missing(name, bounds, value.why, told, self._longer(pair))
        told = _finding("audit-planned-ess", length=self._planned, value=value)
        if "extrapolated" in value.why:
            value = MetricValue(value.value, None, None, value.why)  # shown, but no ground to judge on
            check = judged(name, value, bounds, told)
            return made(name, check.best, check.worst, value, bounds, told, settle=self._longer(pair))
        return judged(name, value, bounds, told, n_prompts=pair.n_prompts_usable)

    def _longer(self, pair: Pair) -> Settle | None:
        """Responses that are long enough to predict the planned length from; None where those here are."""
        found = self._length.get(_named(pair))
        if found is None or self._planned <= FURTHEST * found.observed_length:
            return None
        return Settle(max_tokens=-(-self._planned // FURTHEST))

    def _fp16(self, name: str, bounds: Bounds, rollout: str, trainer: str, mode: str) -> Check | None:
        """A check of FP16's range, where a side of the pair runs in FP16."""
        if "float16" not in (rollout, trainer) or name == _UNSUPPORTED:
            return None
        if trainer != "float16" and name in _OF_TRAINERS:
            return None
        part = _PART[name]
        found = getattr(self._measured, part)
        if found is None:
            told = _finding("audit-parts-stale" if part in self._stale else "audit-parts-missing", parts=(part,))
            return missing(name, bounds, "not measured", told, Settle(parts=(part,)))
        if isinstance(found, Fp16Pass) and found.mode != mode:
            told = _finding("audit-pass-of-other-mode", mode=found.mode, wanted=mode)
            return missing(name, bounds, f"the pass was made in mode {found.mode}", told, Settle(trainer_modes=(mode,)))
        check: Check = getattr(self, f"_{name}")(bounds, found)
        return check

    def _fp16_headroom(self, bounds: Bounds, forward: Activations) -> Check:
        top = forward.largest
        where = forward.first_overflow or forward.source
        nonfinite = sum(row.n_nonfinite for row in forward.tensors)
        over = nonfinite or forward.first_overflow is not None
        told = _finding(
            "audit-activation-overflow" if over else "audit-activation-peak",
            where=where,
            peak=top.peak,
            tensor=top.name,
            position=top.position,
            longest=forward.longest,
            n_nonfinite=nonfinite,
            nonfinite_at=forward.first_nonfinite,
        )
        value = MetricValue(0.0 if nonfinite else headroom(top.peak))
        return judged_extreme("fp16_headroom", value, bounds, told, exact=True, n_prompts=forward.n_prompts)

    def _fp16_overflow_rate(self, bounds: Bounds, forward: Activations) -> Check:
        n, n_prompts = forward.n_overflow, forward.n_prompts
        told = _finding(
            "audit-overflow-tokens",
            where=forward.first_overflow or "",
            n=n,
            n_tokens=forward.n_tokens,
            n_prompts_hit=forward.n_overflow_prompts,
            n_prompts=n_prompts,
            upper=_upper(n, n_prompts),
        )
        return judged_event("fp16_overflow_rate", n, forward.overflow_rate, bounds, told, n_prompts=n_prompts)

    def _fp16_attention_headroom(self, bounds: Bounds, forward: Activations) -> Check:
        name, top = "fp16_attention_headroom", forward.kinds.get("attention product")
        if top is None:
            return missing(name, bounds, "no product q·k was seen", _finding("audit-no-attention-product"))
        told = _finding("audit-attention-peak", where=top.name, peak=top.peak, fused=forward.fused_attention)
        room = MetricValue(headroom(top.peak))
        return judged_extreme(name, room, bounds, told, exact=True, n_prompts=forward.n_prompts)

    def _fp16_weights(self, bounds: Bounds, weights: Weights) -> Check:
        found = weights.float16
        told = _finding(
            "audit-weights-rounded",
            where=found.worst.name,
            error=found.worst.error,
            n=found.n,
            n_overflow=found.n_overflow,
            n_flushed=found.n_flushed,
            n_subnormal=found.n_subnormal,
            n_nonfinite=found.n_nonfinite,
        )
        error = MetricValue(1.0 if found.n_nonfinite + found.n_overflow else found.worst.error)
        return judged("fp16_weights", error, bounds, told, exact=True)

    def _fp16_loss_scale(self, bounds: Bounds, backward: Gradients) -> Check:
        name, scales, told = "fp16_loss_scale", backward.scales, backward.loss_scales()
        if scales is None:
            return missing(name, bounds, "no tensor got a gradient", told)
        room = MetricValue(float(scales.high - scales.low))
        return judged_extreme(name, room, bounds, told, exact=True, n_prompts=backward.n_prompts)

    def _fp16_loss_scale_start(self, bounds: Bounds, backward: Gradients) -> Check:
        name, scales, trace = "fp16_loss_scale_start", backward.scales, backward.scaler
        if scales is None:
            return missing(name, bounds, "no tensor got a gradient", backward.loss_scales())
        never = trace is None or scales.high == NO_SCALE
        told = _finding(
            "audit-scaler-never-steps" if never else "audit-scaler-start",
            where=backward.overflow_at_start or "",
            exponent=FIRST_SCALE,
            skipped=None if trace is None or never else trace.skipped_at_start,
        )
        room = MetricValue(float(scales.high - FIRST_SCALE))
        return judged_extreme(name, room, bounds, told, exact=True, n_prompts=backward.n_prompts)

    def _fp16_pass(self, bounds: Bounds, proof: Fp16Pass) -> Check:
        told = pass_finding(proof)
        broken = unseen_rate(proof.n_sequences) if proof.finite else MetricValue(1.0)
        return judged("fp16_pass", broken, bounds, told, exact=True)


def pass_finding(proof: Fp16Pass) -> Finding:
    """What became of the pass in FP16."""
    n, mode = proof.n_sequences, proof.mode
    if proof.finite:
        return _finding("audit-pass-finite", n_sequences=n, mode=mode, exponent=proof.exponent)
    way = "forward" if proof.first_nonfinite_forward else "backward"
    first = proof.first_nonfinite_forward or proof.first_nonfinite_backward
    return _finding("audit-pass-not-finite", where=first or "", n_sequences=n, mode=mode, way=way)


def planned_ess(pairs: Sequence[Pair], length: Mapping[str, LengthGrowth], pair: Pair) -> MetricValue | None:
    """The predicted ESS of a pair's sequence weights; None where the pair has no prediction of its own."""
    same = [p for p in pairs if (p.rollout_dtype, p.trainer_dtype) == (pair.rollout_dtype, pair.trainer_dtype)]
    # Of several trainer modes the first one was predicted.
    if same[0].trainer_mode != pair.trainer_mode:
        return MetricValue(None, why=f"only the mode {same[0].trainer_mode} was predicted")
    found = length.get(_named(pair))
    return found.predictions[0].values["ess_seq"] if found is not None and found.predictions else None


def headroom(peak: float) -> float | None:
    """FP16's largest number over a peak; None for a peak of 0."""
    return FP16.largest / peak if peak > 0 else None


def _named(pair: Pair) -> str:
    """What the comparison calls a pair whose growth with length it looks at."""
    same = pair.rollout_dtype == pair.trainer_dtype
    return pair.rollout_dtype if same else f"recorded → {pair.trainer_dtype}"


def _upper(hits: int, n_prompts: int) -> float | None:
    """Of an event that did not occur, the upper 95 % limit of the fraction of prompts that show it."""
    return None if hits else unseen_rate(n_prompts).ci_high


def _finding(code: str, where: str = "", **values: Value) -> Finding:
    """Evidence of a check, which gives it its severity."""
    return Finding(code=code, severity="info", where=where, values=values)
