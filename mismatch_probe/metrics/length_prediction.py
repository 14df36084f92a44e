"""What the growth of D says about lengths that were not run: bands for ESS, shares of sequences, KL, and crossings.

Given its kind, D(L) is normal with the variance and mean of `GrowthDraws`; kinds differ in scale, so that D over all
sequences is a scale mixture. E exp(2D), of which the ESS is the inverse, is the exponential of the quadratic variation
Σexpm1(d)² of a kind, averaged over kinds: the few sequences that differ most decide it, as they do in the data.

A band is the 95 % interval over all draws and laws, each law with its weight; the value is their median. Of shares
below one fitted sequence the normal law is no evidence, and their bands say so.

Shape legend: `R` draws, `K` kinds, `M` laws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import special

from mismatch_probe.metrics.growth import GrowthDraws
from mismatch_probe.metrics.intervals import UPPER_TAIL, Floats, join_why
from mismatch_probe.metrics.length import LengthFit, fit_length
from mismatch_probe.metrics.prefixes import PrefixSums
from mismatch_probe.metrics.summary import off_policy_why
from mismatch_probe.types import MetricValue, PairArrays

FURTHEST = 8
KEYS = ("ess_seq", "frac_seq_outside_2", "frac_seq_outside_3", "kl_seq", "seq_log_ratio_std")
THRESHOLDS = (0.5, 0.1)
# With --extrapolate, crossings are looked for up to this many times the observed length.
_HORIZON = 512
_SETTLING_SEQUENCES = 64
_STEPS_PER_DOUBLING = 3


@dataclass(frozen=True)
class LengthPrediction:
    """The predicted law of D at one length.

    Attributes:
        length: Tokens.
        values: By `KEYS`: each with its 95 % band, or None with the reason. `frac_seq_outside_k` is the share of
            sequences whose weight exp D lies outside [1/k, k].
        tokens_needed: Response tokens of sampled sequences that would bring this length within reach; 0 where it is.
    """

    length: int
    values: dict[str, MetricValue]
    tokens_needed: int = 0

    def as_dict(self) -> dict[str, Any]:
        values = {key: value.as_dict() for key, value in self.values.items()}
        return {"length": self.length, **values, "tokens_needed": self.tokens_needed}


@dataclass(frozen=True)
class LengthForecast:
    """A fit with its predictions.

    Attributes:
        fit: The fit.
        predictions: At the lengths that were asked for.
        curve: From an eighth of the observed length to the furthest prediction, for the figure.
        crossings: By ESS threshold: the length, in tokens, at which `ess_seq` falls below it. A limit that lies beyond
            the furthest prediction is None, and `why` says so.
    """

    fit: LengthFit
    predictions: tuple[LengthPrediction, ...]
    curve: tuple[LengthPrediction, ...]
    crossings: dict[float, MetricValue]

    def as_dict(self) -> dict[str, Any]:
        return {
            **self.fit.as_dict(),
            "predictions": [prediction.as_dict() for prediction in self.predictions],
            "crossings": [{"ess_seq": ess, "length": length.as_dict()} for ess, length in self.crossings.items()],
        }


def forecast_pair(
    chunks: Iterable[PairArrays], *, lengths: Sequence[int] = (), extrapolate: bool = False, seed: int = 0
) -> LengthForecast:
    """Fits and predicts one pair; see `forecast`.

    Args:
        chunks: The pair, in parts that hold whole sequences.
        lengths: Lengths to predict, tokens.
        extrapolate: Also beyond 8 times the observed length.
        seed: Seed of the bootstrap.
    """
    sums, off_policy = PrefixSums(), ""
    for chunk in chunks:
        sums.update(chunk)
        off_policy = off_policy or off_policy_why(chunk, "ess_seq")
    fit = fit_length(sums.result(), off_policy=off_policy, seed=seed)
    return forecast(fit, lengths=lengths, extrapolate=extrapolate)


def forecast(fit: LengthFit, *, lengths: Sequence[int] = (), extrapolate: bool = False) -> LengthForecast:
    """Everything that a report says about length.

    Args:
        fit: The fit.
        lengths: Lengths to predict, tokens; by default 2, 4 and 8 times the observed length.
        extrapolate: Also beyond 8 times the observed length.
    """
    observed = fit.observed_length
    wanted = tuple(lengths) or tuple(factor * observed for factor in (2, 4, FURTHEST) if observed)
    end = max([FURTHEST * observed, *(wanted if extrapolate else ())])
    curve = _grid(max(1.0, observed / 8), end) if fit.predictable else []
    return LengthForecast(
        fit,
        tuple(predict(fit, length, extrapolate=extrapolate) for length in wanted),
        tuple(predict(fit, length, extrapolate=extrapolate) for length in curve),
        {ess: crossing_length(fit, ess, extrapolate=extrapolate) for ess in THRESHOLDS},
    )


def predict(fit: LengthFit, length: int, *, extrapolate: bool = False) -> LengthPrediction:
    """The predicted law of D at `length` tokens; no numbers beyond 8 times the observed length unless asked for."""
    if not fit.predictable:
        return LengthPrediction(length, dict.fromkeys(KEYS, MetricValue(None, why=fit.why)))
    needed = _tokens_needed(fit, length)
    if needed and not extrapolate:
        why = (
            f"more than {FURTHEST} times the observed length of {fit.observed_length:,} tokens; {_settle(fit, length)}"
        )
        return LengthPrediction(length, dict.fromkeys(KEYS, MetricValue(None, why=why)), needed)
    why = join_why("" if not needed else f"extrapolated beyond {FURTHEST} times the observed length", fit.why)
    if fit.draws is None:
        exact = {key: 1.0 if key == "ess_seq" else 0.0 for key in KEYS}
        return LengthPrediction(length, {key: MetricValue(x, x, x, why) for key, x in exact.items()}, needed)
    weight = _weights(fit.draws)
    draws = _laws(fit.draws, length / fit.observed_length)
    values = {key: _band(draws[key], weight, why) for key in KEYS}
    for key, k in (("frac_seq_outside_2", 2.0), ("frac_seq_outside_3", 3.0)):
        values[key] = _open_tail(values[key], k, 1 / fit.n_sequences, values["seq_log_ratio_std"], values["kl_seq"])
    return LengthPrediction(length, values, needed)


def crossing_length(fit: LengthFit, ess: float, *, extrapolate: bool = False) -> MetricValue:
    """The length, in tokens, at which `ess_seq` falls below `ess`."""
    if not fit.predictable:
        return MetricValue(None, why=fit.why)
    if fit.draws is None:
        return MetricValue(None, why="never: D is 0 everywhere")
    end = fit.observed_length * (_HORIZON if extrapolate else FURTHEST)
    lengths = np.array(_grid(1.0, end), dtype=np.float64)
    ess_at = np.stack([_laws(fit.draws, length / fit.observed_length)["ess_seq"] for length in lengths])
    # log(−log ESS) is a straight line over log L for a power law of either part.
    bounded = np.clip(ess_at, 1e-300, 1 - 1e-16)
    crossed = _first_above(np.log(lengths), np.log(-np.log(bounded)), math.log(-math.log(ess)))
    low, value, high = _quantiles(np.exp(crossed), _weights(fit.draws))
    notes = [fit.why]
    if math.isinf(high):
        what = "its upper limit" if math.isfinite(value) else "it"
        notes.insert(0, f"{what} lies beyond {end:,} tokens; {_settle(fit, end * 2)}")
    # JSON has no infinity: what lies beyond is None.
    found, lower, upper = (x if math.isfinite(x) else None for x in (value, low, high))
    return MetricValue(found, lower, upper, join_why(*notes))


def _grid(start: float, end: float) -> list[int]:
    n = max(2, math.ceil(math.log2(end / start) * _STEPS_PER_DOUBLING) + 1)
    return sorted({round(length) for length in np.geomspace(start, end, n)})


def _tokens_needed(fit: LengthFit, length: int) -> int:
    if length <= FURTHEST * fit.observed_length:
        return 0
    return _SETTLING_SEQUENCES * math.ceil(length / FURTHEST)


def _settle(fit: LengthFit, length: int) -> str:
    each = math.ceil(length / FURTHEST)
    total = _tokens_needed(fit, length)
    return f"{total:,} tokens would settle it ({_SETTLING_SEQUENCES} prompts with responses of {each:,})"


def _weights(draws: GrowthDraws) -> Floats:
    """`[2·M, R]` weights of the draws of every law, the stationary ones first."""
    n = len(draws.squares)
    trend = np.array([1 - draws.trend_weight, draws.trend_weight])
    laws = (trend[:, None] * np.array(draws.weight)).reshape(-1)
    return np.repeat(laws[:, None] / n, n, axis=1)


def _laws(draws: GrowthDraws, share: float) -> dict[str, Floats]:
    """`[2·M, R]` values of `KEYS` at `share` times the observed length, in the order of `_weights`."""
    zero, one = np.zeros_like(draws.squares), np.ones_like(draws.squares)
    found: dict[str, list[Floats]] = {key: [] for key in KEYS}
    for growth in (share * one, share**draws.trend):
        squares = draws.squares * growth
        for excess, persistence in ((one, zero), (draws.excess, zero), (one, draws.persistence)):
            law = _law(draws, squares * excess, draws.squares * persistence * share**2)
            for key in KEYS:
                found[key].append(law[key])
    return {key: np.stack(values) for key, values in found.items()}


def _law(draws: GrowthDraws, walk: Floats, persistent: Floats) -> dict[str, Floats]:
    """`KEYS` of D with the variance `walk` `[R]` of a martingale and `persistent` `[R]` of a lasting normal part."""
    walks = walk[:, None] * draws.scale
    variance = walks + persistent[:, None]
    kl = draws.k3_share[:, None] * walks + persistent[:, None] / 2
    share = draws.scale_weight

    def mean(values: Floats) -> Floats:
        return np.asarray((share * values).sum(axis=1))

    def outside(k: float) -> Floats:
        std = np.sqrt(np.maximum(variance, np.finfo(np.float64).tiny))
        return mean(special.ndtr((-math.log(k) + kl) / std) + special.ndtr((-math.log(k) - kl) / std))

    kl_seq = mean(kl)
    log_second_moment = special.logsumexp(draws.chi2_share[:, None] * walks, axis=1, b=share) + persistent
    return {
        "ess_seq": np.exp(-log_second_moment),
        "frac_seq_outside_2": outside(2.0),
        "frac_seq_outside_3": outside(3.0),
        "kl_seq": kl_seq,
        "seq_log_ratio_std": np.sqrt(mean(variance) + mean((kl - kl_seq[:, None]) ** 2)),
    }


def _quantiles(values: Floats, weights: Floats) -> tuple[float, float, float]:
    """2.5 %, 50 % and 97.5 % quantiles of weighted values."""
    order = np.argsort(values, axis=None)
    mass = np.cumsum(weights.reshape(-1)[order])
    places = np.searchsorted(mass, np.array([1 - UPPER_TAIL, 0.5, UPPER_TAIL]) * mass[-1])
    low, middle, high = values.reshape(-1)[order][places]
    return float(low), float(middle), float(high)


def _band(values: Floats, weights: Floats, why: str) -> MetricValue:
    low, middle, high = _quantiles(values, weights)
    return MetricValue(middle, low, high, why)


def _open_tail(share: MetricValue, k: float, seen: float, std: MetricValue, kl: MetricValue) -> MetricValue:
    """The share outside [1/k, k] with a band that claims nothing of a tail which the data cannot show.

    Below `seen`, one sequence of those that were fitted, the normal law of D is no evidence: the lower limit is 0, and
    the upper one at least `seen`, or Chebyshev's bound where the spread alone rules that out.
    """
    assert share.ci_low is not None
    assert share.ci_high is not None
    assert std.ci_high is not None
    assert kl.ci_high is not None
    bound = (std.ci_high**2 + kl.ci_high**2) / math.log(k) ** 2
    low = share.ci_low if share.ci_low >= seen else 0.0
    return replace(share, ci_low=low, ci_high=max(share.ci_high, min(seen, bound)))


def _first_above(x: Floats, y: Floats, level: float) -> Floats:
    """Where each of the rising curves `y` `[T, ...]` over `x` `[T]` passes `level`: inf where it never does."""
    above = y > level
    at = np.maximum(above.argmax(axis=0), 1)
    before = np.take_along_axis(y, at[None] - 1, axis=0)[0]
    after = np.take_along_axis(y, at[None], axis=0)[0]
    part = np.clip((level - before) / np.maximum(after - before, 1e-300), 0.0, 1.0)
    return np.where(above.any(axis=0), x[at - 1] + part * (x[at] - x[at - 1]), np.inf)
