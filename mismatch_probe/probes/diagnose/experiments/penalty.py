"""One side's logits of seen tokens lowered by a penalty."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from mismatch_probe.metrics.hypotheses import Rows
from mismatch_probe.probes.diagnose.evidence import Floats
from mismatch_probe.probes.diagnose.experiments import experiment
from mismatch_probe.probes.diagnose.experiments.base import SIDES, Hypothesis, Named, Subject

_FIX = (
    "Switch it off where the rollout samples, and look into generation_config.json, which vLLM reads (with "
    "generation_config=vllm it does not); or apply it at the trainer, too."
)
_GRIDS = {
    "repetition": (0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5, 2.0),
    "presence": (-2.0, -1.0, -0.5, -0.2, 0.0, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0),
    "frequency": (-2.0, -1.0, -0.5, -0.2, 0.0, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0),
}
_CAUSES = {
    name: Named(f"{name}-penalty", f"Log-probs are those of a distribution with a {name} penalty", _FIX)
    for name in _GRIDS
}


@experiment("penalty", classes=("penalty",), forwards=0)
def run(subject: Subject) -> Iterator[Hypothesis]:
    """Fits each penalty for each side; the repetition penalty with and without the prompt's tokens."""
    for side in SIDES:
        for name, grid in _GRIDS.items():
            for prompt in (True, False) if name == "repetition" else (True,):
                fit = subject.fit(side, partial(_column, subject.rows, name, prompt), grid, 1e-3)
                if fit is not None:
                    about = f"{side} with a {name} penalty" + ("" if prompt else " of the response alone")
                    yield Hypothesis(about, _CAUSES[name], fit[1], {name: fit[0]}, only=side)


def _column(rows: Rows, name: str, prompt: bool, value: float) -> Floats:
    return rows.penalised(**{name: value}, prompt=prompt)
