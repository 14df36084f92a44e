"""How far an engine's 16-bit weights lag behind the trainer's FP32 masters under Adam.

A step of Adam moves a weight by the learning rate times u = m̂ / (√v̂ + ε), whatever the gradient's scale, so u is
simulated once and serves every learning rate. An engine sees a master only when it rounds to another 16-bit number:
after half a unit in the last place (ulp) from a checkpoint that lies on the grid, and after less or more from a master
anywhere within that half unit, as after many steps.

Shape legend: `S` sequences, `W` sampled weights, `R` learning rates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.metrics.floats import FloatFormat

Floats = NDArray[np.float64]
# Of the paper's AdamW (arXiv 2510.26788).
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class AdamMotion:
    """The motion of weights under Adam, at a learning rate of 1.

    Attributes:
        first: `[W]` |u| of the first step.
        steady: `[W]` mean |u| of later steps.
        steps: Steps that were simulated.
        passed: Per format and learning rate, `[W]` the first step after which a weight from the grid rounds to another
            number; 0 where none did.
        passed_generic: The same of a weight that starts anywhere within half a unit of its number.
        alive: `[W]` weights that any sequence gave a gradient.
    """

    first: Floats
    steady: Floats
    steps: int
    passed: dict[tuple[str, float], NDArray[np.int64]]
    passed_generic: dict[tuple[str, float], NDArray[np.int64]]
    alive: NDArray[np.bool_]


def simulate_adam(
    weights: Floats,
    gradients: NDArray[np.floating],
    rates: tuple[float, ...],
    formats: tuple[FloatFormat, ...],
    *,
    steps: int = 500,
    batch: int = 8,
    betas: tuple[float, float] = BETAS,
    epsilon: float = 1e-8,
    seed: int = 0,
) -> AdamMotion:
    """Adam on gradients that are drawn from those of some sequences, each with a random sign for its advantage.

    Signs are drawn anew at each step, so gradients are noise without drift, as late in a run, and a weight walks at
    random. One that is always pushed the same way moves by the whole learning rate in every step (|u| = 1), and is the
    first to reach the engine.

    Args:
        weights: `[W]` sampled weights; each format's copy of them is where its engine starts.
        gradients: `[S, W]` their gradients, a row per sequence. A weight with one that is not finite counts as without.
        rates: Learning rates.
        formats: Of engines.
        steps: How many to simulate.
        batch: Sequences of a step.
        betas, epsilon: Of Adam.
        seed: Of the draws.
    """
    draw = np.random.default_rng(seed)
    rows = np.asarray(gradients, dtype=np.float64)
    scale = np.abs(rows).max(axis=0)
    alive = np.isfinite(scale) & (scale > 0) & np.isfinite(weights)
    # Adam does not see a gradient's scale, up to ε: taken out so that squares of tiny ones do not vanish.
    rows = rows[:, alive] / scale[alive]
    floor = epsilon / scale[alive]
    m, v, moved = np.zeros(rows.shape[1]), np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
    first, total = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
    live = np.asarray(weights, dtype=np.float64)[alive]
    half = {form.name: form.ulp(form.rounded(live)) / 2 for form in formats}
    offset = {form.name: half[form.name] * draw.uniform(-1, 1, rows.shape[1]) for form in formats}
    passed = {(form.name, rate): np.zeros(rows.shape[1], np.int64) for form in formats for rate in rates}
    generic = {key: reached.copy() for key, reached in passed.items()}
    settled = min(steps // 2, 100)
    for step in range(1, steps + 1):
        chosen = draw.integers(len(rows), size=batch)
        gradient = (draw.choice((-1.0, 1.0), size=batch)[:, None] * rows[chosen]).sum(axis=0) / batch
        m += (1 - betas[0]) * (gradient - m)
        v += (1 - betas[1]) * (gradient**2 - v)
        u = (m / (1 - betas[0] ** step)) / (np.sqrt(v / (1 - betas[1] ** step)) + floor)
        moved -= u
        if step == 1:
            first = np.abs(u)
        if step > settled:
            total += np.abs(u)
        for name, rate in passed:
            for found, at in ((passed, rate * moved), (generic, rate * moved + offset[name])):
                reached = found[name, rate]
                reached[(reached == 0) & (np.abs(at) > half[name])] = step
    return AdamMotion(
        _spread(first, alive),
        _spread(total / max(1, steps - settled), alive),
        steps,
        {key: _spread(reached, alive).astype(np.int64) for key, reached in passed.items()},
        {key: _spread(reached, alive).astype(np.int64) for key, reached in generic.items()},
        alive,
    )


def _spread(values: NDArray[np.generic], alive: NDArray[np.bool_]) -> Floats:
    found = np.zeros(len(alive))
    found[alive] = values
    return found
