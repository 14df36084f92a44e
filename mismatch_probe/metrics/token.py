"""Token metrics: means over all response tokens of all sequences. Definitions: `metrics.catalog`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mismatch_probe.metrics import scales
from mismatch_probe.metrics.intervals import (
    NO_INTERVAL,
    Estimate,
    kish,
    quantile_interval,
    rare_share_interval,
    share_interval,
    with_interval,
)
from mismatch_probe.metrics.sample import SPREAD_PROMPTS, Tokens
from mismatch_probe.types import MetricValue

Result = Estimate | MetricValue

LARGEST_LOGPROB = 150.0


def token_metrics() -> dict[str, Callable[[Tokens], Result]]:
    """The function behind each token metric; every one takes at least one token."""
    return {
        "mean_abs_logprob_diff": lambda tokens: tokens.mean(tokens.sums.abs_log_ratio),
        "rms_logprob_diff": _rms_logprob_diff,
        "p99_abs_logprob_diff": _p99_abs_logprob_diff,
        "max_abs_logprob_diff": lambda tokens: MetricValue(tokens.sums.ranges["abs_log_ratio"].high),
        "mean_abs_prob_diff": _of_probabilities(lambda tokens: tokens.mean(tokens.sums.abs_prob_diff)),
        "std_prob_diff": _of_probabilities(lambda tokens: tokens.variance(tokens.sums.prob_gap, 0.5, scales.exp)),
        "max_abs_prob_diff": _of_probabilities(lambda tokens: MetricValue(tokens.sums.prob_gap.ranges[0].high)),
        "pearson_prob": _of_probabilities(_pearson_prob),
        "kl_k1": lambda tokens: tokens.estimate([-tokens.sums.log_ratio], scales.plain, scales.as_is),
        "kl_k2": lambda tokens: tokens.mean(0.5 * tokens.sums.squared_log_ratio),
        "kl_k3": _kl_k3,
        "token_mult_prob_error": _token_mult_prob_error,
        "js_k3": lambda tokens: tokens.mean(tokens.sums.js_k3),
        "chi2_token": lambda tokens: tokens.mean_power(2, tokens.sums.squared_ratio, scales.expm1),
        "ess_token": lambda tokens: tokens.ess(),
        "mean_ratio": lambda tokens: tokens.mean_power(1, tokens.sums.ratio, scales.exp, column=1),
        "frac_outside_clip": _frac_outside_clip,
        "confident_disagreement_rate": _confident_disagreement_rate,
        "confident_disagreement_count": lambda tokens: MetricValue(float(tokens.sums.confident.sum())),
    }


def _of_probabilities(metric: Callable[[Tokens], Result]) -> Callable[[Tokens], Result]:
    """`metric`, unless a broken engine's log-probs are so far above 0 that their exponentials cannot be squared."""

    def guarded(tokens: Tokens) -> Result:
        largest = max(tokens.sums.ranges[name].high for name in ("rollout_logprob", "trainer_logprob"))
        if largest > LARGEST_LOGPROB:
            return MetricValue(None, why=f"a log-prob is {largest:.4g}, so its probability overflows float64")
        return metric(tokens)

    return guarded


def _rms_logprob_diff(tokens: Tokens) -> Estimate:
    return tokens.estimate([tokens.sums.squared_log_ratio], scales.log_root_mean, scales.exp)


def _p99_abs_logprob_diff(tokens: Tokens) -> MetricValue:
    of = tokens.pair.sequences
    value, interval = quantile_interval(tokens.pair.abs_log_ratio, of.prompt, of.n_usable, 0.99)
    return _with_limits("p99_abs_logprob_diff", tokens, value, interval)


def _with_limits(key: str, tokens: Tokens, value: float, interval: tuple[float, float] | None) -> MetricValue:
    if interval is None:
        return MetricValue(value, why=NO_INTERVAL)
    counts = tokens.sums.counts
    return with_interval(value, interval, int(np.count_nonzero(counts)), key=key, effective=kish(counts))


def _pearson_prob(tokens: Tokens) -> Result:
    probs, contrasts = tokens.sums.probs, tokens.sums.prob_contrasts
    if not all(seen.varies for seen in probs.ranges):
        return MetricValue(None, why="the probabilities do not vary")
    sums = probs.of((0,), (1,), (0, 0), (0, 1), (1, 1)) + contrasts.of((0,), (1,), (0, 0), (0, 1))
    working = scales.log_one_minus_correlation
    return tokens.estimate(sums, working, scales.one_minus_exp, least_prompts=SPREAD_PROMPTS)


def _kl_k3(tokens: Tokens) -> Estimate:
    ratio = tokens.sums.ratio
    return tokens.estimate([ratio.sums[:, 0]], scales.log_shifted_mean(ratio.shift), scales.exp)


def _token_mult_prob_error(tokens: Tokens) -> Estimate:
    excess = tokens.sums.abs_ratio
    return tokens.estimate([excess.sums[:, 0]], scales.log_shifted_mean(excess.shift), scales.one_plus_exp)


def _frac_outside_clip(tokens: Tokens) -> MetricValue:
    value = float(tokens.sums.outside_clip.sum() / len(tokens))
    interval = share_interval(tokens.sums.outside_clip, tokens.sums.counts, heavy_tailed=True)
    return _with_limits("frac_outside_clip", tokens, value, interval)


def _confident_disagreement_rate(tokens: Tokens) -> MetricValue:
    """Too rare for a bootstrap: the limits are those of a Poisson count, over n."""
    return MetricValue(
        float(tokens.sums.confident.sum()) / len(tokens),
        *rare_share_interval(tokens.sums.confident, tokens.sums.counts),
    )
