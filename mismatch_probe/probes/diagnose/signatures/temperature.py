"""One side divides logits by a temperature and the other does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from mismatch_probe.probes.diagnose.base import Fit, State, Variant, best_of, normalised, plain, robust_fit, two_sided
from mismatch_probe.probes.diagnose.evidence import Evidence, Floats, Mask
from mismatch_probe.probes.diagnose.noise import uncertainty
from mismatch_probe.probes.diagnose.signatures import signature
from mismatch_probe.probes.diagnose.temper import REST, log_power_sum, rest_of

_TEMPERATURES = (
    0.3,
    0.4,
    0.5,
    0.6,
    0.65,
    0.7,
    0.75,
    0.8,
    0.85,
    0.9,
    0.94,
    0.97,
    1.03,
    1.06,
    1.11,
    1.18,
    1.25,
    1.33,
    1.43,
    1.54,
    1.67,
    2.0,
    2.5,
)


@signature(
    "temperature",
    kind="labels",
    title="One side's log-probs are those of another temperature",
    causes=("rollout-raw-temperature", "trainer-temperature", "scaled-head", "soft-cap-missing"),
    confirm="Score the same ids with the trainer at the fitted temperature.",
    fix=(
        'Give both sides the sampling temperature: vLLM `logprobs_mode="processed_logprobs"`, and divide the '
        "trainer's logits by it. A gap that stays is a scaled LM head."
    ),
)
def temperature(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """a is what another temperature makes of b: by the trainer's entropy, or else by a course over b."""
    if not normalised(evidence, state):
        return None
    fit = best_of(evidence, _variants(evidence, state), train)
    if fit is None:
        return None
    # What is left of a distribution differs from token to token: other smooth functions of b are taken off as well.
    q = np.exp(uncertainty(fit.state.expected))
    b = np.minimum(state.expected, 0.0)
    rest = robust_fit(evidence, fit.state, train, np.stack([q, q * q, q * b, b]))
    moved = fit.state.moved(fit.state.expected + rest)
    if not two_sided((moved.expected - state.expected)[train & plain(state)]):
        return None
    return replace(fit, state=moved)


def _variants(evidence: Evidence, state: State) -> Iterator[Variant]:
    everywhere = np.ones(len(evidence), np.bool_)
    for rest in rests(evidence, state):
        for t in _TEMPERATURES:
            expected = state.expected / t - log_power_sum(state.expected, 1 / t, rest)
            yield Variant(state.moved(expected), everywhere, {"temperature": t})


def rests(evidence: Evidence, state: State) -> Iterator[Floats | float]:
    """What the rest of each distribution may be: by its recorded entropy, else the same for all."""
    entropy = evidence.tokens.get("trainer_entropy")
    if entropy is None:
        yield from REST
    else:
        yield rest_of(state.expected, entropy)
