"""Sequence metrics: one row per sequence with D_i = Σ_t d_t. Definitions: `metrics.catalog`."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from mismatch_probe.metrics import scales
from mismatch_probe.metrics.intervals import Estimate, Floats, Working, join_why, kish
from mismatch_probe.metrics.sample import SPREAD_PROMPTS, Sequences, few_decide
from mismatch_probe.types import MetricValue

Result = Estimate | MetricValue

# C of truncated importance sampling.
TRUNCATION = 2.0
# Lengths whose standard deviation is below this share of their mean carry no slope.
MIN_LENGTH_VARIATION = 0.05
PARETO_SEQUENCES = 200
# The generalised Pareto fit uses at most the largest fifth, whose smallest weight must not vanish beside the largest.
PARETO_TAIL = 0.8
LARGEST_SPAN = 700.0
# Below this the weights' ESS is above 0.9999, and k̂, which has no scale, would describe the shape of nothing.
NEGLIGIBLE_VARIANCE = 1e-4


def sequence_metrics() -> dict[str, Callable[[Sequences], Result]]:
    """The function behind each sequence metric; every one takes at least one sequence."""
    return {
        "seq_log_ratio_mean": lambda seqs: seqs.estimate([seqs.seq_log_ratio], scales.plain, scales.as_is),
        "seq_log_ratio_std": lambda seqs: seqs.variance(seqs.seq_log_ratio, 0.5, scales.exp),
        "seq_log_ratio_min": lambda seqs: MetricValue(float(seqs.seq_log_ratio.min())),
        "seq_log_ratio_max": lambda seqs: MetricValue(float(seqs.seq_log_ratio.max())),
        "kl_seq": lambda seqs: seqs.estimate([-seqs.seq_log_ratio], scales.plain, scales.as_is),
        "seq_log_ratio_slope_per_1k": slope_per_1k,
        "seq_log_ratio_intercept": intercept,
        "seq_log_ratio_rate_per_1k": _rate_per_1k,
        "chi2_seq": _chi2_seq,
        "ess_seq": _ess_seq,
        "ess_seq_gaussian": lambda seqs: seqs.variance(seqs.seq_log_ratio, 1.0, scales.exp_minus_exp),
        "ess_seq_truncated": lambda seqs: seqs.ess(_truncated(seqs)),
        "verl_is_mean": _verl_is_mean,
        "verl_is_std": _verl_is_std,
        "verl_ess": lambda seqs: seqs.ess(_truncated(seqs), weight=seqs.length),
        "pareto_k": _pareto_k,
        "log_ppl_diff": lambda seqs: seqs.estimate([_log_ppl_diff(seqs)], scales.plain, scales.as_is),
        "ppl_ratio": lambda seqs: seqs.mean_exp(_log_ppl_diff(seqs), scales.exp),
        "seq_mult_prob_error_max": _seq_mult_prob_error_max,
    }


def _line(seqs: Sequences, working: Callable[[float, float], Working]) -> Result:
    """Least squares of D on T/1000; `working` receives the two means that were taken out."""
    thousands = seqs.length / 1000
    if thousands.std() < MIN_LENGTH_VARIATION * thousands.mean():
        share = f"{MIN_LENGTH_VARIATION:.0%}".replace("%", " %")
        return MetricValue(None, why=f"response lengths hardly vary (standard deviation below {share} of the mean)")
    x, y = scales.centred(thousands), scales.centred(seqs.seq_log_ratio)
    centres = float(thousands.mean()), float(seqs.seq_log_ratio.mean())
    return seqs.estimate([x, y, x**2, x * y], working(*centres), scales.as_is, least_prompts=SPREAD_PROMPTS)


def slope_per_1k(seqs: Sequences) -> Result:
    """`seq_log_ratio_slope_per_1k`, nats per 1,000 tokens; None where lengths hardly vary."""
    return _line(seqs, lambda x_centre, y_centre: scales.slope)


def intercept(seqs: Sequences) -> Result:
    """`seq_log_ratio_intercept`, nats: where the same line meets length 0."""
    return _line(seqs, scales.intercept)


def _rate_per_1k(seqs: Sequences) -> Estimate:
    return seqs.estimate([1000 * seqs.seq_log_ratio / seqs.length], scales.plain, scales.as_is, weight=seqs.length)


def _ess_seq(seqs: Sequences) -> Estimate:
    effective = kish(np.exp(seqs.seq_log_ratio - seqs.seq_log_ratio.max()))
    few = f"biased upwards: ess_seq·N is {effective:.3g}, below 10" if effective < 10 else ""
    return seqs.ess(seqs.seq_log_ratio, why=join_why(few, few_decide(seqs.seq_log_ratio)))


def _chi2_seq(seqs: Sequences) -> Estimate:
    return seqs.mean_exp(2 * seqs.seq_log_ratio, scales.expm1, why=few_decide(seqs.seq_log_ratio))


def _truncated(seqs: Sequences) -> Floats:
    """`[S]` log min(e^D, C). verl (0.8 and later) truncates first and takes all three of its statistics afterwards."""
    return np.minimum(seqs.seq_log_ratio, math.log(TRUNCATION))


def _verl_is_mean(seqs: Sequences) -> Estimate:
    """Mean of the truncated weights over tokens, each with the weight of its sequence."""
    return seqs.mean_exp(_truncated(seqs), scales.exp, weight=seqs.length)


def _verl_is_std(seqs: Sequences) -> Estimate:
    """Population standard deviation over tokens of the same weights."""
    y = scales.centred(np.expm1(_truncated(seqs)))
    return seqs.estimate(
        [y, y**2],
        lambda means: 0.5 * scales.log_variance(means),
        scales.exp,
        weight=seqs.length,
        least_prompts=SPREAD_PROMPTS,
    )


def pareto_k_threshold(n_sequences: int) -> float:
    """k̂ above this makes importance sampling unreliable at this sample size (Vehtari et al. 2024)."""
    return min(0.7, 1 - 1 / math.log10(n_sequences))


def _pareto_k(seqs: Sequences) -> MetricValue:
    n = len(seqs)
    if n < PARETO_SEQUENCES:
        return MetricValue(None, why=f"needs at least {PARETO_SEQUENCES} sequences")
    if seqs.seq_log_ratio.var() < NEGLIGIBLE_VARIANCE:
        return MetricValue(None, why="the variance of the sequence log ratios is negligible")
    if np.ptp(np.quantile(seqs.seq_log_ratio, (PARETO_TAIL, 1.0))) > LARGEST_SPAN:
        return MetricValue(None, why="the tail of the weights spans more than float64 holds")
    from arviz_stats.base.array import array_stats  # imports xarray, which takes over a second

    # `psislw` takes log-likelihoods and negates them. (`pareto_khat` of 0.8.0 does not pass `log_weights` on.)
    try:
        with np.errstate(all="ignore"):
            k = float(array_stats.psislw(-seqs.seq_log_ratio)[1])  # type: ignore[no-untyped-call]
    except ValueError:  # its only one here: all values of the tail are the same
        return MetricValue(None, why="the largest weights are all equal")
    threshold = pareto_k_threshold(n)
    return MetricValue(k, why=f"above {threshold:.2f}: importance sampling is unreliable" if k > threshold else "")


def _log_ppl_diff(seqs: Sequences) -> Floats:
    """`[S]` mean b − mean a of each sequence."""
    return -seqs.seq_log_ratio / seqs.length


def _seq_mult_prob_error_max(seqs: Sequences) -> MetricValue:
    with np.errstate(over="ignore"):
        value = 1.0 + float(np.exp(seqs.log_mult_error))
    return MetricValue(value) if math.isfinite(value) else MetricValue(None, why="overflows float64")
