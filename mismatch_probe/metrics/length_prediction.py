"""What the growth of D says about lengths that were not run: bands for ESS, shares of sequences, KL, and crossings.

The law and its bands: `metrics.growth`. Nothing is said where the law contradicts what was measured
(`metrics.length`): the fit has the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mismatch_probe.metrics.growth import KEYS as KEYS
from mismatch_probe.metrics.growth import bands, few_decide, law_weights, laws, quantiles
from mismatch_probe.metrics.intervals import Floats, join_why
from mismatch_probe.metrics.length import LengthFit, fit_length
from mismatch_probe.metrics.summary import off_policy_why
from mismatch_probe.metrics.sums import PrefixSums
from mismatch_probe.types import MetricValue, PairArrays

FURTHEST = 8
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

    def mark(self, ess: float) -> str:
        """Where few prompts decide the crossing of `ess`: how many."""
        length = self.crossings[ess].value
        if self.fit.draws is None or length is None:
            return ""
        return few_decide(self.fit.draws, length / self.fit.observed_length, self.fit.n_prompts).get("ess_seq", "")


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
    share = length / fit.observed_length
    values = bands(fit.draws, np.array([share]), fit.n_sequences, why)
    for key, mark in few_decide(fit.draws, share, fit.n_prompts).items():
        values[key] = replace(values[key], why=join_why(mark, values[key].why))
    values |= {key: MetricValue(None, why=reason) for key, reason in fit.contradicted.items()}
    return LengthPrediction(length, values, needed)


def crossing_length(fit: LengthFit, ess: float, *, extrapolate: bool = False) -> MetricValue:
    """The length, in tokens, at which `ess_seq` falls below `ess`."""
    if not fit.predictable:
        return MetricValue(None, why=fit.why)
    if fit.draws is None:
        return MetricValue(None, why="never: D is 0 everywhere")
    end = fit.observed_length * (_HORIZON if extrapolate else FURTHEST)
    lengths = np.array(_grid(1.0, end), dtype=np.float64)
    ess_at = np.stack([laws(fit.draws, length / fit.observed_length)["ess_seq"] for length in lengths])
    # log(−log ESS) is a straight line over log L for a power law of either part.
    bounded = np.clip(ess_at, 1e-300, 1 - 1e-16)
    crossed = _first_above(np.log(lengths), np.log(-np.log(bounded)), math.log(-math.log(ess)))
    low, value, high = quantiles(np.exp(crossed), law_weights(fit.draws))
    share = (value if math.isfinite(value) else end) / fit.observed_length
    notes = [few_decide(fit.draws, share, fit.n_prompts).get("ess_seq", ""), fit.why]
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


def _first_above(x: Floats, y: Floats, level: float) -> Floats:
    """Where each of the rising curves `y` `[T, ...]` over `x` `[T]` passes `level`: inf where it never does."""
    above = y > level
    at = np.maximum(above.argmax(axis=0), 1)
    before = np.take_along_axis(y, at[None] - 1, axis=0)[0]
    after = np.take_along_axis(y, at[None], axis=0)[0]
    part = np.clip((level - before) / np.maximum(after - before, 1e-300), 0.0, 1.0)
    return np.where(above.any(axis=0), x[at - 1] + part * (x[at] - x[at - 1]), np.inf)
