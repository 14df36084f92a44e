"""Exact metrics where some divergence of a position is infinite or not a number."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax

from mismatch_probe.metrics.exact import ExactRows, divergences, estimator_costs, exact_metrics
from mismatch_probe.metrics.intervals import Estimate, evaluate
from mismatch_probe.types import MetricValue

PROMPTS, PER_PROMPT, VOCABULARY, MASKED = 8, 5, 40, 10


def rows_of(rollout: np.ndarray, trainer: np.ndarray) -> ExactRows:
    """Every position of prompts of equal length, each standing for itself."""
    return ExactRows(
        values=divergences(rollout, trainer),
        weight=np.ones(len(rollout)),
        stands_for=np.ones(len(rollout)),
        prompt=np.repeat(np.arange(PROMPTS), PER_PROMPT),
        tokens=np.full(PROMPTS, float(PER_PROMPT)),
        sequences=np.ones(PROMPTS),
    )


def values_of(rows: ExactRows) -> dict[str, MetricValue]:
    found = exact_metrics(rows)
    estimates = {key: result for key, result in found.items() if isinstance(result, Estimate)}
    values = evaluate(estimates, seed=0, replicates=100)
    return values | {key: result for key, result in found.items() if isinstance(result, MetricValue)}


def masked_pair(some: slice) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a trainer, and of a rollout engine that masks a slice of the vocabulary at `some` positions."""
    trainer = np.random.default_rng(0).standard_normal((PROMPTS * PER_PROMPT, VOCABULARY))
    rollout = trainer.copy()
    rollout[some, :MASKED] = -np.inf
    return rollout, trainer


def test_a_mask_on_the_rollout_side_leaves_the_finite_divergences() -> None:
    rollout, trainer = masked_pair(slice(None))
    rows = rows_of(rollout, trainer)
    values = values_of(rows)
    kept = np.exp(log_softmax(trainer, axis=1))[:, MASKED:].sum(axis=1)
    assert values["kl_exact"].value == pytest.approx(-np.log(kept).mean())
    assert values["kl_seq_exact"].value == pytest.approx(-PER_PROMPT * np.log(kept).mean())
    assert values["tv_exact"].value == pytest.approx(1 - kept.mean())
    for key in ("kl_exact_reverse", "chi2_exact"):
        assert values[key].value is None
        assert values[key].why == f"finite at none of the {PROMPTS * PER_PROMPT} compared positions"
    k1 = next(cost for cost in estimator_costs(rows) if cost.key == "kl_k1")
    assert k1.mean == pytest.approx(-np.log(kept).mean())


def test_a_metric_says_over_how_many_positions_it_was_computed() -> None:
    rollout, trainer = masked_pair(slice(0, 3))
    rollout[3:, :] += 0.1 * np.random.default_rng(1).standard_normal((PROMPTS * PER_PROMPT - 3, VOCABULARY))
    rollout[-1, 0] = np.nan
    values = values_of(rows_of(rollout, trainer))
    n = PROMPTS * PER_PROMPT
    assert values["kl_exact"].why.startswith(f"computed over the {n - 1} of {n} positions")
    assert values["kl_exact_reverse"].why.startswith(f"computed over the {n - 4} of {n} positions")
    by_hand = divergences(rollout[3:-1], trainer[3:-1])["kl_reverse"].mean()
    assert values["kl_exact_reverse"].value == pytest.approx(by_hand)
