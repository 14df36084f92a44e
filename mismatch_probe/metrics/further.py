"""Metrics that the same data allow beside the first ones: supports, entropy, tails, straight lines, temperature.

Those of d alone come from the d of every token, at the end; the others from sums that grew with the chunks.

Shape legend: `n` usable tokens, `S` sequences, `P` prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from mismatch_probe.metrics import scales
from mismatch_probe.metrics.catalog import ratio_key
from mismatch_probe.metrics.chunks import Side
from mismatch_probe.metrics.fits import SLOPE_TOKENS
from mismatch_probe.metrics.intervals import (
    NO_INTERVAL,
    Estimate,
    Floats,
    join_why,
    kish,
    quantile_interval,
    share_interval,
    with_interval,
)
from mismatch_probe.metrics.sample import SPREAD_PROMPTS, Sequences, Tokens, of_probabilities
from mismatch_probe.types import MetricValue

_NO_VALUE: dict[Side, str] = {
    "rollout": "the rollout's entropy is not known; --exact-kl keeps rows of logits, which have it",
    "trainer": "the trainer pass has no entropies",
}
Result = Estimate | MetricValue


def further_token_metrics() -> dict[str, Callable[[Tokens], Result]]:
    """The function behind each token metric of `FURTHER_TOKEN`; every one takes at least one token."""
    return {
        "frac_ratio_beyond_2": lambda tokens: frac_ratio_beyond(tokens, 2.0),
        "frac_bitwise_equal": lambda tokens: tokens.share("frac_bitwise_equal", tokens.per_prompt(lambda d: d == 0)),
        "kl_entropy_ratio": _kl_entropy_ratio,
        "binary_tv": of_probabilities(lambda tokens: tokens.mean(tokens.sums.abs_prob_diff)),
        "binary_kl": of_probabilities(_binary_kl),
        "tail_slope": of_probabilities(_tail_slope),
        "logprob_slope": lambda tokens: _line(tokens, offset=False),
        "logprob_offset": lambda tokens: _line(tokens, offset=True),
        "temperature_rollout_side": lambda tokens: _temperature(tokens, "rollout"),
        "temperature_trainer_side": lambda tokens: _temperature(tokens, "trainer"),
        "median_log_ratio": _median_log_ratio,
        "mean_inverse_ratio": lambda tokens: tokens.mean_exp(np.negative),
        "winsorised_ratio": lambda tokens: _winsorised(tokens, 1),
        "winsorised_ratio_hidden": lambda tokens: _hidden(tokens, 1),
        "winsorised_inverse_ratio": lambda tokens: _winsorised(tokens, -1),
        "winsorised_inverse_ratio_hidden": lambda tokens: _hidden(tokens, -1),
    }


def frac_ratio_beyond(tokens: Tokens, limit: float) -> MetricValue:
    """F(τ): the fraction of tokens with ρ above `limit` or below its inverse. Source: R3 (arXiv 2510.11370)."""
    log_limit = math.log(limit)
    return tokens.share(ratio_key(limit), tokens.per_prompt(lambda d: (d > log_limit) | (d < -log_limit)))


def _kl_entropy_ratio(tokens: Tokens) -> Result:
    known = tokens.sums.fits.entropy
    n, (k3, entropy) = int(known.counts.sum()), known.sums.T
    if n == 0:
        return MetricValue(None, why=_NO_VALUE["trainer"])
    if not entropy.any():
        return MetricValue(None, why="the trainer's entropy is 0 at every token")
    why = "" if n == len(tokens) else f"over the {n} of {len(tokens)} tokens whose entropy is known"
    return tokens.estimate([k3, entropy], scales.log_ratio_of_means, scales.exp, counts=known.counts, why=why)


def _binary_kl(tokens: Tokens) -> Result:
    known = tokens.sums.fits.binary_kl
    n = int(known.counts.sum())
    if n == 0:
        return MetricValue(None, why="the trainer's probability rounds to 1 at every token")
    why = "" if n == len(tokens) else f"infinite at {len(tokens) - n} tokens, whose π rounds to 1; without them"
    return tokens.estimate([known.sums[:, 0]], scales.log_mean, scales.exp, counts=known.counts, why=why)


def _tail_slope(tokens: Tokens) -> Result:
    tail = tokens.sums.fits.tail
    if not tail.ranges[0].varies:
        return MetricValue(None, why="the rollout's probabilities do not vary")
    sums = tail.of((0,), (1,), (0, 0), (0, 1))
    return tokens.estimate(sums, scales.slope, scales.as_is, least_prompts=SPREAD_PROMPTS)


def _line(tokens: Tokens, *, offset: bool) -> Result:
    """Least squares of a on b, as of d on b, whose slope is 1 less: it keeps its digits."""
    line = tokens.sums.fits.line
    if not line.ranges[0].varies:
        return MetricValue(None, why="the rollout's log-probs do not vary")
    sums = line.of((0,), (1,), (0, 0), (0, 1))
    if offset:
        working = scales.intercept(float(line.centre[0]), float(line.centre[1]))
        return tokens.estimate(sums, working, scales.as_is, least_prompts=SPREAD_PROMPTS)
    return tokens.estimate(sums, scales.slope, scales.one_plus, least_prompts=SPREAD_PROMPTS)


def _temperature(tokens: Tokens, side: Side) -> Result:
    known, sign = tokens.sums.fits.temperature[side], 1.0 if side == "rollout" else -1.0
    n, (product, square) = int(known.counts.sum()), known.sums.T
    if n == 0:
        return MetricValue(None, why=_NO_VALUE[side])
    if not square.sum() > 0:
        return MetricValue(None, why="every token is certain")
    if not square.sum() + sign * product.sum() > 0:
        return MetricValue(None, why="no temperature above 0 fits")
    why = "" if n == len(tokens) else f"over the {n} of {len(tokens)} tokens whose entropy is known"
    columns = [product, square]
    return tokens.estimate(
        columns, scales.log_temperature(sign), scales.exp, counts=known.counts, why=why, least_prompts=SPREAD_PROMPTS
    )


def _median_log_ratio(tokens: Tokens) -> MetricValue:
    """With the interval of a quantile (Woodruff 1952), where tokens at the median count in part as above it: many of
    them are exactly 0.
    """
    _, value, _ = tokens.log_ratio_cuts
    above, ties = tokens.per_prompt(lambda d: d > value), tokens.per_prompt(lambda d: d == value)
    part = (0.5 * len(tokens) - above.sum()) / ties.sum() if ties.any() else 0.0
    interval = share_interval(above + part * ties, tokens.sums.counts, heavy_tailed=True)
    if interval is None:
        return tokens.with_limits("median_log_ratio", value, None)
    low, high = tokens.log_ratio_quantiles(1 - interval[1], 1 - interval[0])
    return tokens.with_limits("median_log_ratio", value, (min(value, low), max(value, high)))


def _cap(tokens: Tokens, sign: Literal[1, -1]) -> float:
    """The cap on ±d, nats: what a winsorised mean makes of larger values."""
    low, _, high = tokens.log_ratio_cuts
    return high if sign == 1 else -low


def _winsorised(tokens: Tokens, sign: Literal[1, -1]) -> Estimate:
    cap = _cap(tokens, sign)
    return tokens.mean_exp(lambda d: np.minimum(sign * d, cap))


def _hidden(tokens: Tokens, sign: Literal[1, -1]) -> MetricValue:
    cap = _cap(tokens, sign)
    beyond = tokens.pair.log_ratio.whole(lambda d: d[sign * d > cap])
    with np.errstate(over="ignore"):
        value = float((np.exp(cap) * np.expm1(sign * beyond - cap)).sum() / len(tokens))
    return MetricValue(value) if math.isfinite(value) else MetricValue(None, why="overflows float64")


def further_sequence_metrics() -> dict[str, Callable[[Sequences], Result]]:
    """The function behind each sequence metric of `FURTHER_SEQUENCE`; every one takes at least one sequence."""
    return {
        "logprob_slope_seq_p10": lambda seqs: _slope(seqs, "logprob_slope_seq_p10", 0.1),
        "logprob_slope_seq_p90": lambda seqs: _slope(seqs, "logprob_slope_seq_p90", 0.9),
        "seq_max_token_kl_p50": lambda seqs: _max_token_kl(seqs, "seq_max_token_kl_p50", 0.5),
        "seq_max_token_kl_p90": lambda seqs: _max_token_kl(seqs, "seq_max_token_kl_p90", 0.9),
        "seq_max_token_kl_max": lambda seqs: _max_token_kl(seqs, "seq_max_token_kl_max", 1.0),
        "first_order_residual": _first_order_residual,
    }


def _slope(seqs: Sequences, key: str, level: float) -> MetricValue:
    some = ~np.isnan(seqs.slope)
    if not some.any():
        return MetricValue(None, why=f"no sequence has {SLOPE_TOKENS} tokens whose log-probs vary")
    why = "" if some.all() else f"over the {int(some.sum())} of {len(some)} sequences that have a slope"
    return _quantile(seqs, key, seqs.slope[some], some, level, why)


def _max_token_kl(seqs: Sequences, key: str, level: float) -> MetricValue:
    infinite = int(np.count_nonzero(~np.isfinite(seqs.max_token_kl)))
    if infinite:
        return MetricValue(None, why=f"not finite in {infinite} of {len(seqs)} sequences")
    why = "the exact KL of compared rows of logits" if seqs.max_token_kl_exact else ""
    return _quantile(seqs, key, seqs.max_token_kl, np.ones(len(seqs), dtype=bool), level, why)


def _quantile(
    seqs: Sequences, key: str, values: Floats, some: np.ndarray[tuple[int], np.dtype[np.bool_]], level: float, why: str
) -> MetricValue:
    """A quantile of the `values` of `some` sequences; the largest has no interval."""
    if level == 1:
        return MetricValue(float(values.max()), why=why)
    prompt = seqs.prompt[some]
    value, interval = quantile_interval(values, prompt, np.ones(len(prompt), dtype=np.int64), level)
    if interval is None:
        return MetricValue(value, why=join_why(why, NO_INTERVAL))
    counts = np.bincount(prompt).astype(np.float64)
    return with_interval(value, interval, int(np.count_nonzero(counts)), why, key=key, effective=kish(counts))


def _first_order_residual(seqs: Sequences) -> Result:
    """|k3(D) − Σ k3(d)|, which is |e^D − 1 − Σ(ρ − 1)| without its cancellation."""
    if (seqs.length == 1).all():
        return MetricValue(0.0, why="every sequence is one token, whose weight is its own ratio")
    with np.errstate(over="ignore", invalid="ignore"):
        residual = np.abs(scales.k3(seqs.seq_log_ratio) - seqs.k3)
    if not np.isfinite(residual).all():
        return MetricValue(None, why="overflows float64")
    return seqs.estimate([residual], scales.log_mean, scales.exp)
