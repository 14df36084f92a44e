"""The law of D at a length, from the draws of a growth law: ESS, shares of sequences, KL and spread, with their bands.

Given its kind, D(L) is normal with the variance and mean of `GrowthDraws`; kinds differ in scale, so that D over all
sequences is a scale mixture. E exp(2D), of which the ESS is the inverse, is the exponential of the quadratic variation
Σexpm1(d)² of a kind, averaged over kinds: the few sequences that differ most decide it, as they do in the data.

A band is the 95 % interval over all draws and laws, each law with its weight; the value is their median. Of shares
below one fitted sequence the normal law is no evidence, and their bands say so.

A band presumes that the prompts at hand have shown how much prompts differ. Where noise has a heavy tail between
prompts no sample has: under a lognormal one E exp(2D) is infinite, so that the ESS of ever more sequences falls to 0,
and the few prompts that differ most decide the band. `few_decide` says so.

Shape legend: `R` draws, `K` kinds, `M` laws, `H` lengths.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from scipy import special

from mismatch_probe.metrics.growth import GrowthDraws
from mismatch_probe.metrics.intervals import UPPER_TAIL, Floats, join_why
from mismatch_probe.types import MetricValue

KEYS = ("ess_seq", "frac_seq_outside_2", "frac_seq_outside_3", "kl_seq", "seq_log_ratio_std")
# Where fewer of the prompts decide a value, it is marked.
_DECIDING_SHARE = 0.25
# By key the k of the share of sequences whose weight lies outside [1/k, k].
OUTSIDE = {"frac_seq_outside_2": 2.0, "frac_seq_outside_3": 3.0}


def bands(draws: GrowthDraws, shares: Floats, n_sequences: int, why: str = "") -> dict[str, MetricValue]:
    """The law of D by `KEYS`, each with its 95 % band.

    Args:
        draws: The growth law.
        shares: `[H]` lengths over the observed one; of several, the law is that of all sequences together when equally
            many have each.
        n_sequences: Sequences that were fitted.
        why: What limits the values.
    """
    weight = law_weights(draws)
    found = _mixed([laws(draws, float(share)) for share in shares])
    values = {key: _band(found[key], weight, why) for key in KEYS}
    for key, k in OUTSIDE.items():
        values[key] = _open_tail(values[key], k, 1 / n_sequences, values["seq_log_ratio_std"], values["kl_seq"])
    return values


def few_decide(draws: GrowthDraws, share: float, n_prompts: int) -> dict[str, str]:
    """By key a mark where few prompts decide the value at `share` times the observed length.

    Their number is Kish's, of what each kind of sequences adds to E exp(2D), of which the ESS is the inverse, and to
    the quadratic variation, whose mean and spread are in the variance of D.
    """
    scale, kinds = draws.scale[0], draws.scale_weight[0]
    log_moment = draws.chi2_share[0] * draws.squares[0] * share * scale
    found = {}
    for key, part in (("ess_seq", np.exp(log_moment - log_moment.max())), ("seq_log_ratio_std", scale)):
        deciding = float((kinds * part).sum() ** 2 / (kinds * part**2).sum())
        if deciding < _DECIDING_SHARE:
            n = max(1, round(deciding * n_prompts))
            found[key] = f"uncalibrated: {n:,} of {n_prompts:,} prompts decide it"
    return found


def law_weights(draws: GrowthDraws) -> Floats:
    """`[2·M, R]` weights of the draws of every law, the stationary ones first."""
    n = len(draws.squares)
    trend = np.array([1 - draws.trend_weight, draws.trend_weight])
    laws = (trend[:, None] * np.array(draws.weight)).reshape(-1)
    return np.repeat(laws[:, None] / n, n, axis=1)


def laws(draws: GrowthDraws, share: float) -> dict[str, Floats]:
    """`[2·M, R]` values of `KEYS` at `share` times the observed length, in the order of `law_weights`."""
    zero, one = np.zeros_like(draws.squares), np.ones_like(draws.squares)
    found: dict[str, list[Floats]] = {key: [] for key in KEYS}
    for growth in (share * one, share**draws.trend):
        squares = draws.squares * growth
        for excess, persistence in ((one, zero), (draws.excess, zero), (one, draws.persistence)):
            law = _law(draws, squares * excess, draws.squares * persistence * share**2)
            for key in KEYS:
                found[key].append(law[key])
    return {key: np.stack(values) for key, values in found.items()}


def _mixed(found: list[dict[str, Floats]]) -> dict[str, Floats]:
    """The law over sequences of several lengths, equally many of each, from the laws at each; E exp D is 1 at all."""
    if len(found) == 1:
        return found[0]
    parts = {key: np.stack([law[key] for law in found]) for key in KEYS}
    mixed = {key: values.mean(axis=0) for key, values in parts.items()}
    with np.errstate(divide="ignore", over="ignore"):
        mixed["ess_seq"] = 1 / (1 / parts["ess_seq"]).mean(axis=0)
    variance = (parts["seq_log_ratio_std"] ** 2).mean(axis=0) + parts["kl_seq"].var(axis=0)
    return mixed | {"seq_log_ratio_std": np.sqrt(variance)}


def _law(draws: GrowthDraws, walk: Floats, persistent: Floats) -> dict[str, Floats]:
    """`KEYS` of D with the variance `walk` `[R]` of a martingale and `persistent` `[R]` of a lasting normal part."""
    walks = walk[:, None] * draws.scale
    variance = walks + persistent[:, None]
    kl = draws.k3_share[:, None] * walks + persistent[:, None] / 2
    kinds = draws.scale_weight

    def mean(values: Floats) -> Floats:
        return np.asarray((kinds * values).sum(axis=1))

    def outside(k: float) -> Floats:
        std = np.sqrt(np.maximum(variance, np.finfo(np.float64).tiny))
        share = mean(special.ndtr((-math.log(k) + kl) / std) + special.ndtr((-math.log(k) - kl) / std))
        return np.minimum(share, 1.0)

    kl_seq = mean(kl)
    log_second_moment = special.logsumexp(draws.chi2_share[:, None] * walks, axis=1, b=kinds) + persistent
    return {
        "ess_seq": np.exp(-np.maximum(log_second_moment, 0.0)),  # shares sum to 1 but for rounding
        "frac_seq_outside_2": outside(2.0),
        "frac_seq_outside_3": outside(3.0),
        "kl_seq": kl_seq,
        "seq_log_ratio_std": np.sqrt(mean(variance) + mean((kl - kl_seq[:, None]) ** 2)),
    }


def quantiles(values: Floats, weights: Floats) -> tuple[float, float, float]:
    """2.5 %, 50 % and 97.5 % quantiles of weighted values."""
    order = np.argsort(values, axis=None)
    mass = np.cumsum(weights.reshape(-1)[order])
    places = np.searchsorted(mass, np.array([1 - UPPER_TAIL, 0.5, UPPER_TAIL]) * mass[-1])
    low, middle, high = values.reshape(-1)[order][places]
    return float(low), float(middle), float(high)


def _band(values: Floats, weights: Floats, why: str) -> MetricValue:
    low, middle, high = quantiles(values, weights)
    if not math.isfinite(low + high):
        return MetricValue(None, why=join_why("overflows float64", why))
    return MetricValue(middle, low, high, why)


def _open_tail(share: MetricValue, k: float, seen: float, std: MetricValue, kl: MetricValue) -> MetricValue:
    """The share outside [1/k, k] with a band that claims nothing of a tail which the data cannot show.

    Below `seen`, one sequence of those that were fitted, the normal law of D is no evidence: the lower limit is 0, and
    the upper one at least `seen`, or Chebyshev's bound where the spread alone rules that out.
    """
    if share.ci_low is None or share.ci_high is None or std.ci_high is None or kl.ci_high is None:
        return share
    bound = (std.ci_high**2 + kl.ci_high**2) / math.log(k) ** 2
    low = share.ci_low if share.ci_low >= seen else 0.0
    return replace(share, ci_low=low, ci_high=max(share.ci_high, min(seen, bound)))
