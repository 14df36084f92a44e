"""The law by which Var D grows with length, its bootstrap draws, and what they say of D at a length.

On policy, E[ρ_t | past] = 1 makes exp D(L) a martingale with mean 1. To second order in d, D is then a random walk
whose variance is its quadratic variation, E D(L)² ≈ E Σd², and its drift is exactly E D(L) = −E Σk3(d). The token sums
Σd², Σk3 and Σexpm1(d)² are far less noisy than D itself, so they carry the prediction, and D says whether they may: its
variance over Σd² is 1 at every length for a random walk, another constant for short-range correlation, and grows with
L where something persists over a sequence. The last two are no martingale's: there exp(b) is not quite the sampling
law. The test is the variance ratio of Lo and MacKinlay (1988), with the prompt as its unit.

Three laws of that ratio compete, and stationarity against a power-law trend of the token sums, with Akaike's weights
(Burnham and Anderson 2002, section 2.9). In `validation/length_calibration.py --synthetic` the Bayesian criterion gave
narrower bands, but covered a weak persistence in 2 of 3 cases instead of 4 of 5: 64 prompts cannot tell it from none. A
power law for Var D itself is only reported, as `variance_exponent`.

At a length, the law gives ESS, shares of sequences, KL and spread, with their bands. Given its kind, D(L) is normal
with the variance and mean of `GrowthDraws`; kinds differ in scale, so that D over all sequences is a scale mixture. E
exp(2D), of which the ESS is the inverse, is the exponential of the quadratic variation Σexpm1(d)² of a kind, averaged
over kinds: the few sequences that differ most decide it, as they do in the data.

A band is the 95 % interval over all draws and laws, each law with its weight; the value is their median. Of shares
below one fitted sequence the normal law is no evidence, and their bands say so.

A band presumes that the prompts at hand have shown how much prompts differ. Where noise has a heavy tail between
prompts no sample has: under a lognormal one E exp(2D) is infinite, so that the ESS of ever more sequences falls to 0,
and the few prompts that differ most decide the band. `few_decide` says so.

Shape legend: `S` sequences, `P` prompts, `R` draws (row 0 is the sample itself), `J` fitted lengths, `K` scales, one a
kind of sequence, `M` laws, `H` lengths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import special

from mismatch_probe.metrics.chunks import Ints, group_sums
from mismatch_probe.metrics.inference import degrees_of_freedom, excess_kurtosis, heavy_tail_stretch, student
from mismatch_probe.metrics.intervals import UPPER_TAIL, Floats, join_why, with_interval
from mismatch_probe.types import MetricValue

MODELS = ("random_walk", "correlated", "persistent")

_MOST_SCALES = 64
# Of a free parameter, in units of log likelihood.
_PRICE = 1.0
_PERSISTENCE = np.append(0.0, np.geomspace(1e-3, 1e5, 161))
KEYS = ("ess_seq", "frac_seq_outside_2", "frac_seq_outside_3", "kl_seq", "seq_log_ratio_std")
# Where fewer of the prompts decide a value, it is marked.
_DECIDING_SHARE = 0.25
# By key the k of the share of sequences whose weight lies outside [1/k, k].
OUTSIDE = {"frac_seq_outside_2": 2.0, "frac_seq_outside_3": 3.0}


@dataclass(frozen=True)
class GrowthDraws:
    """Draws of the growth law. The token sums at length L are those at the observed length times (L/L_observed)^trend.

    Attributes:
        squares: `[R]` E Σd² at the observed length.
        k3_share: `[R]` E Σk3 over E Σd².
        chi2_share: `[R]` E Σexpm1(d)² over E Σd².
        trend: `[R]` the power, where it is fitted; 1 is stationary.
        excess: `[R]` Var D over E Σd², where it is one constant.
        persistence: `[R]` x, where it is 1 + x L/L_observed.
        scale: `[R, K]` quadratic variation of K kinds of sequences, relative to the mean.
        scale_weight: `[R, K]` their shares of the sequences.
        trend_weight: Weight of the fitted trend; stationarity has the rest.
        weight: Weights of the `MODELS` of the ratio.
    """

    squares: Floats
    k3_share: Floats
    chi2_share: Floats
    trend: Floats
    excess: Floats
    persistence: Floats
    scale: Floats
    scale_weight: Floats
    trend_weight: float
    weight: tuple[float, ...]


@dataclass(frozen=True)
class GrowthSample:
    """The sequences of a fit, all of which reach the longest fitted length.

    Attributes:
        prompt: `[S]` prompt of each, 0 … P−1, every one of them used.
        length: `[J]` fitted lengths, tokens, each about twice the one before.
        log_ratio: `[S, J]` D(L), nats.
        squares: `[S, J]` Σ d².
        k3: `[S]` Σ k3 at the longest.
        chi2: `[S]` Σ expm1(d)² at the longest.
        weights: `[R, P]` bootstrap weights of the prompts, all 1 in row 0.
    """

    prompt: Ints
    length: Floats
    log_ratio: Floats
    squares: Floats
    k3: Floats
    chi2: Floats
    weights: Floats

    @property
    def n_prompts(self) -> int:
        return int(self.weights.shape[1])

    def mean(self, column: Floats) -> Floats:
        """`[R]` or `[R, J]` means of `column` `[S]` or `[S, J]` in each replicate."""
        if column.ndim > 1:
            return np.stack([self.mean(part) for part in column.T], axis=1)
        return np.asarray(self.weights @ group_sums(self.prompt, column, self.n_prompts) / self._counts)

    @cached_property
    def _counts(self) -> Floats:
        return np.asarray(self.weights @ np.bincount(self.prompt, minlength=self.n_prompts))

    @cached_property
    def log_variance(self) -> Floats:
        """`[R, J]` log Var D, with n − 1 degrees of freedom in the number of prompts."""
        centred = self.log_ratio - self.log_ratio.mean(axis=0)
        variance = np.maximum(self.mean(centred**2) - self.mean(centred) ** 2, 0.0)
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(variance * self.n_prompts / (self.n_prompts - 1)))

    @property
    def usable(self) -> NDArray[np.bool_]:
        """`[R]` replicates in which D varies at every length, and tokens of both halves of the sequences differ."""
        squares = self.mean(self.squares)
        halves = (squares[:, -2] > 0) & (squares[:, -1] > squares[:, -2])
        return np.asarray(halves & np.isfinite(self.log_variance).all(axis=1))

    @cached_property
    def heterogeneity(self) -> Floats:
        """`[R]` variance of a sequence's lasting rate of Σd², relative to the squared mean.

        From the covariance of the two halves of the sequences, so that the noise of either half drops out.
        """
        first = self.squares[:, -2]
        second = self.squares[:, -1] - first
        product = self.mean(first) * self.mean(second)
        return np.maximum(self.mean(first * second) / product - 1, 0.0)

    def widened(self, draws: Floats, *, heavy_tailed: bool = False) -> Floats:
        """Draws `[R, ...]` with the spread of a t interval (Efron and Tibshirani 1993, section 12.5).

        Of token sums, whose prompts are `heavy_tailed`, with that of `metrics.intervals` under heavy tails.
        """
        n = self.n_prompts
        quantile = special.stdtrit(n - 1, UPPER_TAIL)
        if heavy_tailed:
            sums = group_sums(self.prompt, self.squares[:, -1] / self.squares[:, -1].mean() - 1, n)
            degrees = degrees_of_freedom(excess_kurtosis(sums), n)
            quantile = max(student(degrees), quantile * heavy_tail_stretch(degrees, n))
        factor = quantile / special.ndtri(UPPER_TAIL) * np.sqrt(n / (n - 1))
        return np.asarray(draws[0] + factor * (draws - draws[0]))

    def interval(self, draws: Floats) -> MetricValue:
        """A value with the 95 % percentile interval of its widened draws `[R]`."""
        usable = self.widened(draws)[np.isfinite(draws)]
        low, high = np.quantile(usable, (1 - UPPER_TAIL, UPPER_TAIL))
        return with_interval(float(draws[0]), (float(low), float(high)), self.n_prompts)

    def exponent(self) -> MetricValue:
        """γ of Var D ~ L^γ, the least-squares slope of log Var D on log L."""
        x = np.log(self.length) - np.log(self.length).mean()
        return self.interval(self.log_variance @ x / (x @ x))

    @cached_property
    def log_ratio_of_variances(self) -> Floats:
        """`[R, J]` log of Var D over what a random walk with these token sums and lasting rates would have."""
        squares = self.mean(self.squares)
        drift = (self.mean(self.k3) / squares[:, -1])[:, None] * squares
        return np.asarray(self.log_variance - np.log(squares + self.heterogeneity[:, None] * drift**2))

    def variance_ratio(self) -> MetricValue:
        """Var D over that of a random walk, at the longest length."""
        found = self.interval(self.log_ratio_of_variances[:, -1])
        assert found.value is not None
        assert found.ci_low is not None
        assert found.ci_high is not None
        low, value, high = np.exp([found.ci_low, found.value, found.ci_high])
        return MetricValue(float(value), float(low), float(high), found.why)

    def draws(self) -> GrowthDraws:
        """The growth law with its uncertainty."""
        squares = self.mean(self.squares)
        ratio = self.widened(self.log_ratio_of_variances)
        covariance = self._covariance(ratio)
        spread = float(ratio[1:, -1].std())
        ratio = ratio[0] + (ratio - ratio[0]) * np.sqrt(covariance[-1, -1]) / max(spread, 1e-12)
        precision = np.asarray(np.linalg.inv(covariance), dtype=np.float64)
        excess, persistence, misfit = _fit_ratio(ratio, self.length / self.length[-1], precision)
        doubled = np.log(self.length[-1] / self.length[-2])
        trend = self.widened(np.log(squares[:, -1] / squares[:, -2]) / doubled)
        surprise = (trend[0] - 1) ** 2 / max(float(trend[1:].var()), 1e-12)
        weight = special.softmax(-0.5 * misfit - np.array([0.0, _PRICE, _PRICE]))
        scale, scale_weight = self._scales()
        log_squares = np.log(squares[:, -1])
        return GrowthDraws(
            squares=np.exp(self.widened(log_squares, heavy_tailed=True)),
            k3_share=np.exp(self.widened(np.log(self.mean(self.k3)) - log_squares)),
            chi2_share=np.exp(self.widened(np.log(self.mean(self.chi2)) - log_squares)),
            trend=np.maximum(trend, 0.0),
            excess=np.exp(excess),
            persistence=persistence,
            scale=scale,
            scale_weight=scale_weight,
            trend_weight=float(special.expit(0.5 * surprise - _PRICE)),
            weight=tuple(float(w) for w in weight),
        )

    def _covariance(self, ratio: Floats) -> Floats:
        """Covariance `[J, J]` of log Var D for a normal random walk, larger where the draws `ratio` `[R, J]` say so.

        The bootstrap's own covariance is no base for a test: it is small by chance in just those samples whose
        variance is far off.
        """
        overlap = np.minimum.outer(self.length, self.length) / np.maximum.outer(self.length, self.length)
        normal = 2 / (len(self.prompt) - 1)
        return np.asarray(max(normal, float(ratio[1:, -1].var())) * overlap)

    def _scales(self) -> tuple[Floats, Floats]:
        """Lasting rates `[R, K]` of kinds of sequences relative to the mean, and their shares `[R, K]`.

        Kinds are quantiles of the observed rate, pulled towards the mean until their variance is the heterogeneity. The
        sequences of the highest rates are kinds of their own: E exp(2D) is theirs, and a mean over them is below it.
        """
        rate = self.squares[:, -1]
        n_kinds = min(_MOST_SCALES, len(rate))
        kind = np.empty(len(rate), dtype=np.int64)
        place, alone = np.arange(len(rate)), n_kinds // 2
        rest = len(rate) - alone
        kind[np.argsort(rate, kind="stable")] = np.where(
            place < rest, place * (n_kinds - alone) // rest, place - len(rate) + n_kinds
        )
        centre = np.bincount(kind, weights=rate) / np.bincount(kind)
        share = self.mean((kind[:, None] == np.arange(n_kinds)).astype(np.float64))
        mean = (share * centre).sum(axis=1, keepdims=True)
        relative = centre / mean - 1
        spread = (share * relative**2).sum(axis=1)
        pull = np.sqrt(self.heterogeneity / np.where(spread > 0, spread, 1.0)).clip(0.0, 1.0)
        return 1 + pull[:, None] * relative, share


def _fit_ratio(ratio: Floats, share: Floats, precision: Floats) -> tuple[Floats, Floats, NDArray[np.float64]]:
    """Fits a constant and 1 + x·share to the ratios exp(`ratio`) `[R, J]` at shares `[J]` of the observed length.

    Returns:
        The constant's logarithm `[R]`, x `[R]`, and the misfit χ² of each of the `MODELS` to row 0.
    """
    gain = precision.sum(axis=0) / precision.sum()
    constant = ratio @ gain
    laws = np.log1p(_PERSISTENCE[:, None] * share)  # [X, J]
    quadratic = np.einsum("xj,jk,xk->x", laws, precision, laws)
    best = np.argmin(quadratic - 2 * ratio @ precision @ laws.T, axis=1)
    residuals = np.stack([ratio[0], ratio[0] - constant[0], ratio[0] - laws[best[0]]])
    return constant, _PERSISTENCE[best], np.einsum("mj,jk,mk->m", residuals, precision, residuals)


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
