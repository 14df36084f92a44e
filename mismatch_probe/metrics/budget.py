"""The error budget: how far each side is from a reference pass over the same tokens, and whether that explains the gap.

With r the reference's log-prob, e_μ = b − r and e_π = a − r are the two sides' errors and d = e_π − e_μ. If the errors
are independent their squares add: mean d² = mean e_μ² + mean e_π², the quadrature prediction. What they share
(correlation) makes the measured gap smaller.

Shape legend: `N` tokens, `P` prompts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.metrics import scales
from mismatch_probe.metrics.chunks import group_sums, usable_rows
from mismatch_probe.metrics.intervals import Estimate, evaluate
from mismatch_probe.types import MetricValue, PairArrays


class BudgetSums:
    """Per-prompt sums of the squares and products of both sides' errors; fed chunk by chunk.

    Attributes:
        n_tokens: Usable tokens that the reference has finite.
    """

    def __init__(self, n_prompts: int) -> None:
        self.n_tokens = 0
        self._counts = np.zeros(n_prompts)
        self._sums = np.zeros((n_prompts, 4))

    def update(self, chunk: PairArrays) -> None:
        """Takes in the tokens of a chunk that carries `reference_logprob` `[N]`, nats."""
        reference = chunk.columns["reference_logprob"]
        rollout, trainer = chunk.rollout_logprob - reference, chunk.trainer_logprob - reference
        gap = chunk.trainer_logprob - chunk.rollout_logprob
        finite = usable_rows(chunk) & np.isfinite(reference)
        prompt = chunk.prompt[chunk.sequence[finite]]
        n_prompts = len(self._counts)
        self.n_tokens += int(finite.sum())
        self._counts += np.bincount(prompt, minlength=n_prompts)
        for k, values in enumerate((rollout**2, trainer**2, rollout * trainer, gap**2)):
            self._sums[:, k] += group_sums(prompt, values[finite], n_prompts)

    def metrics(self, *, seed: int = 0, replicates: int = 1000) -> dict[str, MetricValue]:
        """The budget with its intervals.

        Returns:
            `rollout_error_rms`, `trainer_error_rms`, `predicted_gap_rms` = √(e_μ² + e_π²), `measured_gap_rms` (nats),
            `error_correlation` (about zero, not about the means: a bias that both share counts), and
            `measured_over_predicted`.
        """
        names = ("rollout_error_rms", "trainer_error_rms", "predicted_gap_rms", "measured_gap_rms")
        if self.n_tokens == 0:
            none = MetricValue(None, why="no token has usable log-probs in all three passes")
            return dict.fromkeys((*names, "error_correlation", "measured_over_predicted"), none)
        estimates = {
            "rollout_error_rms": self._estimate([0], scales.log_root_mean, scales.exp),
            "trainer_error_rms": self._estimate([1], scales.log_root_mean, scales.exp),
            "predicted_gap_rms": self._estimate([0, 1], _log_root_sum, scales.exp),
            "measured_gap_rms": self._estimate([3], scales.log_root_mean, scales.exp),
        }
        found: dict[str, MetricValue] = {}
        if self._sums[:, :2].any(axis=0).all():
            estimates["error_correlation"] = self._estimate([0, 1, 2], _fisher, np.tanh)
            estimates["measured_over_predicted"] = self._estimate([0, 1, 3], _log_ratio, scales.exp)
        else:
            none = MetricValue(None, why="one side is the reference itself, or agrees with it exactly")
            found = {"error_correlation": none, "measured_over_predicted": none}
        return found | evaluate(estimates, seed=seed, replicates=replicates)

    def _estimate(self, columns: list[int], working: Any, metric: Any) -> Estimate:
        counts = np.repeat(self._counts[:, None], len(columns), axis=1)
        return Estimate(self._sums[:, columns], counts, working, metric)


def _log_root_sum(means: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(0.5 * np.log(means[..., 0] + means[..., 1]))


def _log_ratio(means: NDArray[Any]) -> NDArray[Any]:
    """log of the measured over the predicted RMS from the means of (e_μ², e_π², d²)."""
    return np.asarray(0.5 * (np.log(means[..., 2]) - np.log(means[..., 0] + means[..., 1])))


def _fisher(means: NDArray[Any]) -> NDArray[Any]:
    """Fisher's z of the correlation from the means of (e_μ², e_π², e_μ·e_π)."""
    return np.asarray(np.arctanh(means[..., 2] / np.sqrt(means[..., 0] * means[..., 1])))
