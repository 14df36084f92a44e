"""Token metrics: means over all response tokens of all sequences. Definitions in METRICS.md, table "Token metrics"."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from mismatch_probe.metrics import scales
from mismatch_probe.metrics.intervals import (
    NO_INTERVAL,
    Estimate,
    poisson_interval,
    quantile_interval,
    share_interval,
    with_interval,
)
from mismatch_probe.metrics.sample import Tokens
from mismatch_probe.types import MetricValue

Clip = tuple[float, float]
Result = Estimate | MetricValue

DEFAULT_CLIP: Clip = (0.8, 1.28)
# A confident disagreement: the rollout gave the token about even odds or better, the trainer e² times less.
CONFIDENT_ROLLOUT_LOGPROB = -0.7
CONFIDENT_LOG_RATIO = -2.0
LARGEST_LOGPROB = 150.0


def token_metrics(clip: Clip = DEFAULT_CLIP) -> dict[str, Callable[[Tokens], Result]]:
    """The function behind each token metric; every one takes at least one token.

    Args:
        clip: Bounds of `frac_outside_clip` on the importance ratio.
    """
    return {
        "mean_abs_logprob_diff": lambda tokens: tokens.mean(tokens.abs_log_ratio),
        "rms_logprob_diff": _rms_logprob_diff,
        "p99_abs_logprob_diff": _p99_abs_logprob_diff,
        "max_abs_logprob_diff": lambda tokens: MetricValue(float(tokens.abs_log_ratio.max())),
        "mean_abs_prob_diff": _of_probabilities(lambda tokens: tokens.mean(tokens.abs_prob_diff)),
        "std_prob_diff": _of_probabilities(lambda tokens: tokens.variance(tokens.abs_prob_diff, 0.5, scales.exp)),
        "max_abs_prob_diff": _of_probabilities(lambda tokens: MetricValue(float(tokens.abs_prob_diff.max()))),
        "pearson_prob": _of_probabilities(_pearson_prob),
        "kl_k1": lambda tokens: tokens.estimate([-tokens.log_ratio], scales.plain, scales.as_is),
        "kl_k2": lambda tokens: tokens.mean(0.5 * tokens.log_ratio**2),
        "kl_k3": _kl_k3,
        "token_mult_prob_error": _token_mult_prob_error,
        "js_k3": _js_k3,
        "chi2_token": lambda tokens: tokens.mean_exp(2 * tokens.log_ratio, scales.expm1),
        "ess_token": lambda tokens: tokens.ess(tokens.log_ratio),
        "mean_ratio": lambda tokens: tokens.mean_exp(tokens.log_ratio, scales.exp),
        "frac_outside_clip": lambda tokens: _frac_outside_clip(tokens, clip),
        "confident_disagreement_rate": _confident_disagreement_rate,
        "confident_disagreement_count": lambda tokens: MetricValue(float(_confident_disagreements(tokens))),
    }


def _of_probabilities(metric: Callable[[Tokens], Result]) -> Callable[[Tokens], Result]:
    """`metric`, unless a broken engine's log-probs are so far above 0 that their exponentials cannot be squared."""

    def guarded(tokens: Tokens) -> Result:
        largest = max(float(tokens.rollout_logprob.max()), float(tokens.trainer_logprob.max()))
        if largest > LARGEST_LOGPROB:
            return MetricValue(None, why=f"a log-prob is {largest:.4g}, so its probability overflows float64")
        return metric(tokens)

    return guarded


def _rms_logprob_diff(tokens: Tokens) -> Estimate:
    return tokens.estimate([tokens.log_ratio**2], scales.log_root_mean, scales.exp)


def _p99_abs_logprob_diff(tokens: Tokens) -> MetricValue:
    value, interval = quantile_interval(tokens.abs_log_ratio, tokens.prompt, 0.99)
    if interval is None:
        return MetricValue(value, why=NO_INTERVAL)
    return with_interval(value, interval, int(np.count_nonzero(tokens.rows_per_prompt)))


def _pearson_prob(tokens: Tokens) -> Result:
    rollout, trainer = np.exp(tokens.rollout_logprob), np.exp(tokens.trainer_logprob)
    if not (scales.centred(rollout).any() and scales.centred(trainer).any()):
        return MetricValue(None, why="the probabilities do not vary")
    delta, total = scales.centred(tokens.prob_diff), scales.centred(rollout + trainer)
    columns = [delta, total, delta**2, total**2, delta * total]
    return tokens.estimate(columns, scales.log_one_minus_correlation, scales.one_minus_exp)


def _kl_k3(tokens: Tokens) -> Estimate:
    shift = scales.shift_of(tokens.log_ratio)
    return tokens.estimate([scales.shifted_k3(tokens.log_ratio, shift)], scales.log_shifted_mean(shift), scales.exp)


def _token_mult_prob_error(tokens: Tokens) -> Estimate:
    shift = scales.shift_of(tokens.abs_log_ratio)
    excess = scales.shifted_expm1(tokens.abs_log_ratio, shift)
    return tokens.estimate([excess], scales.log_shifted_mean(shift), scales.one_plus_exp)


def _js_k3(tokens: Tokens) -> Estimate:
    """½k3(a − m) + ½k3(b − m), m = log(½e^a + ½e^b); with t = |d| the two arguments are x and x − t."""
    larger = -np.log1p(0.5 * np.expm1(-tokens.abs_log_ratio))
    return tokens.mean(0.5 * scales.k3(larger) + 0.5 * scales.k3(larger - tokens.abs_log_ratio))


def _frac_outside_clip(tokens: Tokens, clip: Clip) -> MetricValue:
    outside = (tokens.log_ratio < math.log(clip[0])) | (tokens.log_ratio > math.log(clip[1]))
    value = float(outside.mean())
    interval = share_interval(tokens.per_prompt(outside.astype(np.float64)), tokens.rows_per_prompt)
    if interval is None:
        return MetricValue(value, why=NO_INTERVAL)
    return with_interval(value, interval, int(np.count_nonzero(tokens.rows_per_prompt)))


def _confident_disagreements(tokens: Tokens) -> int:
    confident = tokens.rollout_logprob > CONFIDENT_ROLLOUT_LOGPROB
    return int(np.count_nonzero(confident & (tokens.log_ratio < CONFIDENT_LOG_RATIO)))


def _confident_disagreement_rate(tokens: Tokens) -> MetricValue:
    """Too rare for a bootstrap: the limits are those of a Poisson count, over n."""
    n, count = len(tokens), _confident_disagreements(tokens)
    low, high = poisson_interval(count)
    return MetricValue(count / n, low / n, high / n)
