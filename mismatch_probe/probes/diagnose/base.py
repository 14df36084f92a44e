"""What a signature is: a stated change of what is expected of a token, fitted on some prompts and judged on others.

Shape legend: `N` tokens that count, `K` levels of a group, `S` sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.probes.diagnose.evidence import Evidence, Floats, Ints, Mask
from mismatch_probe.probes.diagnose.noise import Noise, bins, fit_noise, quick_likelihood, t_log_density, uncertainty

Kind = Literal["labels", "rows", "weights", "forward"]
SeenBy = Literal["fact", "key", "pattern"]
_SEARCHED = 3_000
BEYOND_BASELINE = 2.0
"""So many times the baseline's mean |d| is more than rounding."""
UNEXPLAINED = 20.0
"""Nats that a token costs which cannot be used and for which nothing accounts."""
_LEAST_GROUP = 15
_LEAST_PLAIN = 0.05  # of all
_OTHER_SIGN = 0.03  # of all shifts
_UNITS_OFF, _OFF_ONE = 5.0, 0.02  # standard errors over prompts, and size
_TURNS, _REFITS = 4, 12
_LARGEST_SPREAD = 15.0
LEAST_SPREAD = float(np.log(1.5))
"""Of less, noise differs between groups for many reasons."""


@dataclass(frozen=True)
class State:
    """What is expected of the trainer's log-probs, with what has been explained so far.

    Attributes:
        expected: `[N]` a as it follows from b, nats.
        known: `[N]` whether b says anything of a; a token for which it does not is like any other of the trainer's.
        spread: `[N]` log of what the scale of the noise is multiplied with.
        accounted: `[N]` tokens that cannot be used and for which something accounts.
    """

    expected: Floats
    known: Mask
    spread: Floats
    accounted: Mask

    @classmethod
    def start(cls, evidence: Evidence) -> State:
        """Nothing is explained: a is b and noise."""
        n = len(evidence)
        return cls(
            np.where(evidence.usable, evidence.rollout, 0.0), evidence.usable.copy(), np.zeros(n), np.zeros(n, np.bool_)
        )

    def moved(self, expected: Floats) -> State:
        """The same with another expectation."""
        return replace(self, expected=expected)

    def widened(self, spread: Floats) -> State:
        """The same with so much more noise."""
        return replace(self, spread=self.spread + spread)

    def without(self, tokens: Mask) -> State:
        """The same without what b says of some tokens."""
        return replace(self, known=self.known & ~tokens)

    def accounting_for(self, tokens: Mask) -> State:
        """The same with an account of tokens that cannot be used."""
        return replace(self, accounted=self.accounted | tokens)


@dataclass(frozen=True)
class Fit:
    """A signature, fitted.

    Attributes:
        log_density: `[N]` of a under it, by token; sums are what counts.
        state: What is expected once it is explained.
        shown: `[N]` tokens that show it.
        parameters: What was fitted, by name.
    """

    log_density: Floats
    state: State
    shown: Mask
    parameters: Mapping[str, float | str] = field(default_factory=dict)


def widens(fit: Fit, before: State) -> bool:
    """Whether a fit says no more than that some tokens are noisier."""
    return bool((fit.state.spread != before.spread).any())


Fitter = Callable[[Evidence, State, Mask], Fit | None]
"""Takes the table, what is explained so far and the tokens `[N]` to fit to; None where it cannot be so."""


@dataclass(frozen=True)
class Signature:
    """A class of faults that a table of log-probs can tell from others.

    Attributes:
        name: In kebab case.
        title: What is wrong, a sentence without its stop.
        causes: What makes it, told apart by experiments only.
        confirm: What would settle it.
        fix: What to do, naming the switch of frameworks where it is known.
        fit: Fits it.
        kind: What kind of thing is wrong.
        seen_by: What shows it. A fact needs no statistics. A key is one that the dump has to name, or what is expected
            of each token. A pattern of noise has to stand out more: noise differs by place and by sequence anyway.
        last: Whether it is asked only when no other explains anything more.
    """

    name: str
    title: str
    causes: tuple[str, ...]
    confirm: str
    fix: str
    fit: Fitter
    kind: Kind
    seen_by: SeenBy = "key"
    last: bool = False


def noise_of(evidence: Evidence, state: State, train: Mask, weight: Floats | None = None) -> Noise:
    """The noise of the tokens to fit to."""
    use = train & state.known
    return fit_noise(
        residual(evidence, state)[use],
        uncertainty(state.expected[use]),
        state.spread[use],
        None if weight is None else weight[use],
    )


def marginal(evidence: Evidence, train: Mask) -> Floats:
    """`[N]` log density of a by itself: Student's t about the median of the tokens to fit to."""
    use = train & evidence.usable
    a = evidence.trainer[use]
    centre = float(np.median(a)) if len(a) else 0.0
    noise = fit_noise(a - centre, np.zeros(len(a)))
    rest, scale = np.where(evidence.usable, evidence.trainer, centre) - centre, noise.scale(np.zeros(1))
    return np.asarray(t_log_density(rest / scale, noise.degrees) - np.log(scale))


def log_density(evidence: Evidence, state: State, train: Mask) -> Floats:
    """`[N]` of a under a state, whose noise is fitted to `train` `[N]`."""
    found = noise_of(evidence, state, train).log_density(
        residual(evidence, state), uncertainty(state.expected), state.spread
    )
    return complete(evidence, state, train, found)


def complete(evidence: Evidence, state: State, train: Mask, values: Floats) -> Floats:
    """`[N]` log densities of tokens that are expected something of, and those of the others.

    A usable token without an expectation is like any other of the trainer's. One that is not usable is as unlikely as
    can be, unless something accounts for it.
    """
    if not (state.known == evidence.usable).all():
        values = np.where(state.known, values, marginal(evidence, train))
    return np.where(evidence.usable, values, np.where(state.accounted, 0.0, -UNEXPLAINED))


CAP = 3.0
"""Sizes are of residuals that are cut at so many nats, so that a few tokens do not decide them."""


def mean_gap(evidence: Evidence, state: State, tokens: Mask) -> float:
    """Mean |a − expected| of some tokens `[N]`, cut at `CAP` nats a token; 0 where nothing is expected of them."""
    sizes = np.minimum(np.abs(residual(evidence, state)[tokens & state.known]), CAP)
    return float(sizes.mean()) if len(sizes) else 0.0


def quiet(evidence: Evidence, state: State, tokens: Mask, times: float = BEYOND_BASELINE) -> bool:
    """Whether some tokens `[N]` are off by no more than so many times rounding, as far as that is known."""
    return evidence.baseline is None or mean_gap(evidence, state, tokens) <= times * evidence.baseline


def residual(evidence: Evidence, state: State) -> Floats:
    """`[N]` a less what is expected, 0 where nothing is."""
    return np.where(state.known, evidence.trainer, state.expected) - state.expected


def per_sequence(evidence: Evidence, state: State, values: Floats) -> Floats:
    """`[S]` sums of values `[N]` over the tokens that something is expected of."""
    return np.bincount(evidence.sequence, np.where(state.known, values, 0.0), len(evidence.prompt)).astype(np.float64)


@dataclass(frozen=True)
class Variant:
    """One of the forms that a signature can take."""

    state: State
    shown: Mask
    parameters: Mapping[str, float | str]


def best_of(evidence: Evidence, variants: Iterable[Variant], train: Mask) -> Fit | None:
    """The likeliest of several forms that move what is expected of the same tokens, on the tokens to fit to."""
    few = bin_of = np.empty(0, np.int64)
    best: tuple[float, Variant] | None = None
    for one in variants:
        if best is None:
            few = _searched(train & one.state.known)
            _, bin_of = bins(uncertainty(evidence.rollout[few]))
        rest = evidence.trainer[few] - one.state.expected[few]
        value = quick_likelihood(rest, bin_of, one.state.spread[few])
        if best is None or value > best[0]:
            best = value, one
    if best is None:
        return None
    found = best[1]
    return Fit(log_density(evidence, found.state, train), found.state, found.shown, found.parameters)


def _searched(use: Mask) -> Ints:
    """Indices of the tokens on which forms are compared: all, or every so many."""
    index = np.flatnonzero(use)
    return index if len(index) <= _SEARCHED else index[:: -(-len(index) // _SEARCHED)]


def robust_fit(evidence: Evidence, state: State, train: Mask, columns: Floats) -> Floats:
    """`[N]` the combination of columns `[J, N]` that fits what is not explained, under Student's t."""
    use = np.flatnonzero(train & state.known)
    rest, x = residual(evidence, state)[use], uncertainty(state.expected[use])
    a = columns[:, use]
    shift = np.zeros(len(use))
    coefficients = np.zeros(len(columns))
    noise = noise_of(evidence, state, train)
    scale = noise.scale(x, state.spread[use])
    for _ in range(_REFITS):
        z = (rest - shift) / scale
        weight = (noise.degrees + 1) / (noise.degrees + z * z) / scale**2
        gram = (a * weight) @ a.T
        gram += np.eye(len(columns)) * 1e-9 * max(float(np.trace(gram)), 1e-300)
        coefficients = np.asarray(np.linalg.solve(gram, (a * weight) @ rest), np.float64)
        shift = coefficients @ a
    return np.asarray(coefficients @ columns)


def plain(state: State) -> Mask:
    """`[N]` tokens that something is expected of and whose noise is that of most; all where there are too few."""
    found = state.known & (state.spread == 0)
    return found if found.sum() >= _LEAST_PLAIN * max(int(state.known.sum()), 1) else state.known


def two_sided(shift: Floats) -> bool:
    """Whether shifts `[n]` are of both signs, as they are where probabilities sum to 1 at both sides."""
    total = float(np.abs(shift).sum())
    return min(float(shift.clip(0).sum()), -float(shift.clip(max=0).sum())) > _OTHER_SIGN * total


def normalised(evidence: Evidence, state: State) -> bool:
    """Whether both sides' numbers can be of distributions that sum to 1, one of which was sampled.

    The mean of exp(a − b) is 1 over what b sampled, that of exp(b − a) over what a sampled. Tokens whose noise is
    explained say nothing of it, unless there are no others.
    """
    use = plain(state)
    rest, prompt = residual(evidence, state)[use], evidence.prompt[evidence.sequence[use]]
    counts = np.bincount(prompt)
    for ratio in (np.exp(rest), np.exp(-rest)):
        mean = float(ratio.mean())
        error = float(np.sqrt(((np.bincount(prompt, ratio) - mean * counts) ** 2).sum())) / len(rest)
        if abs(mean - 1) <= max(_UNITS_OFF * error, _OFF_ONE):
            return True
    return False


def group_spread(evidence: Evidence, state: State, train: Mask, level: Ints, n_levels: int) -> Floats:
    """`[K]` log factors by which the noise of each level of a group is wider than that of the least noisy one.

    Args:
        evidence: The table.
        state: What is explained so far.
        train: `[N]` tokens to fit to.
        level: `[N]` level of each token, below 0 for none.
        n_levels: K.
    """
    use = train & state.known & (level >= 0)
    level_of = level[use]
    counts = np.bincount(level_of, minlength=n_levels)
    spread = np.zeros(n_levels)
    rest, x = residual(evidence, state)[use], uncertainty(state.expected[use])
    for _ in range(_TURNS):
        noise = fit_noise(rest, x, state.spread[use] + spread[level_of])
        z = rest / noise.scale(x, state.spread[use] + spread[level_of])
        spread += _log_scales(z, level_of, n_levels, noise.degrees)
    enough = counts >= _LEAST_GROUP
    if not enough.any():
        return np.zeros(n_levels)
    spread = np.where(enough, spread - spread[enough].min(), 0.0)
    return np.clip(spread, 0.0, _LARGEST_SPREAD)


def _log_scales(z: Floats, level: NDArray[np.int64], n_levels: int, degrees: float) -> Floats:
    """`[K]` log of the scale of standardised residuals, by level; 0 of a level without tokens."""
    scale = np.ones(n_levels)
    total = np.maximum(np.bincount(level, minlength=n_levels), 1)
    for _ in range(8):
        weight = (degrees + 1) / (degrees + (z / scale[level]) ** 2)
        scale = np.sqrt(np.maximum(np.bincount(level, weight * z * z, n_levels) / total, 1e-12))
    return np.where(np.bincount(level, minlength=n_levels) > 0, np.log(scale), 0.0)


def by_level(
    evidence: Evidence,
    state: State,
    train: Mask,
    level: Ints,
    parameters: Mapping[str, float | str],
    *,
    least: float = LEAST_SPREAD,
    rising: bool = False,
) -> Fit | None:
    """More noise in some levels of a group than in its quietest one, or than in level 0.

    Args:
        evidence: The table.
        state: What is explained so far.
        train: `[N]` tokens to fit to.
        level: `[N]` level of each token from 0, below 0 for none.
        parameters: What is told beside the factors.
        least: Log of the factor that one level has to reach.
        rising: Whether level 0 has to be the quietest, and the noise not to fall as levels rise.
    """
    n_levels = int(level.max(initial=-1)) + 1
    if rising and n_levels:
        enough = np.flatnonzero(
            np.bincount(level[train & state.known & (level >= 0)], minlength=n_levels) >= _LEAST_GROUP
        )
        lowest = int(enough[0]) if len(enough) else 0
        level = np.where(level >= 0, np.maximum(level - lowest, 0), level)
        n_levels -= lowest
    present = np.bincount(level[train & state.known & (level >= 0)], minlength=max(n_levels, 1))
    if n_levels < 2 or (present >= _LEAST_GROUP).sum() < 2:
        return None
    spread = group_spread(evidence, state, train, level, n_levels)
    if rising:
        spread = _not_falling(spread - spread[0], np.maximum(present, 1e-9))
        spread = np.maximum(spread - spread[0], 0.0)
    if spread.max() < least:
        return None
    wide = np.where(level >= 0, spread[np.maximum(level, 0)], 0.0)
    moved = state.widened(wide)
    return Fit(
        log_density(evidence, moved, train),
        moved,
        state.known & (wide > spread.max() / 2),
        {**parameters, "factor": float(np.exp(spread.max()))},
    )


def _not_falling(values: Floats, weight: Floats) -> Floats:
    """`[K]` the closest values that do not fall, by pooling neighbours that do."""
    pools: list[list[float]] = []
    for value, w in zip(values, weight, strict=True):
        pools.append([float(value), float(w), 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            last = pools.pop()
            both = pools[-1][1] + last[1]
            pools[-1] = [(pools[-1][0] * pools[-1][1] + last[0] * last[1]) / both, both, pools[-1][2] + last[2]]
    return np.concatenate([np.full(int(n), value) for value, _, n in pools])


def likeliest(fits: Iterable[Fit | None], train: Mask) -> Fit | None:
    """The fit that says most of the tokens it was fitted to."""
    some = [fit for fit in fits if fit is not None]
    return max(some, key=lambda fit: float(fit.log_density[train].sum()), default=None)
