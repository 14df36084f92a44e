"""How D grows with length in one pair: what was measured, the growth law fitted to it, and whether that law holds.

The law itself: `metrics.growth`. It is fitted to prefixes of the long sequences, so that the last tokens, and the short
sequences, are news to it. It is asked for the law of D at the lengths that some sequences have. What was measured of
these contradicts it where the 95 % interval of a larger spread or a smaller ESS (99 % of all else) has no point in
common with the law's band, or where the value lies so far off that nobody need ask: where one sequence decides the
spread, its interval holds everything.

The intervals of spread and ESS are by their cluster standard error, with the degrees of freedom that the prompts'
influence leaves; those of KL and shares by the error that the law itself gives as many independent sequences as there
are prompts. Of eight sound laws, 60 fits each of 64 prompts a quarter of whose responses end early, none was withheld
(`validation/length_calibration.py --synthetic`).

Shape legend: `S` sequences, `P` prompts, `G` lengths of the grid, `J` fitted lengths, `H` lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from mismatch_probe.metrics.chunks import Ints, group_sums
from mismatch_probe.metrics.growth import MODELS, OUTSIDE, GrowthDraws, GrowthSample, bands
from mismatch_probe.metrics.inference import degrees_of_freedom, excess_kurtosis
from mismatch_probe.metrics.info import CALIBRATED_PROMPTS
from mismatch_probe.metrics.intervals import UNCALIBRATED, Floats, join_why
from mismatch_probe.metrics.ratio_test import NEGLIGIBLE
from mismatch_probe.metrics.sums import Prefixes
from mismatch_probe.types import MetricValue

# Of a larger spread or a smaller ESS than predicted. For less mismatch, which is what a sample without the tail shows,
# and for KL and shares, whose own noise decides, more is asked.
_LEVEL_MORE, _LEVEL = 0.05, 0.01
# A variance, or −log ESS, this many times beyond the band needs no test.
_FAR = 4.0
# Below this many effective sequences the ESS of a sample lies far above that of its law.
_FEWEST_EFFECTIVE = 10.0
# Of sequences of many lengths the law is that of this many groups.
_MOST_LENGTHS = 4
_NAMES = {"ess_seq": "the ESS", "seq_log_ratio_std": "the standard deviation of D", "kl_seq": "−mean D"}
_NAMES |= {key: f"the share of weights outside [1/{k:g}, {k:g}]" for key, k in OUTSIDE.items()}
MIN_PROMPTS = 8
MIN_LENGTH = 8
REPLICATES = 400
_FITTED_LENGTHS = 4
# By which the interval of the mean of D may miss both of its predictions, which are estimates themselves.
_DRIFT_FACTOR = 1.5
# Of the bootstrap's replicates; the others consist of sequences that hardly differ, and are left out.
_USABLE_SHARE = 0.95


@dataclass(frozen=True)
class Sums:
    """D of some sequences of at least 8 prompts, each over some number of its tokens.

    Attributes:
        prompt: `[S]` prompt of each.
        n_tokens: `[S]` tokens, at least 1.
        log_ratio: `[S]` D over these, nats.
    """

    prompt: Ints
    n_tokens: Ints
    log_ratio: Floats


def contradictions(draws: GrowthDraws, observed_length: int, n_sequences: int, sets: Iterable[Sums]) -> dict[str, str]:
    """By key of `length_law.KEYS` how what was measured contradicts the law, with both numbers; empty where it holds.

    Args:
        draws: The growth law.
        observed_length: The length of its sums, tokens.
        n_sequences: Sequences that it was fitted to.
        sets: What was measured.
    """
    found: dict[str, str] = {}
    for sums in sets:
        predicted = bands(draws, _groups(sums.n_tokens) / observed_length, n_sequences)
        measured = _Measured(sums)
        for key, band in predicted.items():
            if measured.contradicts(key, band, predicted["seq_log_ratio_std"]):
                found.setdefault(key, _why(key, measured.values[key], band, sums))
    return found


def _groups(n_tokens: Ints) -> Floats:
    """`[H]` mean lengths of equally many sequences each."""
    groups = np.array_split(np.sort(n_tokens), min(_MOST_LENGTHS, len(np.unique(n_tokens))))
    return np.array([group.mean() for group in groups])


def _why(key: str, value: float, band: MetricValue, sums: Sums) -> str:
    return (
        f"{_NAMES[key]} of {len(sums.prompt):,} sequences, at {sums.n_tokens.mean():.0f} tokens on average, is "
        f"{value:.3g}, predicted {band.value:.3g} [{band.ci_low:.3g}, {band.ci_high:.3g}]"
    )


class _Measured:
    """Values of `KEYS` over some sequences, and what these say of bands."""

    def __init__(self, sums: Sums) -> None:
        d = sums.log_ratio
        self._prompt = np.unique(sums.prompt, return_inverse=True)[1]
        self._n_prompts = int(self._prompt.max()) + 1
        self._square = (d - d.mean()) ** 2
        weight = np.exp(d - d.max())
        self._excess = weight / weight.mean() - 1
        self.values = {
            "ess_seq": float(1 / (1 + (self._excess**2).mean())),
            "kl_seq": float(-d.mean()),
            "seq_log_ratio_std": float(d.std(ddof=1)),
            **{key: float((np.abs(d) > math.log(k)).mean()) for key, k in OUTSIDE.items()},
        }

    def contradicts(self, key: str, band: MetricValue, std: MetricValue) -> bool:
        """Whether no law within `band` is likely to give such a value; `std` is the band of the spread."""
        value = self.values[key]
        if band.ci_low is None or band.ci_high is None or std.ci_high is None or band.ci_low <= value <= band.ci_high:
            return False
        edge = band.ci_low if value < band.ci_low else band.ci_high
        if key == "kl_seq":
            return bool(2 * special.ndtr(-abs(value - edge) * math.sqrt(self._n_prompts) / std.ci_high) < _LEVEL)
        if key in OUTSIDE:
            return self._p_share(value, edge) < _LEVEL
        if key == "ess_seq":
            if value > edge and value * len(self._excess) < _FEWEST_EFFECTIVE:
                return False
            squares = self._excess**2
            distance = _log_ratio(squares.mean(), 1 / edge - 1 if edge > 0 else math.inf)
            far = _log_ratio(-math.log(value), -math.log(edge) if edge > 0 else math.inf)
            influence = squares / squares.mean() - 1 - 2 * self._excess
        else:
            distance = far = _log_ratio(value**2, edge**2)
            influence = self._square / self._square.mean() - 1
        level = _LEVEL_MORE if distance > 0 else _LEVEL
        return abs(far) > math.log(_FAR) or self._p_normal(abs(distance), influence) < level

    def _p_share(self, value: float, edge: float) -> float:
        """Two-sided p-value of a share of as many sequences as there are prompts."""
        n, k = self._n_prompts, value * self._n_prompts
        tail = special.betainc(k, n - k + 1, edge) if value > edge else special.betainc(n - k, k + 1, 1 - edge)
        return 2 * float(tail)

    def _p_normal(self, distance: float, influence: Floats) -> float:
        """Two-sided p-value of a distance from mean influence values `[S]`."""
        pull = group_sums(self._prompt, influence, self._n_prompts) / len(influence)
        error = math.sqrt(float((pull**2).sum()) * self._n_prompts / (self._n_prompts - 1))
        degrees = degrees_of_freedom(excess_kurtosis(pull), self._n_prompts)
        return float(2 * special.stdtr(degrees, -distance / error)) if error > 0 else 0.0


def _log_ratio(x: float, y: float) -> float:
    """log(x/y) of non-negative numbers, ±inf where one of them is 0 or infinite."""
    if x == y:
        return 0.0
    if x == 0 or math.isinf(y):
        return -math.inf
    return math.inf if y == 0 else math.log(x) - math.log(y)


@dataclass(frozen=True)
class MeasuredLengths:
    """D(L) of the sequences that reach L, for the lengths that at least 2 prompts reach.

    Attributes:
        length: `[G]` tokens.
        n: `[G]` sequences.
        std: `[G]` `seq_log_ratio_std` of D(L), nats.
        ess: `[G]` their `ess_seq`.
    """

    length: Ints
    n: Ints
    std: Floats
    ess: Floats


@dataclass(frozen=True)
class LengthFit:
    """Growth of D with length.

    Attributes:
        measured: What was seen, at every length.
        observed_length: Longest length, in tokens, that enough prompts reach (see `fit_length`); 0 if none.
        n_sequences: Sequences that reach it: the fit's sample.
        n_prompts: Their prompts.
        n_cut: Sequences of the pair that were cut before an unusable token.
        variance_exponent: γ of Var D ~ L^γ over the last factor of 8 in length: 1 a random walk, 2 persistent.
        variance_ratio: Var D at the observed length over that of a random walk with the same tokens.
        mean: `seq_log_ratio_mean` at the observed length, nats.
        draws: The growth law; None where nothing can be predicted, or nothing differs.
        identical: Whether D is 0 everywhere: then it is at every length.
        contradicted: By key of `length_law.KEYS` the measured value that the law does not hold: that key is not
            predicted. Where it is the spread of D or the ESS, nothing is.
        why: Why nothing can be predicted, or what limits it.
    """

    measured: MeasuredLengths
    observed_length: int
    n_sequences: int
    n_prompts: int
    n_cut: int
    variance_exponent: MetricValue
    variance_ratio: MetricValue
    mean: MetricValue
    draws: GrowthDraws | None
    identical: bool
    contradicted: dict[str, str]
    why: str

    @property
    def predictable(self) -> bool:
        return self.identical or self.draws is not None

    @property
    def model_weight(self) -> dict[str, float]:
        """Weight of each growth law in the prediction; empty where there is none."""
        return {} if self.draws is None else dict(zip(MODELS, self.draws.weight, strict=True))

    @property
    def trend_weight(self) -> float | None:
        """Weight of a trend of the mean; None where nothing is predicted."""
        return None if self.draws is None else self.draws.trend_weight


def fit_length(prefixes: Prefixes, *, off_policy: str = "", seed: int = 0, replicates: int = REPLICATES) -> LengthFit:
    """Fits the growth of D on the sequences that reach the observed length.

    That is the longest length of the grid that half of the prompts reach, where at least 8 and at most 32 are asked
    for. Only these sequences count, at every fitted length, so that a length is not compared with other sequences than
    the next; they stand for whatever goes on to be longer. Where the law contradicts what was measured at that length,
    over all tokens of these sequences, or over all tokens of all (see `metrics.length`), it predicts nothing, or
    not the values that it contradicts.

    Args:
        prefixes: Prefix sums of one pair.
        off_policy: Why exp(b) is not the sampling distribution of these tokens; then nothing is fitted.
        seed: Seed of the bootstrap over prompts.
        replicates: Bootstrap replicates.
    """
    if off_policy:
        return _no_fit(prefixes, off_policy)
    reached = prefixes.reached_by()
    needed = max(MIN_PROMPTS, min(CALIBRATED_PROMPTS, -(-int(reached.max(initial=0)) // 2)))
    long_enough = np.flatnonzero((reached >= needed) & (prefixes.length >= MIN_LENGTH))
    if not len(long_enough):
        return _no_fit(prefixes, f"fewer than {needed} prompts have a response of {MIN_LENGTH} tokens or more")
    sample = _sample(prefixes, int(long_enough[-1]), seed, replicates)
    if not (np.isfinite(sample.chi2).all() and np.isfinite(sample.squares).all()):
        return _no_fit(prefixes, "a token differs so much that exp(2d) overflows float64")
    identical = not sample.squares.any()
    if not identical:
        usable = sample.usable
        if not usable[0]:
            return _no_fit(prefixes, "D does not vary between sequences, or not in both halves of them")
        if usable.mean() < _USABLE_SHARE:
            return _no_fit(prefixes, "D differs from 0 in too few prompts")
        sample = replace(sample, weights=sample.weights[usable])
    draws = None if identical else sample.draws()
    contradicted = {} if draws is None else _contradictions(prefixes, int(long_enough[-1]), draws)
    no_law = _contradicted_spread(contradicted)
    if identical and prefixes.total.any():
        no_law = f"D is 0 over {sample.length[-1]:,.0f} tokens of {len(sample.prompt):,} sequences, and not everywhere"
    same = MetricValue(None, why=no_law or "D is 0 everywhere")
    mean = sample.interval(sample.mean(sample.log_ratio[:, -1]))
    limits = join_why(
        UNCALIBRATED if sample.n_prompts < CALIBRATED_PROMPTS else "", "" if identical else _drift_why(sample, mean)
    )
    return LengthFit(
        measured=_measured(prefixes),
        observed_length=int(sample.length[-1]),
        n_sequences=len(sample.prompt),
        n_prompts=sample.n_prompts,
        n_cut=prefixes.n_cut,
        variance_exponent=same if identical or no_law else sample.exponent(),
        variance_ratio=same if identical or no_law else sample.variance_ratio(),
        mean=mean,
        draws=None if no_law else draws,
        identical=identical and not no_law,
        contradicted=contradicted,
        why=no_law or limits,
    )


def _contradicted_spread(contradicted: dict[str, str]) -> str:
    """Why there is no law at all: every key rests on the spread of D, and the ESS is what is asked of the weights."""
    spread = [contradicted[key] for key in ("ess_seq", "seq_log_ratio_std") if key in contradicted]
    return f"the growth law contradicts what was measured: {'; '.join(spread)}" if spread else ""


def _contradictions(prefixes: Prefixes, last: int, draws: GrowthDraws) -> dict[str, str]:
    """Of the fitted sequences at the observed length and over all their tokens, and of all sequences over all."""
    length = int(prefixes.length[last])
    fitted, some = ~np.isnan(prefixes.log_ratio[:, last]), prefixes.n_tokens > 0
    sets = [Sums(prefixes.prompt[rows], prefixes.n_tokens[rows], prefixes.total[rows]) for rows in (fitted, some)]
    at_length = Sums(sets[0].prompt, np.full(len(sets[0].prompt), length), prefixes.log_ratio[fitted, last])
    if (sets[1].n_tokens == length).all():  # three times the same
        sets = []
    return contradictions(draws, length, len(at_length.prompt), [at_length, *sets])


def _sample(prefixes: Prefixes, last: int, seed: int, replicates: int) -> GrowthSample:
    rows = ~np.isnan(prefixes.log_ratio[:, last])
    halvings = prefixes.length[last] // 2 ** np.arange(_FITTED_LENGTHS)[::-1]
    columns = np.searchsorted(prefixes.length, halvings)
    names, prompt = np.unique(prefixes.prompt[rows], return_inverse=True)
    n = len(names)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=replicates)
    return GrowthSample(
        prompt=prompt.astype(np.int64),
        length=prefixes.length[columns].astype(np.float64),
        log_ratio=prefixes.log_ratio[rows][:, columns],
        squares=prefixes.squares[rows][:, columns],
        k3=prefixes.k3[rows, last],
        chi2=prefixes.chi2[rows, last],
        weights=np.concatenate([np.ones((1, n)), draws]),
    )


def _drift_why(sample: GrowthSample, mean: MetricValue) -> str:
    """Says so when −mean D is neither the Σk3 of a martingale nor the ½ Var D of a normal D with mean weight 1."""
    kl = sorted([float(sample.k3.mean()), float(np.exp(sample.log_variance[0, -1])) / 2])
    assert mean.ci_low is not None
    assert mean.ci_high is not None
    if -mean.ci_low >= kl[0] / _DRIFT_FACTOR and -mean.ci_high <= kl[1] * _DRIFT_FACTOR:
        return ""
    drift = max(-mean.ci_low, mean.ci_high) / sample.length[-1]
    if drift <= NEGLIGIBLE:
        return f"D drifts by at most {drift:.1e} nats a token, the known bias of float32 log-softmax"
    return "the mean of D does not fit its variance, so exp(b) is not the sampling distribution (see mean_ratio)"


def _measured(prefixes: Prefixes) -> MeasuredLengths:
    shown = np.flatnonzero(prefixes.reached_by() >= 2)
    columns = [prefixes.log_ratio[~np.isnan(prefixes.log_ratio[:, g]), g] for g in shown]
    n = np.array([len(d) for d in columns], dtype=np.int64)
    ess = [np.exp(2 * special.logsumexp(d) - special.logsumexp(2 * d)) / len(d) for d in columns]
    return MeasuredLengths(prefixes.length[shown], n, np.array([d.std(ddof=1) for d in columns]), np.array(ess))


def _no_fit(prefixes: Prefixes, why: str) -> LengthFit:
    none = MetricValue(None, why=why)
    return LengthFit(_measured(prefixes), 0, 0, 0, prefixes.n_cut, none, none, none, None, False, {}, why)
