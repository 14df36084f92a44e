"""The checks of every precision pair, from a comparison's summary and the model's own numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mismatch_probe.metrics.catalog import CATALOG
from mismatch_probe.metrics.floats import FIRST_SCALE, FP16, NO_SCALE
from mismatch_probe.metrics.intervals import poisson_interval
from mismatch_probe.metrics.ratio_test import MIN_PROMPTS, NEGLIGIBLE
from mismatch_probe.probes.audit.judge import Check, judged, judged_event, judged_extreme, missing, unseen_rate
from mismatch_probe.probes.audit.profile import RARE, Bounds, Profile, is_extreme
from mismatch_probe.probes.audit.ranges import headroom, scales_of
from mismatch_probe.results.comparison import Comparison, Pair
from mismatch_probe.types import MetricValue

Document = Mapping[str, Any]
_FLOOR = "mean_abs_logprob_diff"
# What each check of FP16's range is made of, and which of them ask nothing of an engine that only samples.
_PART = {
    "fp16_headroom": "forward",
    "fp16_overflow_rate": "forward",
    "fp16_attention_headroom": "forward",
    "fp16_weights": "weights",
    "fp16_loss_scale": "backward",
    "fp16_loss_scale_start": "backward",
    "fp16_pass": "proof",
}
_OF_TRAINERS = ("fp16_attention_headroom", "fp16_loss_scale", "fp16_loss_scale_start", "fp16_pass")


class Checks:
    """Makes the checks that a profile asks for.

    Args:
        profile: Thresholds.
        summary: Of the comparison, with a prediction at the planned length.
        ranges: By part, None where it was not measured.
        why_missing: By part, why it was not measured.
        planned_tokens: Response length at which sequence weights have to serve.
    """

    def __init__(
        self,
        profile: Profile,
        summary: Comparison,
        ranges: Mapping[str, Document | None],
        why_missing: Mapping[str, str],
        planned_tokens: int,
    ) -> None:
        self._bounds, self._summary, self._ranges = profile.checks, summary, ranges
        self._why, self._planned = why_missing, planned_tokens

    def of_pair(self, pair: Pair) -> list[Check]:
        """Every check that concerns a pair of the summary, in the profile's order."""
        found: dict[str, Check | None] = {}
        for name, bounds in self._bounds.items():
            if name.startswith("fp16_"):
                found[name] = self._fp16(name, bounds, pair)
            elif name in CATALOG:
                found[name] = self._metric(name, bounds, pair)
            else:
                found[name] = getattr(self, f"_{name}")(bounds, pair)
        return [check for check in found.values() if check is not None]

    def refused(self, sentence: str) -> list[Check]:
        """The one check of a pair whose rollout dtype the engine refuses."""
        bounds = self._bounds.get("fp16_refusal", Bounds(fail_above=0.0, source="the installed vLLM"))
        return [judged("fp16_refusal", MetricValue(1.0), bounds, sentence, exact=True)]

    def _metric(self, name: str, bounds: Bounds, pair: Pair) -> Check | None:
        value = pair.metrics[name]
        info, n_prompts = CATALOG[name], pair.n_prompts_usable
        if info.level == "exact" and pair.n_nonfinite_exact:
            found = f"{pair.n_nonfinite_exact} compared positions are not finite"
            return missing(name, bounds, f"{info.title}: {found}.")
        if info.level == "exact" and value.value is None:
            return None  # a check of runs that kept rows of logits
        if value.value is None:
            return missing(name, bounds, f"{info.title}: {value.why}.")
        if name in RARE:
            count = int(pair.metrics["confident_disagreement_count"].value or 0)
            evidence = f"{info.title}: {count} of {pair.n_tokens:,} tokens{_at_most(count, n_prompts)}."
            return judged_event(name, count, value, bounds, evidence, n_prompts=n_prompts)
        evidence = f"{info.title}: {said(value)}{f' {info.unit}' if info.unit else ''}."
        if is_extreme(name):
            return judged_extreme(name, value, bounds, evidence, n_prompts=n_prompts)
        return judged(name, value, bounds, evidence, n_prompts=n_prompts)

    def _nonfinite_logprobs(self, bounds: Bounds, pair: Pair) -> Check:
        n, total = pair.n_excluded, pair.n_tokens
        low, high = poisson_interval(n)
        rate = MetricValue(n / total if total else None, low / max(1, total), high / max(1, total))
        n_prompts = pair.n_prompts_usable
        values = "; ".join(f"{row.side} {row.value}: {row.n:,}" for row in pair.excluded)
        evidence = f"{n} of {total:,} tokens have log-probs that are not finite or impossible"
        evidence += f" ({values})." if values else f"{_at_most(n, n_prompts)}."
        return judged_event("nonfinite_logprobs", n, rate, bounds, evidence, n_prompts=n_prompts)

    def _fp32_floor(self, bounds: Bounds, pair: Pair) -> Check:
        floor = next((p for p in self._summary.pairs if _dtypes(p) == ("float32", "float32")), None)
        if floor is None:
            return missing("fp32_floor", bounds, "The run has no FP32 pair, so a bug could pass for rounding.")
        value, n_prompts = floor.metrics[_FLOOR], floor.n_prompts_usable
        if floor.n_excluded:
            return missing(
                "fp32_floor", bounds, f"{floor.n_excluded} tokens of the FP32 pair have no usable log-probs."
            )
        evidence = f"In FP32 both engines agree to {said(value)} nats."
        return judged("fp32_floor", value, bounds, evidence, n_prompts=n_prompts)

    def _one_sided(self, bounds: Bounds, pair: Pair) -> Check | None:
        """Whether the mean importance ratio is 1: shown where no test is violated and its interval lies near 1."""
        if not pair.on_policy:
            return None
        mean = pair.metrics["mean_ratio"]
        if mean.value is None or bounds.within is None:
            return missing("one_sided", bounds, f"Mean importance ratio: {mean.why}.")
        about = (bounds.limits, bounds.text(), bounds.source)
        tests = pair.ratio_tests
        broken = [test for test in tests if test.verdict == "violated"]
        if broken:
            worst = max(broken, key=lambda test: abs((test.mean_ratio.value or 1.0) - 1))
            value = worst.mean_ratio
            text = f"The mean importance ratio is {said(value)} ({worst.family}): a fault of one side, not rounding."
            level = bounds.event or "fail"
            return Check("one_sided", level, level, value, *about, text)
        overall = next((test for test in tests if test.family == "overall"), None)
        text = f"The mean importance ratio is {said(mean)}"
        if overall is None or overall.verdict == "inconclusive":
            why = "no test was made" if overall is None else overall.mean_ratio.why
            more = max(0, MIN_PROMPTS - pair.n_prompts_usable) or None
            check = replace(missing("one_sided", bounds, f"{text}, and is not tested: {why}."), value=mean)
            return replace(check, more_prompts=more)
        if overall.verdict == "violated but negligible":
            text += f", off by {abs(mean.value - 1):.1e}: the known bias of float32 log-softmax is up to {NEGLIGIBLE:g}"
        near = Bounds(fail_below=1 - bounds.within, fail_above=1 + bounds.within)
        shown = judged("one_sided", mean, near, "", n_prompts=pair.n_prompts_usable)
        if shown.status == "pass":
            return Check(
                "one_sided", "pass", "pass", mean, *about, f"{text}; nowhere is it shown to be another than 1."
            )
        text += f", which does not exclude a fault of {bounds.within:.0%} on one side."
        worst_level = bounds.event or "fail"
        return Check("one_sided", "pass", worst_level, mean, *about, text, more_prompts=shown.more_prompts)

    def _ess_seq_planned(self, bounds: Bounds, pair: Pair) -> Check | None:
        value = planned_ess(self._summary, pair)
        if value is None:
            return None
        if value.value is None:
            return missing("ess_seq_planned", bounds, f"ESS at {self._planned:,} tokens: {value.why}.")
        note = f" ({value.why})" if value.why else ""
        evidence = f"At {self._planned:,} tokens sequence weights leave {said(value)} of the sequences{note}."
        if "extrapolated" in value.why:
            value = MetricValue(value.value, None, None, value.why)  # shown, but no ground to judge on
        return judged("ess_seq_planned", value, bounds, evidence, n_prompts=pair.n_prompts_usable)

    def _fp16(self, name: str, bounds: Bounds, pair: Pair) -> Check | None:
        """A check of FP16's range, where a side of the pair runs in FP16."""
        rollout, trainer = (dtype == "float16" for dtype in _dtypes(pair))
        if not (rollout or trainer) or name == "fp16_refusal":
            return None
        if not trainer and name in _OF_TRAINERS:
            return None
        part = _PART[name]
        found = self._ranges.get(part)
        if found is None:
            return missing(name, bounds, self._why.get(part, "It was not measured."))
        if name == "fp16_pass" and found["mode"] != pair.trainer_mode:
            return missing(name, bounds, f"The pass was made with the trainer in mode {found['mode']}.")
        check: Check = getattr(self, f"_{name}")(bounds, found)
        return check

    def _fp16_headroom(self, bounds: Bounds, forward: Document) -> Check:
        top = forward["largest"]
        room = headroom(top["peak"])
        where = forward["first_overflow"] or forward["source"]
        nonfinite = sum(row["n_nonfinite"] for row in forward["tensors"])
        place = "" if top["position"] is None else f" (token {top['position']} of a sequence)"
        evidence = (
            f"The largest activation is {top['peak']:,.0f} at {top['name']}{place}, "
            f"from {where}; FP16 ends at {FP16.largest:,.0f}. Longest context seen: {forward['longest']:,} tokens."
        )
        if nonfinite:
            room, evidence = 0.0, f"{evidence} {nonfinite} peaks are not finite even in FP32."
        n_prompts = forward["n_prompts"]
        value = MetricValue(room)
        return judged_extreme("fp16_headroom", value, bounds, evidence, where, exact=True, n_prompts=n_prompts)

    def _fp16_overflow_rate(self, bounds: Bounds, forward: Document) -> Check:
        rate, n = MetricValue.of_dict(forward["overflow_tokens"]), forward["overflow_tokens"]["n"]
        n_prompts, hit = forward["n_prompts"], forward["overflow_tokens"]["n_prompts"]
        prompts = f" ({hit:,} of {n_prompts:,} prompts)" if n else _at_most(n, n_prompts)
        evidence = f"{n} of {forward['n_tokens']:,} tokens have an activation of 65,520 or more{prompts}."
        where = forward["first_overflow"]
        return judged_event("fp16_overflow_rate", n, rate, bounds, evidence, where, n_prompts=n_prompts)

    def _fp16_attention_headroom(self, bounds: Bounds, forward: Document) -> Check | None:
        top = forward["kinds"].get("attention product")
        if top is None:
            return missing("fp16_attention_headroom", bounds, "No product q·k was seen in this architecture.")
        how = (
            "fused attention keeps it in FP32"
            if forward["fused_attention"]
            else "this trainer's attention makes it in the dtype, so that it counts among the activations"
        )
        evidence = f"The largest product q·k is {top['peak']:,.0f} at {top['name']}; {how}."
        room, n_prompts = MetricValue(headroom(top["peak"])), forward["n_prompts"]
        name = "fp16_attention_headroom"
        return judged_extreme(name, room, bounds, evidence, top["name"], exact=True, n_prompts=n_prompts)

    def _fp16_weights(self, bounds: Bounds, weights: Document) -> Check:
        found = weights["float16"]
        worst = found["worst"]
        lost = found["n_nonfinite"] + found["n_overflow"]
        evidence = (
            f"{worst['name']} is off by {worst['error']:.2g} of its norm in FP16; of {found['n']:,} weights "
            f"{found['n_overflow']:,} overflow, {found['n_flushed']:,} become 0, {found['n_subnormal']:,} lose digits."
        )
        if found["n_nonfinite"]:
            evidence += f" {found['n_nonfinite']:,} are not finite to begin with."
        error = MetricValue(1.0 if lost else worst["error"])
        return judged("fp16_weights", error, bounds, evidence, worst["name"], exact=True)

    def _fp16_loss_scale(self, bounds: Bounds, backward: Document) -> Check:
        scales = scales_of(backward)
        if scales is None:
            return missing("fp16_loss_scale", bounds, "No tensor got a gradient.")
        if scales.high == NO_SCALE:
            evidence = f"No loss scale serves every tensor: {scales.high_by} is not finite even in FP32."
        elif scales.empty:
            evidence = (
                f"No loss scale serves every tensor: {scales.high_by} overflows above 2^{scales.high}, {scales.low_by} "
                f"loses more than 0.1 % below 2^{scales.low}."
            )
        else:
            evidence = (
                f"Loss scales from 2^{scales.low} (below, {scales.low_by} loses more than 0.1 %) to 2^{scales.high} "
                f"(above, {scales.high_by} overflows) serve every tensor, for a loss averaged over "
                f"{backward['step_tokens']:,} tokens."
            )
        room = MetricValue(float(scales.high - scales.low))
        n_prompts = backward["n_prompts"]
        return judged_extreme(
            "fp16_loss_scale", room, bounds, evidence, scales.high_by, exact=True, n_prompts=n_prompts
        )

    def _fp16_loss_scale_start(self, bounds: Bounds, backward: Document) -> Check:
        scales = scales_of(backward)
        if scales is None:
            return missing("fp16_loss_scale_start", bounds, "No tensor got a gradient.")
        first = backward["overflow_at_start"]
        trace = backward["scaler"]
        never = trace is None or scales.high == NO_SCALE
        skipped = "every step" if never else f"{trace['skipped_at_start']} steps before it takes one"
        evidence = f"A scaler that starts at 2^{FIRST_SCALE} skips {skipped}"
        evidence += f"; {first} is the first to overflow." if first else "."
        room = MetricValue(float(scales.high - FIRST_SCALE))
        n_prompts = backward["n_prompts"]
        return judged_extreme("fp16_loss_scale_start", room, bounds, evidence, first, exact=True, n_prompts=n_prompts)

    def _fp16_pass(self, bounds: Bounds, proof: Document) -> Check:
        first = proof["first_nonfinite_forward"] or proof["first_nonfinite_backward"]
        if proof["finite"]:
            evidence = (
                f"{proof['n_sequences']} sequences ran forward and backward in FP16 ({proof['mode']}) with every "
                f"tensor finite, at a loss scale of 2^{proof['exponent']}."
            )
        else:
            way = "forward" if proof["first_nonfinite_forward"] else "backward"
            evidence = f"The {way} pass in FP16 ({proof['mode']}) is not finite, first at {first}."
        broken = unseen_rate(proof["n_sequences"]) if proof["finite"] else MetricValue(1.0)
        return judged("fp16_pass", broken, bounds, evidence, None if proof["finite"] else first, exact=True)


def planned_ess(summary: Comparison, pair: Pair) -> MetricValue | None:
    """The predicted ESS of a pair's sequence weights; None where the pair has no prediction of its own."""
    rollout, trainer = _dtypes(pair)
    # Of several trainer modes the first one was predicted.
    first = next(p for p in summary.pairs if _dtypes(p) == _dtypes(pair))
    if first.trainer_mode != pair.trainer_mode:
        return MetricValue(None, why=f"only the mode {first.trainer_mode} was predicted")
    name = rollout if rollout == trainer else f"recorded → {trainer}"
    found = summary.length.get(name)
    if found is None or not found.predictions:
        return None
    return found.predictions[0].values["ess_seq"]


def _at_most(hits: int, n_prompts: int) -> str:
    """Of an event that did not occur, which rate that leaves."""
    high = unseen_rate(n_prompts).ci_high
    return "" if hits or high is None else f", so at most {100 * high:.2g} % of prompts have one"


def said(value: MetricValue) -> str:
    """A value with its interval; of what lies near 1 the distance counts, so that it gets more digits."""
    if value.value is None:
        return "unknown"
    digits = 5 if 0.9 < value.value < 1.1 else 3
    text = f"{value.value:.{digits}g}"
    if value.ci_low is None or value.ci_high is None:
        return text
    return f"{text} [{value.ci_low:.{digits}g}, {value.ci_high:.{digits}g}]"


def _dtypes(pair: Pair) -> Sequence[str]:
    return (pair.rollout_dtype, pair.trainer_dtype)
