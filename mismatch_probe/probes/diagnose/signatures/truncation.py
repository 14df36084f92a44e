"""One side renormalises over the tokens that truncated sampling keeps, or over rows that are no tokens."""

from __future__ import annotations

from functools import partial

import numpy as np

from mismatch_probe.probes.diagnose.base import CAP, Fit, State, complete, residual
from mismatch_probe.probes.diagnose.evidence import Evidence, Floats, Mask
from mismatch_probe.probes.diagnose.noise import uncertainty
from mismatch_probe.probes.diagnose.one_sided import one_sided
from mismatch_probe.probes.diagnose.signatures import signature

_LEAST_SHIFT, _SHOWN, _ALONE = 0.004, 0.01, -3.0  # nats
_AGAINST_ALONG, _AGAINST_ROUNDING = 0.1, 0.75


@signature(
    "truncation",
    kind="labels",
    title="One side's log-probs are normalised over fewer tokens than the other's",
    causes=("top-p", "top-k", "min-p", "padded-vocabulary"),
    confirm="Sample a few prompts with top-p, top-k and min-p off, or score with the sampler's support at the trainer.",
    fix=(
        "Sample without truncation, or apply the same truncation to the trainer's logits. vLLM reports the full "
        'distribution with `logprobs_mode="raw_logprobs"`. Slice padded rows off the vocabulary before the softmax.'
    ),
)
def truncation(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """d is noise plus log S of a kept mass S ≤ 1, of one sign at every token: any S, or one nearer 1 as p is."""
    everywhere, others = np.ones(len(evidence)), np.exp(uncertainty(state.expected))

    def any_mass(sign: float, lost: float) -> Floats:
        return sign * lost * everywhere

    def like_others(sign: float, more: float) -> Floats:
        return np.asarray(sign * np.log1p(more * others))

    forms = [partial(form, sign) for sign in (-1.0, 1.0) for form in (any_mass, like_others)]
    fit = one_sided(evidence, state, train, forms)
    if fit is None or fit.mean < _LEAST_SHIFT or not _one_way(evidence, state, fit.shift):
        return None
    moved = state.moved(state.expected + np.where(state.known, fit.shift, 0.0))
    side = ("rollout", "trainer")[fit.which // 2]
    if side == "rollout":
        # Where one token is kept its log-prob is 0, which looks like a placeholder.
        moved = moved.accounting_for(evidence.unusable & (evidence.rollout == 0) & (evidence.trainer > _ALONE))
    shown = state.known & (np.abs(fit.shift) > _SHOWN)
    found = complete(evidence, moved, train, fit.log_density)
    return Fit(found, moved, shown, {"side": side, "mean_shift": fit.mean})


def _one_way(evidence: Evidence, state: State, shift: Floats) -> bool:
    """Whether what is the other way is no more than rounding."""
    off = np.clip(np.sign(shift.sum()) * residual(evidence, state)[state.known], -CAP, CAP)
    along, against = float(off.clip(0).mean()), -float(off.clip(max=0).mean())
    return against <= (_AGAINST_ALONG * along if evidence.baseline is None else _AGAINST_ROUNDING * evidence.baseline)
