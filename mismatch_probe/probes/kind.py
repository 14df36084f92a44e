"""What kind of gap a comparison found: rounding, more than rounding, or unclear. One decision, on the whole comparison.

Rounding of one format leaves four marks: FP32, where it is 2⁻¹⁶ of BF16's, leaves almost nothing (`FP32_FLOOR`); the
mean importance ratio stays 1 on policy; FP16 rounds 8 times more finely than BF16; and every token has log-probs. What
breaks one of them is more than rounding; where a mark was not measured, or too few prompts measured it, the kind is
unclear.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mismatch_probe.dtypes import DTYPE_INFOS
from mismatch_probe.metrics.conclusions import FP32_FLOOR
from mismatch_probe.metrics.intervals import BOOTSTRAP_PROMPTS
from mismatch_probe.metrics.ratio_test import MIN_PROMPTS, MIN_TOKENS
from mismatch_probe.results.comparison import Pair
from mismatch_probe.results.finding import Finding
from mismatch_probe.types import MetricValue

METRIC = "mean_abs_logprob_diff"
# Mean |d| in BF16, nats, above which slime's CI fails; other formats in proportion to their unit roundoff.
LARGEST_BF16_GAP = 0.1
_HALVES = ("bfloat16", "float16")
_MOST_PROMPTS = 10**6


def largest_gap(dtype: str) -> float:
    """The largest mean |d|, nats, that rounding in a 16-bit `dtype` explains."""
    return LARGEST_BF16_GAP * DTYPE_INFOS[dtype].unit_roundoff / DTYPE_INFOS["bfloat16"].unit_roundoff


def kind_of(pairs: Sequence[Pair], same: Mapping[str, Pair], formats: MetricValue | None) -> Finding:
    """The kind of the gap, as one finding.

    Args:
        pairs: Every pair that was compared.
        same: Those of equal dtypes, by dtype; of several trainer modes the first.
        formats: Mean |d| in BF16 over that in FP16; None where either is missing.

    Returns:
        `kind-more-than-rounding` with the codes of its `evidence`; else `kind-unclear` with `open`, what was not
        measured well enough, and `more_prompts`, which would settle it (None where prompts do not); else
        `kind-rounding`.
    """
    halves = {name: same[name] for name in _HALVES if name in same and same[name].n_prompts_usable}
    floor = same.get("float32")
    evidence = _evidence(pairs, same, halves, formats)
    if evidence:
        return Finding(code="kind-more-than-rounding", severity="warn", values={"evidence": evidence})
    needed: dict[str, int | None] = {}
    if floor is None or not floor.n_prompts_usable:
        needed["no-fp32"] = None
    elif (more := _until(floor, floor.metrics[METRIC], FP32_FLOOR, -1)) != 0:
        needed["fp32-floor"] = more
    if not halves:
        needed["no-16-bit"] = None
    for name, pair in halves.items():
        if (more := _until(pair, pair.metrics[METRIC], largest_gap(name), -1)) != 0:
            needed[f"size-{name}"] = more
        overall = next((test for test in pair.ratio_tests if test.family == "overall"), None)
        if overall is not None and overall.verdict == "inconclusive":
            prompts, tokens = max(1, overall.n_prompts), max(1, overall.n_tokens)
            wanted = max(MIN_PROMPTS, math.ceil(prompts * MIN_TOKENS / tokens))
            needed[f"mean-ratio-{name}"] = max(1, wanted - prompts)
    if formats is not None and len(halves) == 2 and (more := _until(halves["float16"], formats, 1.0, 1)) != 0:
        needed["bf16-over-fp16"] = more
    if needed:
        prompts_needed = [more for more in needed.values() if more is not None]
        values = {"open": tuple(needed), "more_prompts": max(prompts_needed, default=None)}
        return Finding(code="kind-unclear", severity="note", values=values)
    return Finding(code="kind-rounding", severity="info", values={"dtypes": tuple(halves)})


def _evidence(
    pairs: Sequence[Pair], same: Mapping[str, Pair], halves: Mapping[str, Pair], formats: MetricValue | None
) -> tuple[str, ...]:
    """Codes of what rounding does not do, none twice."""
    found = []
    floor = same["float32"].metrics[METRIC].value if "float32" in same else None
    if floor is not None and floor >= FP32_FLOOR:
        found.append("fp32-floor")
    if any(test.verdict == "violated" for pair in same.values() for test in pair.ratio_tests):
        found.append("mean-ratio-not-one")
    if any(pair.n_excluded for pair in pairs):
        found.append("excluded-tokens")
    if formats is not None and formats.ci_high is not None and formats.ci_high < 1:
        found.append("bf16-over-fp16")
    lows = {name: pair.metrics[METRIC].ci_low for name, pair in halves.items()}
    if any(low is not None and low > largest_gap(name) for name, low in lows.items()):
        found.append("size")
    return tuple(found)


def _until(pair: Pair, value: MetricValue, bound: float, side: int) -> int | None:
    """How many more prompts show that a value lies on one side of a bound: 0 where they have, None where none would.

    Args:
        pair: Whose prompts.
        value: With its interval, which narrows as 1/√prompts.
        bound: What it has to lie below or above.
        side: −1 for below, 1 for above.
    """
    low, high = value.ci_low, value.ci_high
    if value.value is None:
        return None
    if low is None or high is None:
        return max(1, BOOTSTRAP_PROMPTS - pair.n_prompts_usable) if pair.n_prompts_usable < BOOTSTRAP_PROMPTS else None
    near, distance = (high, bound - value.value) if side < 0 else (low, value.value - bound)
    if side * (near - bound) > 0:
        return 0
    if distance <= 0:
        return None
    wanted = math.ceil(pair.n_prompts_usable * ((near - value.value) / distance) ** 2)
    more = max(1, wanted - pair.n_prompts_usable)
    return more if more <= _MOST_PROMPTS else None
