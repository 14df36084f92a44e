"""Some sequences are off and the others are not, by nothing that the table names."""

from __future__ import annotations

import numpy as np

from mismatch_probe.probes.diagnose.base import Fit, State, complete, noise_of, per_sequence, quiet, residual
from mismatch_probe.probes.diagnose.evidence import Evidence, Floats, Mask
from mismatch_probe.probes.diagnose.noise import Noise, fit_noise, uncertainty
from mismatch_probe.probes.diagnose.signatures import signature

_FACTORS = (1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0, 300.0, 1e3, 1e4, 1e5, 1e6)
_SHARES = (0.05, 0.15, 0.3, 0.5)
_LEAST = 3.0
_QUIET = 4.0  # times rounding


@signature(
    "some-sequences",
    seen_by="pattern",
    kind="forward",
    title="A part of the sequences is off, the others are not",
    causes=("decode-differs-from-prefill",),
    confirm="Score the ids of the named sequences again with the engine's prefill (prompt_logprobs).",
    fix=(
        "Where prefill agrees with the trainer and decode does not, the engine's decode kernel is at fault: change "
        "attention backend, or disable CUDA graphs."
    ),
)
def some_sequences(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """Each sequence has the noise of the table or one that is so many times wider."""
    use = train & state.known
    noise = noise_of(evidence, state, train)
    rest, x = residual(evidence, state), uncertainty(state.expected)
    best: tuple[float, Floats, Floats, float, float] | None = None
    n = len(evidence.prompt)
    narrow = _narrowed(rest, x, state, noise, use, evidence)
    base = per_sequence(evidence, state, narrow.log_density(rest, x, state.spread))
    in_train = np.bincount(evidence.sequence[use], minlength=n) > 0
    for factor in _FACTORS:
        wide = per_sequence(evidence, state, narrow.log_density(rest, x, state.spread + np.log(factor)))
        for share in _SHARES:
            total = np.logaddexp(base + np.log1p(-share), wide + np.log(share))
            value = float(total[in_train].sum())
            if best is None or value > best[0]:
                best = value, total, wide + np.log(share) - base - np.log1p(-share), factor, share
    assert best is not None
    _, total, odds, factor, share = best
    bad = odds > 0
    if not 0.02 <= float(bad.mean()) <= 0.6 or factor < _LEAST:
        return None
    if not quiet(evidence, state, ~evidence.of_sequence(bad), _QUIET):
        return None
    lengths = np.maximum(np.bincount(evidence.sequence[state.known], minlength=n), 1)
    found = complete(evidence, state, train, (total / lengths)[evidence.sequence])
    shown = state.known & bad[evidence.sequence]
    moved = state.widened(np.where(bad[evidence.sequence], np.log(factor), 0.0))
    return Fit(found, moved, shown, {"factor": factor, "share_of_sequences": float(bad.mean())})


def _narrowed(rest: Floats, x: Floats, state: State, noise: Noise, use: Mask, evidence: Evidence) -> Noise:
    """Noise of the quieter half of the sequences."""
    z = np.abs(rest) / noise.scale(x, state.spread)
    n = len(evidence.prompt)
    median = np.full(n, np.inf)
    for one in np.unique(evidence.sequence[use]):
        lo, hi = evidence.start[one], evidence.start[one + 1]
        some = z[lo:hi][use[lo:hi]]
        median[one] = np.median(some) if len(some) else np.inf
    quiet = median <= np.median(median[np.isfinite(median)])
    some = use & quiet[evidence.sequence]
    return fit_noise(rest[some], x[some], state.spread[some])
