"""All metrics of a pair of policies over the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np

from mismatch_probe.metrics import scales
from mismatch_probe.metrics.accumulate import PairSums, as_sums
from mismatch_probe.metrics.catalog import CATALOG, in_order, metric_info, ratio_key
from mismatch_probe.metrics.exact import ExactRows, exact_metrics
from mismatch_probe.metrics.further import frac_ratio_beyond, further_sequence_metrics, further_token_metrics
from mismatch_probe.metrics.intervals import (
    Estimate,
    Floats,
    Working,
    evaluate,
    join_why,
    kish,
    quantile_interval,
    rare_share_interval,
)
from mismatch_probe.metrics.sample import (
    SPREAD_PROMPTS,
    PairTokens,
    Sequences,
    Tokens,
    count_excluded,
    few_decide,
    of_probabilities,
    usable_sequences,
    usable_tokens,
)
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
Rows = TypeVar("Rows")
NO_TOKENS = "there are no response tokens"
OFF_POLICY = "the rollout policy did not sample these tokens"


def token_metrics() -> dict[str, Callable[[Tokens], Result]]:
    """The function behind each token metric; every one takes at least one token."""
    return {
        "mean_abs_logprob_diff": lambda tokens: tokens.mean(tokens.sums.abs_log_ratio),
        "rms_logprob_diff": _rms_logprob_diff,
        "p99_abs_logprob_diff": _p99_abs_logprob_diff,
        "max_abs_logprob_diff": lambda tokens: MetricValue(tokens.sums.ranges["abs_log_ratio"].high),
        "mean_abs_prob_diff": of_probabilities(lambda tokens: tokens.mean(tokens.sums.abs_prob_diff)),
        "std_prob_diff": of_probabilities(lambda tokens: tokens.variance(tokens.sums.prob_gap, 0.5, scales.exp)),
        "max_abs_prob_diff": of_probabilities(lambda tokens: MetricValue(tokens.sums.prob_gap.ranges[0].high)),
        "pearson_prob": of_probabilities(_pearson_prob),
        "kl_k1": lambda tokens: tokens.estimate([-tokens.sums.log_ratio], scales.plain, scales.as_is),
        "kl_k2": lambda tokens: tokens.mean(0.5 * tokens.sums.squared_log_ratio),
        "kl_k3": _kl_k3,
        "token_mult_prob_error": _token_mult_prob_error,
        "js_k3": lambda tokens: tokens.mean(tokens.sums.js_k3),
        "chi2_token": lambda tokens: tokens.mean_power(2, tokens.sums.squared_ratio, scales.expm1),
        "ess_token": lambda tokens: tokens.ess(),
        "mean_ratio": lambda tokens: tokens.mean_power(1, tokens.sums.ratio, scales.exp, column=1),
        "frac_outside_clip": lambda tokens: tokens.share("frac_outside_clip", tokens.sums.outside_clip),
        "confident_disagreement_rate": _confident_disagreement_rate,
        "confident_disagreement_count": lambda tokens: MetricValue(float(tokens.sums.confident.sum())),
        **further_token_metrics(),
    }


def _rms_logprob_diff(tokens: Tokens) -> Estimate:
    return tokens.estimate([tokens.sums.squared_log_ratio], scales.log_root_mean, scales.exp)


def _p99_abs_logprob_diff(tokens: Tokens) -> MetricValue:
    of = tokens.pair.sequences
    value, interval = quantile_interval(tokens.pair.log_ratio, of.prompt, of.n_usable, 0.99, absolute=True)
    return tokens.with_limits("p99_abs_logprob_diff", value, interval)


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


def _confident_disagreement_rate(tokens: Tokens) -> MetricValue:
    """Too rare for a bootstrap: the limits are those of a Poisson count, over n."""
    return MetricValue(
        float(tokens.sums.confident.sum()) / len(tokens),
        *rare_share_interval(tokens.sums.confident, tokens.sums.counts),
    )


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
        **further_sequence_metrics(),
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


def compute_metrics(
    pair: PairTokens,
    exact: ExactRows | None = None,
    *,
    keys: Collection[str] = tuple(CATALOG),
    ratio_limits: Collection[float] = (),
    seed: int = 0,
    replicates: int = 1000,
) -> dict[str, MetricValue]:
    """Metrics of the catalog, in its order, each with its value or the reason why it has none.

    Unusable tokens are left out of token metrics, sequences with any of them out of sequence metrics, and then every
    metric says over how many rows it was computed.

    Args:
        pair: The paired log-probs, or their sums where they came in chunks or another clip range is wanted.
        exact: The positions at which full rows of logits were compared; without them exact metrics have no value.
        keys: Which ones; all by default.
        ratio_limits: Factors τ above 1 of which `ratio_key(τ)` is computed, too.
        seed: Seed of the bootstrap; the same pair and seed give the same intervals.
        replicates: Bootstrap replicates.
    """
    sums = as_sums(pair)
    n_tokens, n_sequences = sums.n_tokens, len(sums.sequences.length)
    beyond = {ratio_key(limit): partial(frac_ratio_beyond, limit=limit) for limit in ratio_limits}
    wanted = in_order([*(key for key in CATALOG if key in keys), *beyond])
    if n_tokens == 0:
        return dict.fromkeys(wanted, MetricValue(None, why=NO_TOKENS))
    tokens, sequences = usable_tokens(sums), usable_sequences(sums, exact)
    no_token = f"none of the {n_tokens} tokens has usable log-probs"
    no_sequence = f"none of the {n_sequences} sequences has usable log-probs throughout"
    of_tokens = {key: metric for key, metric in token_metrics().items() if key in keys} | beyond
    of_sequences = {key: metric for key, metric in sequence_metrics().items() if key in keys}
    results = {
        **_build(of_tokens, tokens, len(tokens), sums, no_token),
        **_build(of_sequences, sequences, len(sequences), sums, no_sequence),
        **{key: result for key, result in exact_metrics(exact, seed).items() if key in keys},
    }
    estimates = {key: result for key, result in results.items() if isinstance(result, Estimate)}
    values = evaluate(estimates, seed=seed, replicates=replicates)
    values |= {key: result for key, result in results.items() if isinstance(result, MetricValue)}
    notes = {"token": "", "sequence": "", "exact": ""}
    if count_excluded(sums):
        notes["token"] = f"computed over the {len(tokens)} of {n_tokens} tokens with usable log-probs"
        notes["sequence"] = f"computed over the {len(sequences)} of {n_sequences} sequences with usable log-probs"
    return {key: _annotate(values[key], notes[info.level]) for key in wanted if (info := metric_info(key))}


def _build(
    metrics: Mapping[str, Callable[[Rows], Result]], rows: Rows, n_rows: int, pair: PairSums, why_none: str
) -> dict[str, Result]:
    results: dict[str, Result] = {}
    for key, metric in metrics.items():
        off_policy = off_policy_why(pair, key)
        if off_policy or n_rows == 0:
            results[key] = MetricValue(None, why=off_policy or why_none)
        else:
            results[key] = metric(rows)
    return results


def off_policy_why(pair: PairTokens, key: str) -> str:
    """Why metric `key` does not apply to `pair`; empty where it does."""
    info = metric_info(key)
    if pair.on_policy or info is None or not info.needs_on_policy:
        return ""
    return pair.off_policy_why or OFF_POLICY


def _annotate(value: MetricValue, note: str) -> MetricValue:
    return value if value.value is None else replace(value, why=join_why(note, value.why))
