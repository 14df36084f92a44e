"""Is the mean importance ratio 1, over all tokens and in each bin of position and probability?

On policy E[ρ | prefix] = Σ_v μ(v) π(v)/μ(v) = 1 at every position, whatever the two policies are, as long as μ can
sample all that π can. The position is known before the token is drawn, so the mean is exactly 1 in every bin of it.
The token's own rollout probability is not: over the tokens B of a bin the mean is π(B)/μ(B). Where μ errs upwards by
rounding a token lands in a higher bin, so symmetric errors alone raise the mean of low bins and lower that of high
ones (regression to the mean). By how much depends on the errors' variance in log-odds and on how steep the density of
tokens is there. Where a token is far from certain its d² shows that variance; near certainty d shrinks with 1 − p, so
that neither the mean d² of all tokens nor that of the bin bounds the shift: over sound policies with 0 to 95 % of
near-certain tokens and errors on one side or both it reaches 23 times the former and 5.9 times the larger of the two.
It is at most 3.2 times the largest mean d² of a bin for logits that spread as a trained model's do, and 5.1 times for
the narrow ones of an untrained model (`validation/false_alarms.py --shift`). There the test is whether the mean lies
within 1 ± `TOLERANCE` times that, less what the shift itself adds to d²: a one-sided fault of δ nats moves the mean by
δ, and where rounding hides it in BF16 the pairs in FP16 and FP32 show it.

A mean that is carried by tokens rarer than those seen cannot be told from one that is short of 1: a few tokens that
the trainer finds far likelier, none of them sampled yet, look like a truncated rollout.

The test is the interval's: cluster-t over prompts on the log scale, lengthened as intervals.py says. A run makes some
two dozen tests a pair, and often has nine pairs: p-values are adjusted over all of them together, so that a sound run
shows a violation anywhere in at most 5 % of cases.

Shape legend: `P` prompts, `K` bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from mismatch_probe.metrics import scales
from mismatch_probe.metrics.accumulate import PairSums
from mismatch_probe.metrics.curves import position_bins
from mismatch_probe.metrics.inference import POWER, SIGNIFICANCE, Floats, Inference, holm
from mismatch_probe.metrics.intervals import Estimate, infer, join_why, metric_value
from mismatch_probe.metrics.summary import off_policy_why
from mismatch_probe.metrics.sums import BinnedSums
from mismatch_probe.types import MetricValue

Verdict = Literal["holds", "violated", "violated but negligible", "inconclusive"]

# FP32 engines that agree still differ by rounding, part of it one-sided: log-softmax over a large vocabulary loses
# about 1e-5 nats on a CPU. With enough tokens that is significant and means nothing; from 1e-4 on (`FP32_FLOOR`, the
# gap in nats beyond which two FP32 engines compute different things; a mean ratio of 1 + ε is a mean d of about ε) it
# does.
NEGLIGIBLE = 1e-4
# By how many times the largest mean d² of a bin of probability rounding may move a bin's mean (5.1 were seen).
TOLERANCE = 6.0
# Below these a bin's mean rests on too little for its p-value to be trusted.
MIN_PROMPTS = 16
MIN_TOKENS = 100


@dataclass(frozen=True)
class RatioTest:
    """E[ρ] = 1 in one bin.

    Attributes:
        family: `"overall"`, `"position"` or `"probability"`.
        left: Left edge of the bin, inclusive; None overall.
        right: Right edge, exclusive.
        n_tokens: Tokens in the bin.
        n_prompts: Prompts that have any.
        mean_ratio: Mean ρ with its 95 % interval (not adjusted).
        p_value: Two-sided, of a mean within 1 ± `tolerance`; None where the bin is inconclusive.
        p_holm: The same adjusted over all tests of the run: every bin of every family of every pair (Holm 1979).
        verdict: `"holds"` where `p_holm` ≥ 0.05. A violation is negligible where the whole interval lies within
            1 ± 1e-4. Where the bin is inconclusive, `mean_ratio.why` says why.
        tolerance: 0; in bins of probability `TOLERANCE` times the largest variance of d in a bin that is judged, or of
            all tokens.
        detectable: Smallest |mean ρ − 1|, beyond `tolerance`, that these data would have shown with 80 % probability,
            before adjustment.
    """

    family: str
    left: float | None
    right: float | None
    n_tokens: int
    n_prompts: int
    mean_ratio: MetricValue
    p_value: float | None = None
    p_holm: float | None = None
    verdict: Verdict = "inconclusive"
    tolerance: float = 0.0
    detectable: float | None = None


def ratio_tests(sums: PairSums, *, seed: int = 0, replicates: int = 1000) -> list[RatioTest]:
    """E[ρ] = 1 over all tokens, by position and by rollout probability, adjusted over these; off policy, one row that
    says why."""
    off_policy = off_policy_why(sums, "mean_ratio")
    if off_policy:
        return [RatioTest("overall", None, None, 0, 0, MetricValue(None, why=off_policy))]
    probability = sums.binned["probability"]
    options: dict[str, Any] = {"seed": seed, "replicates": replicates}
    total, count = (x.sum(axis=1, keepdims=True) for x in (probability.ratio_excess, probability.count))
    tests = [
        *mean_ratio_tests("overall", total, count, shift=probability.shift, **options),
        *_of_bins("position", position_bins(sums), **options),
        *_of_bins("probability", probability, squares=probability.squared_log_ratio, **options),
    ]
    return adjusted_together([tests])[0]


def adjusted_together(pairs: Sequence[Sequence[RatioTest]]) -> list[list[RatioTest]]:
    """The tests of all pairs of a run with `p_holm` and `verdict` over all of them together.

    Args:
        pairs: Tests of each pair; what was adjusted before is adjusted anew.
    """
    adjusted = iter(holm([test.p_value for tests in pairs for test in tests]))
    return [[replace(t, p_holm=(p := next(adjusted)), verdict=_verdict(t, p)) for t in tests] for tests in pairs]


def _of_bins(family: str, bins: BinnedSums, **options: Any) -> list[RatioTest]:
    return mean_ratio_tests(family, bins.ratio_excess, bins.count, bins.edges, shift=bins.shift, **options)


def mean_ratio_tests(
    family: str,
    excess: Floats,
    counts: Floats,
    edges: Floats | None = None,
    *,
    squares: Floats | None = None,
    shift: float = 0.0,
    seed: int = 0,
    replicates: int = 1000,
) -> list[RatioTest]:
    """E[ρ] = 1 in each bin of one family.

    Args:
        family: Its name.
        excess: `[P, K]` Σ (ρ − 1) of each prompt in each bin, times exp(−`shift`).
        counts: `[P, K]` tokens.
        edges: `[K+1]` of the bins.
        squares: `[P, K]` Σ d², where the bins depend on the token that was drawn.
        shift: See `excess`.
        seed: Seed of the bootstrap.
        replicates: Bootstrap replicates.

    Returns:
        A row per bin, empty bins included, with p-values that `adjusted_together` still has to adjust.
    """
    estimates = {
        str(k): Estimate(excess[:, [k]], counts[:, [k]], scales.log_mean_exp(shift), scales.exp)
        for k in np.flatnonzero(counts.sum(axis=0))
    }
    inferences = infer(estimates, seed=seed, replicates=replicates)
    tolerance = 0.0 if squares is None else _tolerance(excess, counts, squares, shift)
    tests = []
    for k in range(excess.shape[1]):
        left, right = (None, None) if edges is None else (float(edges[k]), float(edges[k + 1]))
        n_tokens, n_prompts = int(counts[:, k].sum()), int((counts[:, k] > 0).sum())
        test = RatioTest(family, left, right, n_tokens, n_prompts, MetricValue(None, why="no tokens"))
        test = replace(test, tolerance=tolerance)
        if n_tokens:
            test = _tested(test, estimates[str(k)], inferences[str(k)])
        tests.append(test)
    return tests


def _tolerance(excess: Floats, counts: Floats, squares: Floats, shift: float) -> float:
    """By how much rounding may move the mean of a bin that depends on the token drawn, from sums `[P, K]`."""
    enough = ((counts > 0).sum(axis=0) >= MIN_PROMPTS) & (counts.sum(axis=0) >= MIN_TOKENS)
    if not counts.any():
        return 0.0
    # A shift common to all tokens is no error of rounding: mean d² less (log mean ρ)² is what scatters.
    n, total, moved = (np.append(x[:, enough].sum(axis=0), x.sum()) for x in (counts, squares, excess))
    with np.errstate(all="ignore"):  # a mean that underflows
        scatter = total / n - scales.log_mean_exp(shift)((moved / n)[:, None]) ** 2
    return TOLERANCE * float(np.fmax.reduce(scatter, initial=0.0))


def _tested(test: RatioTest, estimate: Estimate, inference: Inference) -> RatioTest:
    mean = metric_value("mean_ratio", estimate, inference)
    if test.n_prompts < MIN_PROMPTS or test.n_tokens < MIN_TOKENS:
        why = f"{test.n_tokens} tokens of {test.n_prompts} prompts are too few to judge"
        return replace(test, mean_ratio=replace(mean, why=join_why(why, mean.why)))
    if mean.ci_low is None:
        return replace(test, mean_ratio=mean)
    detectable = float(np.expm1(inference.detectable(POWER)))
    edge = np.log1p(test.tolerance) if inference.centre > 0 else np.log1p(-min(test.tolerance, 1 - 1e-12))
    p_value = inference.p_value(float(edge)) if abs(inference.centre) >= abs(edge) else 1.0
    return replace(test, mean_ratio=mean, p_value=p_value, detectable=detectable)


def _verdict(test: RatioTest, p_holm: float | None) -> Verdict:
    mean = test.mean_ratio
    if p_holm is None or mean.ci_low is None or mean.ci_high is None:
        return "inconclusive"
    if p_holm >= SIGNIFICANCE:
        return "holds"
    return "violated but negligible" if max(1 - mean.ci_low, mean.ci_high - 1) <= NEGLIGIBLE else "violated"
