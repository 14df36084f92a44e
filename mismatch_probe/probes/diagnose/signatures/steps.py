"""What goes wrong at some step of a run, or more and more with its steps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mismatch_probe.probes.diagnose.base import (
    CAP,
    LEAST_SPREAD,
    Fit,
    State,
    Variant,
    best_of,
    by_level,
    likeliest,
    log_density,
    quiet,
    residual,
)
from mismatch_probe.probes.diagnose.evidence import Evidence, Ints, Mask
from mismatch_probe.probes.diagnose.signatures import signature

_ADDED = tuple(float(one) for one in np.geomspace(0.03, 1e6, 32))
"""What an update adds, in scales of the first step's noise."""
_OF_ANY = 0.7  # of what any course over the steps would gain
_APART = 2.0  # times the gap of any other step


def step_index(evidence: Evidence, least: int) -> tuple[Ints, int] | None:
    """`[N]` the running number of a token's step, and how many steps there are; None where these are too few."""
    steps = evidence.rows.get("step")
    if steps is None:
        return None
    present, index = np.unique(steps, return_inverse=True)
    return (evidence.of_sequence(index), len(present)) if len(present) >= least else None


@signature(
    "falls-behind",
    kind="weights",
    title="The gap is small at the first step and grows from step to step",
    causes=(
        "restored-first-checkpoint",
        "adapter-ignored",
        "merged-adapter-drift",
        "lora-scale",
        "engine-lags-half-ulp",
    ),
    confirm="Score a late step with the first checkpoint, and with the base model without its adapter.",
    fix=(
        "The engine does not get the updates: check that sleep and wake or a restart do not restore the first weights, "
        "that the adapter is sent and applied with its scale, and that BF16 weights change at all by an update."
    ),
)
def falls_behind(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """What updates add to the noise grows with the steps since the first."""
    found = step_index(evidence, 3)
    if found is None:
        return None
    index, n = found
    half = index >= n / 2
    if not quiet(evidence, state, index == 0):
        return None

    def forms() -> Iterator[Variant]:
        for power in (0.5, 1.0, 2.0, 3.5):
            for added in _ADDED:
                spread = 0.5 * np.log1p((added * index**power) ** 2)
                factor = float(np.sqrt(1 + (added * (n - 1) ** power) ** 2))
                yield Variant(state.widened(spread), half, {"steps": float(n), "factor": factor})

    fit = best_of(evidence, forms(), train)
    large = fit is not None and float(fit.parameters["factor"]) >= np.exp(LEAST_SPREAD)
    return fit if large and _follows(evidence, state, train, index, fit) else None


def _follows(evidence: Evidence, state: State, train: Mask, index: Ints, fit: Fit | None) -> bool:
    """Whether a course over the steps says nearly as much as any course would."""
    any_course, plain = by_level(evidence, state, train, index, {}), log_density(evidence, state, train)
    gain, most = (0.0 if one is None else float((one.log_density - plain)[train].sum()) for one in (fit, any_course))
    return gain >= _OF_ANY * most


@signature(
    "step-change",
    kind="weights",
    title="The gap is small up to a step and large from the next one on",
    causes=("partial-load-at-update",),
    confirm="Compare the names of the tensors that were sent at that update with those that the engine loaded.",
    fix="Fail on names that the engine does not know or does not get; send every layer, buffers included.",
)
def step_change(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """As much more noise at every step from some step on."""
    found = step_index(evidence, 2)
    if found is None:
        return None
    index, n = found

    def forms() -> Iterator[Fit | None]:
        for edge in range(1, n) if n <= 64 else np.linspace(1, n - 1, 64).astype(int).tolist():
            if not quiet(evidence, state, index < edge):
                return
            yield by_level(evidence, state, train, (index >= edge).astype(np.int64), {"from": float(edge)}, rising=True)

    fit = likeliest(forms(), train)
    return fit if _follows(evidence, state, train, index, fit) else None


@signature(
    "one-step",
    kind="weights",
    title="One step is off, those before and after it are not",
    causes=("resume-serves-reference",),
    confirm="Compare that step's log-probs with those of the reference model.",
    fix=(
        "After a restart send the actor's weights to the engine before the first rollout; it serves the reference "
        "model until then."
    ),
)
def one_step(evidence: Evidence, state: State, train: Mask) -> Fit | None:
    """More noise at one step only."""
    found = step_index(evidence, 3)
    if found is None:
        return None
    index, n = found
    sizes = _sizes(evidence, state, index, n)
    one, next_ = (int(i) for i in np.argsort(-sizes)[:2])
    if sizes[one] < _APART * sizes[next_] or not quiet(evidence, state, index != one):
        return None
    return by_level(evidence, state, train, (index == one).astype(np.int64), {"step": float(one)}, rising=True)


def _sizes(evidence: Evidence, state: State, index: Ints, n: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """`[steps]` mean |d|, capped, of what is not explained."""
    size = np.minimum(np.abs(residual(evidence, state)), CAP)
    return np.asarray(np.bincount(index, size, n) / np.maximum(np.bincount(index, state.known, n), 1))
