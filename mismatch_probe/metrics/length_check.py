"""Whether a fitted growth law holds what was measured: at the observed length, and to the ends of responses.

A law is fitted to prefixes of the long sequences, so that the last tokens, and the short sequences, are news to it. It
is asked for the law of D at the lengths that some sequences have. What was measured of these contradicts it where the
95 % interval of a larger spread or a smaller ESS (99 % of all else) has no point in common with the law's band, or
where the value lies so far off that nobody need ask: where one sequence decides the spread, its interval holds
everything.

The intervals of spread and ESS are by their cluster standard error, with the degrees of freedom that the prompts'
influence leaves; those of KL and shares by the error that the law itself gives as many independent sequences as there
are prompts. Of eight sound laws, 60 fits each of 64 prompts a quarter of whose responses end early, none was withheld
(`validation/length_calibration.py --synthetic`).

Shape legend: `S` sequences, `P` prompts, `H` lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import special

from mismatch_probe.metrics.chunks import Ints, group_sums
from mismatch_probe.metrics.growth import GrowthDraws
from mismatch_probe.metrics.inference import degrees_of_freedom, excess_kurtosis
from mismatch_probe.metrics.intervals import Floats
from mismatch_probe.metrics.length_law import OUTSIDE, bands
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
