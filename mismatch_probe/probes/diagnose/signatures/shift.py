"""Log-probs stand beside other tokens than their own, from some token of a sequence on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from scipy.special import logsumexp

from mismatch_probe.probes.diagnose.base import (
    Fit,
    State,
    complete,
    likeliest,
    log_density,
    marginal,
    noise_of,
    residual,
)
from mismatch_probe.probes.diagnose.evidence import Evidence, Floats, Ints, Mask
from mismatch_probe.probes.diagnose.noise import Noise, uncertainty
from mismatch_probe.probes.diagnose.signatures import signature

_LAGS = (-2, -1, 1, 2)
_FIRST = 2  # what is off before this token is a shift
_CLEAR = 3.0  # nats that a sequence has to gain


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
    """a_i is b_{i+k} with one k ≠ 0: in all rows or some, behind the first of a pack, or by one more in each."""
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
    whole = Fit(log_density(evidence, moved, train), moved, where & evidence.usable, told)
    return likeliest([whole, _from_some_token(evidence, state, train, whole_rows=True)], train)


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
    return _from_some_token(evidence, state, train, whole_rows=False)


def _from_some_token(evidence: Evidence, state: State, train: Mask, *, whole_rows: bool) -> Fit | None:
    """Some sequences are shifted from their first token on, or from a later one."""
    noise = _narrow(evidence, state, train)
    for _ in range(2):
        fit = _changes(evidence, state, train, noise, whole_rows=whole_rows)
        if fit is None:
            return None
        noise = noise_of(evidence, fit.state, train)
    return fit


def _changes(evidence: Evidence, state: State, train: Mask, noise: Noise, *, whole_rows: bool) -> Fit | None:
    broad, usable = marginal(evidence, train), evidence.usable
    everywhere = np.ones(len(evidence), np.bool_)

    def density(moved: State) -> Floats:
        return np.where(usable, np.where(moved.known, _density(evidence, moved, noise), broad), 0.0)

    plain = density(state)
    states = {lag: moved_by(evidence, state, lag, everywhere) for lag in _LAGS}
    gain = {lag: density(one) - plain for lag, one in states.items()}
    found, expected, known = plain.copy(), state.expected.copy(), state.known.copy()
    shown = np.zeros(len(evidence), np.bool_)
    n_sequences = n_at_once = 0
    for lo, hi in zip(evidence.start[:-1], evidence.start[1:], strict=True):
        n = hi - lo
        if n <= _FIRST:
            continue
        # What the tokens from k on gain, of a change at k.
        at = slice(0, 1) if whole_rows else slice(_FIRST, None)
        gains = np.stack([np.cumsum(one[lo:hi][::-1])[::-1][at] for one in gain.values()])
        found[lo:hi] += (np.logaddexp(0.0, logsumexp(gains) - np.log(gains.size)) - np.log(2)) / n
        lag_at, k = np.unravel_index(int(np.argmax(gains)), gains.shape)
        if gains[lag_at, k] > np.log(gains.size) + _CLEAR:
            n_sequences += 1
            n_at_once += k == 0
            first = lo + at.start + k
            shown[first:hi] = True
            moved = states[_LAGS[lag_at]]
            expected[first:hi], known[first:hi] = moved.expected[first:hi], moved.known[first:hi]
    # What is off as soon as it can be, in most sequences, is a shift of whole rows.
    if n_sequences == 0 or (not whole_rows and n_at_once > n_sequences / 2):
        return None
    found = np.where(usable, found, complete(evidence, state, train, found))
    return Fit(found, replace(state, expected=expected, known=known), shown, {"n_sequences": float(n_sequences)})
