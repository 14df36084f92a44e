"""Log-probs stand beside other tokens than their own, from some token of a sequence on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from scipy.special import logsumexp

from mismatch_probe.probes.diagnose.base import Fit, State, complete, log_density, marginal, noise_of, residual
from mismatch_probe.probes.diagnose.evidence import Evidence, Floats, Ints, Mask
from mismatch_probe.probes.diagnose.noise import Noise, uncertainty
from mismatch_probe.probes.diagnose.signatures import signature

_LAGS = (-2, -1, 1, 2)
_FIRST, _OFF_AT_FIRST = 4, 0.5


@signature(
    "shift",
    kind="rows",
    title="The log-probs of one side belong to neighbouring tokens",
    causes=("shift-by-one", "packed-labels-shifted"),
    confirm="Move one side by the named number of tokens: the rest is rounding.",
    fix=(
        "Log-probs of position i are of token i + 1: shift logits and labels once, and within each sequence of a pack, "
        "not over the packed row."
    ),
)
def shift(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """a_i is b_{i+k} with one k ≠ 0: in whole rows, from the second sequence of a pack on, or by one more in each."""
    noise = _narrow(evidence, state, train)
    broad = marginal(evidence, train)
    best: tuple[float, State, Mask, Mapping[str, float | str]] | None = None
    for lag, where, told in _forms(evidence):
        moved = moved_by(evidence, state, lag, where)
        value = float(np.where(moved.known, _density(evidence, moved, noise), broad)[train & evidence.usable].sum())
        if best is None or value > best[0]:
            best = value, moved, where, told
    assert best is not None
    _, moved, where, told = best
    return Fit(log_density(evidence, moved, train), moved, where & evidence.usable, told)


def _forms(evidence: Evidence) -> Iterator[tuple[int | Ints, Mask, Mapping[str, float | str]]]:
    """By how many tokens, where, and how that is told."""
    for lag in _LAGS:
        yield lag, np.ones(len(evidence), np.bool_), {"tokens": lag}
    if (pack := evidence.rows.get("pack_index")) is not None:
        index = evidence.of_sequence(pack)
        for lag in _LAGS:
            yield lag, index > 0, {"tokens": lag, "from_pack_index": 1}
        for lag in (-1, 1):
            yield lag * np.maximum(index, 0), index > 0, {"tokens_per_pack_index": lag}


def moved_by(evidence: Evidence, state: State, lag: int | Ints, where: Mask) -> State:
    """What is expected where the rollout's log-probs are those of the token `lag` places on."""
    index, inside = evidence.beside(lag)
    expected = np.where(where & inside, state.expected[index], state.expected)
    known = np.where(where, inside & state.known[index], state.known) & evidence.usable
    return replace(state, expected=expected, known=known)


def _narrow(evidence: Evidence, state: State, train: Mask) -> Noise:
    """Noise of the lag that fits best, so that none is judged by the noise of a wrong one."""
    nothing = np.ones(len(evidence), np.bool_)
    models = [noise_of(evidence, moved_by(evidence, state, lag, nothing), train) for lag in (0, *_LAGS)]
    return min(models, key=lambda one: float(np.mean(one.log_scale)))


def _density(evidence: Evidence, state: State, noise: Noise) -> Floats:
    return noise.log_density(residual(evidence, state), uncertainty(state.expected), state.spread)


@signature(
    "retokenised",
    kind="rows",
    title="From some token of a sequence on, the log-probs of one side belong to neighbouring tokens",
    causes=("retokenised",),
    confirm="Compare the ids of both sides: they differ from the named token on.",
    fix="Train on the ids that the engine sampled; never decode and encode again.",
)
def retokenised(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """In a sequence a is b up to token k, and b of another place after it; every k and lag is possible."""
    noise = _narrow(evidence, state, train)
    broad = marginal(evidence, train)
    everywhere = np.ones(len(evidence), np.bool_)
    usable = evidence.usable

    def density(moved: State) -> Floats:
        return np.where(usable, np.where(moved.known, _density(evidence, moved, noise), broad), 0.0)

    plain = density(state)
    states = {lag: moved_by(evidence, state, lag, everywhere) for lag in _LAGS}
    shifted = {lag: density(one) for lag, one in states.items()}
    found, expected, known = plain.copy(), state.expected.copy(), state.known.copy()
    shown = np.zeros(len(evidence), np.bool_)
    n_sequences = 0
    for lo, hi in zip(evidence.start[:-1], evidence.start[1:], strict=True):
        n = hi - lo
        if n < 4:
            continue
        # gain[k] of a change at k: what the tokens from k on gain.
        gains = {lag: np.cumsum((one[lo:hi] - plain[lo:hi])[::-1])[::-1] for lag, one in shifted.items()}
        stacked = np.stack([one[1:] for one in gains.values()])
        prior = np.log(0.5)
        total = np.logaddexp(prior, np.log(0.5) - np.log(stacked.size) + logsumexp(stacked))
        found[lo:hi] = plain[lo:hi] + total / n
        lag_at, k = np.unravel_index(int(np.argmax(stacked)), stacked.shape)
        if stacked[lag_at, k] > np.log(stacked.size) + 3:
            n_sequences += 1
            first = lo + 1 + k
            shown[first:hi] = True
            moved = states[_LAGS[lag_at]]
            expected[first:hi], known[first:hi] = moved.expected[first:hi], moved.known[first:hi]
    # What is off from the first tokens on is a shift.
    if n_sequences == 0 or float(shown[evidence.position < _FIRST].mean()) > _OFF_AT_FIRST:
        return None
    found = np.where(usable, found, complete(evidence, state, train, found))
    return Fit(found, replace(state, expected=expected, known=known), shown, {"n_sequences": float(n_sequences)})
