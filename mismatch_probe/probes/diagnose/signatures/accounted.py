"""What the accounting of a dump finds: values that no policy gave. No fit is needed: a fact is a fact."""

from __future__ import annotations

import numpy as np

from mismatch_probe.probes.diagnose.base import BEYOND_BASELINE, CAP, Fit, State, log_density, mean_gap
from mismatch_probe.probes.diagnose.evidence import Evidence, Floats, Mask
from mismatch_probe.probes.diagnose.signatures import signature

_AT_END = 0.8
_EQUAL, _UNCERTAIN = 0.99, -1e-3
_NEARLY_CERTAIN, _NEXT_TO_ZERO, _FEW, _ENOUGH, _MORE = -0.01, -1e-5, 0.1, 10, 3.0
_GAIN = {"recomputed": 8.0, "coarse-logprobs": 1.0, "fine-grid": 0.05, "environment-tokens": 2.0, "trainer-noise": 0.3}
_WINDOW, _UNLIKELY, _LIKELY, _LEAST_SHARE, _MOST_SHARE = 8, -4.5, -1.5, 0.02, 0.5
_OWN_NOISE, _LEAST_NOISE = 0.5, 0.02
_COARSE = 0.4  # of the mean gap


def _fit(evidence: Evidence, state: State, train: Mask, tokens: Mask) -> Fit | None:
    """Accounts for tokens that cannot be used."""
    new = tokens & evidence.unusable & ~state.accounted
    if not new.any():
        return None
    found = state.accounting_for(new)
    return Fit(log_density(evidence, found, train), found, new, {"n": float(new.sum())})


def _size(difference: Floats, tokens: Mask) -> float:
    """Mean of absolute values of some tokens, cut at `CAP` nats a token."""
    return float(np.minimum(np.abs(difference[tokens]), CAP).mean())


def _placeholders(evidence: Evidence) -> tuple[Mask, bool]:
    """`[N]` tokens whose value is finite and no log-prob, and whether they are the last ones of their sequences."""
    found = evidence.unusable.copy()
    last = evidence.from_end == 0
    for side, other in ((evidence.rollout, evidence.trainer), (evidence.trainer, evidence.rollout)):
        found &= np.isfinite(side) & ((side <= 0) | (side == 1))
        zero = side == 0
        if (found & zero).any() and not _placed(evidence, zero, found, side, other):
            found &= ~zero
    # A run that reaches the end counts as the end.
    at_end, (index, inside) = found & last, evidence.beside(1)
    while (more := found & inside & at_end[index] & ~at_end).any():
        at_end |= more
    return found, bool(found.any() and at_end.sum() >= _AT_END * found.sum())


def _placed(evidence: Evidence, zero: Mask, found: Mask, side: Floats, other: Floats) -> bool:
    """Whether zeros were put in place of log-probs, and are not those of certain tokens that the other side denies."""
    last = evidence.from_end == 0
    place = last if (last | ~(found & zero)).all() else ~last
    # Truncated distributions give 0 to a token that stands alone, at both sides.
    if (zero & (other == 0) & place).sum() >= _MORE * (zero & found).sum():
        return False
    # Log-probs that round to 0 have neighbours that nearly do, unless they are rounded to a coarse grid.
    neighbours = place & (side > _NEXT_TO_ZERO) & (side < 0)
    if evidence.grid is None and neighbours.sum() < _FEW * (zero & place).sum():
        return True
    certain = (side > _NEARLY_CERTAIN) & (side < 0)
    denied = [float(np.mean(other[some] < -1)) for some in (certain & place, certain) if some.sum() >= _ENOUGH]
    return float(np.mean(found[zero & place])) >= _MORE * max(denied, default=0.0)


@signature(
    "end-placeholders",
    seen_by="fact",
    kind="rows",
    title="The last tokens of responses have a number in place of a log-prob",
    causes=("eos-placeholder", "padding-counted"),
    confirm="Leave these tokens out of the loss mask: the rest is rounding.",
    fix=(
        "Take the engine's log-prob of the end-of-sequence token, or mask it: whoever appends it after "
        "sampling has none. Mask padding."
    ),
)
def end_placeholders(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """Constants that are no log-probs, or 0 where the other side is unsure, at the ends of sequences."""
    found, at_end = _placeholders(evidence)
    return _fit(evidence, state, train, found) if at_end else None


@signature(
    "placeholders",
    seen_by="fact",
    kind="rows",
    title="Tokens inside responses have a number in place of a log-prob",
    causes=("missing-logprobs", "tool-tokens-zero"),
    confirm="Look at the named tokens in the engine's own output.",
    fix="Mask tokens that the engine did not sample, and record no number where a log-prob is missing.",
)
def placeholders(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """Constants that are no log-probs, or 0 where the other side is unsure."""
    found, at_end = _placeholders(evidence)
    return None if at_end else _fit(evidence, state, train, found)


@signature(
    "missing-values",
    seen_by="fact",
    kind="rows",
    title="Tokens have no finite log-prob on one side",
    causes=("missing-at-certain-tokens", "nan-row", "eos-placeholder"),
    confirm="Look at the tokens: near-certain ones are lost on the way, all tokens after one are a NaN in the model.",
    fix="Record log-probs as numbers in FP32; where the engine gives NaN, look for an overflow in FP16.",
)
def missing_values(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """NaN, missing values and infinities."""
    return _fit(evidence, state, train, ~(np.isfinite(evidence.rollout) & np.isfinite(evidence.trainer)))


@signature(
    "recomputed",
    seen_by="fact",
    kind="labels",
    title="Both sides are the same numbers: one is a copy or a recomputation of the other",
    causes=("recomputed",),
    confirm="Switch on the engine's own log-probs, and see whether anything changes.",
    fix="Record the log-probs that the engine returned while it sampled.",
)
def recomputed(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """a equals b to the bit, at nearly every token that is not certain."""
    uncertain = evidence.usable & (evidence.rollout < _UNCERTAIN)
    equal = uncertain & (evidence.rollout == evidence.trainer)
    if not uncertain.any() or equal.sum() < _EQUAL * uncertain.sum():
        return None
    found = log_density(evidence, state, train) + _GAIN["recomputed"] * equal
    return Fit(found, state, equal, {"share_equal": float(equal.sum() / uncertain.sum())})


@signature(
    "coarse-logprobs",
    kind="labels",
    title="One side's log-probs lie on a coarse grid",
    causes=("softmax-16-bit", "rounded-storage"),
    confirm="Compute log-softmax in FP32 and store FP32: the grid is gone.",
    fix="Cast logits to FP32 before log-softmax, and write log-probs with at least 7 digits.",
)
def coarse_logprobs(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """Values on a grid that is not fine beside the gap, as the accounting finds them."""
    grid = evidence.grid
    if grid is None:
        return None
    step = float(grid.maybe("step") or 0.0)
    # A grid that is much finer than the gap does not make it, and only counts where nothing else does.
    gain = _GAIN["coarse-logprobs" if step >= _COARSE * mean_gap(evidence, state, state.known) else "fine-grid"]
    found = log_density(evidence, state, train) + gain * evidence.usable
    return Fit(found, state, evidence.usable, {"side": grid.where, "step": step})


@signature(
    "decode-prefill",
    kind="forward",
    title="The engine's decode disagrees with its own prefill, which agrees with the trainer",
    causes=("decode-differs-from-prefill",),
    confirm="Score the same ids with prompt_logprobs on an engine with another attention backend.",
    fix="Change the engine's attention backend or switch CUDA graphs off; report the kernel.",
)
def decode_prefill(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """a follows the engine's prefill much closer than its decode."""
    prefill = evidence.tokens.get("rollout_prefill_logprobs")
    if prefill is None:
        return None
    sound = state.known & np.isfinite(prefill)
    if not sound.any():
        return None
    off, near = evidence.rollout - prefill, evidence.trainer - prefill
    own, gap = _size(off, sound), _size(near, sound)
    if own < 2 * gap:
        return None
    moved = state.moved(np.where(sound, prefill, state.expected))
    shown = sound & (np.abs(off) > np.quantile(np.abs(near[sound]), 0.99))
    ratio = own / max(gap, 1e-12)
    return Fit(log_density(evidence, moved, train), moved, shown, {"decode_prefill_over_prefill_trainer": ratio})


@signature(
    "environment-tokens",
    kind="rows",
    title="Runs of tokens that no policy sampled count as sampled",
    causes=("environment-tokens-in-mask",),
    confirm="Read the named tokens: they are a tool's or a user's text.",
    fix="Set the loss mask to 0 for every token that the environment wrote.",
)
def environment_tokens(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """Both sides give runs of tokens far less than sampled text gets, and the rest what sampled text gets."""
    likelier = np.where(state.known, np.maximum(evidence.rollout, evidence.trainer), 0.0)
    sums = np.convolve(likelier, np.ones(_WINDOW))[_WINDOW - 1 :][: len(likelier)]
    _, inside = evidence.beside(_WINDOW - 1)
    starts = np.flatnonzero(inside & (sums < _UNLIKELY * _WINDOW))
    change = np.zeros(len(likelier) + 1, np.int64)
    change[starts] += 1
    np.add.at(change, np.minimum(starts + _WINDOW, len(likelier)), -1)
    shown = (np.cumsum(change)[:-1] > 0) & state.known & (likelier < 0)
    share = float(shown.sum() / max(int(state.known.sum()), 1))
    rest = likelier[state.known & ~shown]
    if not _LEAST_SHARE <= share <= _MOST_SHARE or float(rest.mean()) < _LIKELY:
        return None
    found = log_density(evidence, state, train) + _GAIN["environment-tokens"] * shown
    return Fit(found, state, shown, {"mean_logprob_there": float(likelier[shown].mean())})


@signature(
    "trainer-noise",
    kind="forward",
    title="Two passes of the trainer differ as much as the two sides do",
    causes=("dropout", "batch-size"),
    confirm="Score the same batch twice with the trainer.",
    fix="Put the trainer into eval mode for log-probs: dropout, random masks and router noise off.",
)
def trainer_noise(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """The second trainer pass is as far from the first as the rollout is, and that is more than rounding."""
    second = evidence.tokens.get("trainer_logprobs_2")
    if second is None:
        return None
    sound = state.known & np.isfinite(second)
    if not sound.any():
        return None
    own = _size(second - evidence.trainer, sound) / np.sqrt(2)
    gap = mean_gap(evidence, state, sound)
    least = _LEAST_NOISE if evidence.baseline is None else BEYOND_BASELINE * evidence.baseline
    if own < max(_OWN_NOISE * gap, least):
        return None
    found = log_density(evidence, state, train) + _GAIN["trainer-noise"] * sound
    return Fit(found, state, sound, {"trainer_over_gap": own / gap})
