"""The error budget: independent errors add in quadrature, shared ones do not, and chunks change nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mismatch_probe.metrics.ladder import BudgetSums
from mismatch_probe.types import MetricValue, PairArrays


def pair(rollout_error: np.ndarray, trainer_error: np.ndarray, per_prompt: int = 20) -> PairArrays:
    """Tokens whose reference log-prob is known, with these errors on either side."""
    n = len(rollout_error)
    reference = -np.abs(np.random.default_rng(9).normal(2, 1, n))
    sequence = np.arange(n) // per_prompt
    prompts = int(sequence.max()) + 1
    return PairArrays(
        rollout_logprob=reference + rollout_error,
        trainer_logprob=reference + trainer_error,
        sequence=sequence,
        position=np.arange(n) % per_prompt,
        prompt=np.arange(prompts),
        prompt_ids=tuple(f"p{i}" for i in range(prompts)),
        columns={"reference_logprob": reference},
    )


def budget(*chunks: PairArrays) -> dict[str, MetricValue]:
    sums = BudgetSums(len(chunks[0].prompt_ids))
    for chunk in chunks:
        sums.update(chunk)
    return sums.metrics(replicates=200)


def test_independent_errors_add_in_quadrature() -> None:
    rng = np.random.default_rng(0)
    got = budget(pair(rng.normal(0, 3e-2, 4000), rng.normal(0, 4e-2, 4000)))
    assert got["rollout_error_rms"].value == pytest.approx(3e-2, rel=0.05)
    assert got["trainer_error_rms"].value == pytest.approx(4e-2, rel=0.05)
    assert got["predicted_gap_rms"].value == pytest.approx(5e-2, rel=0.05)
    assert got["measured_gap_rms"].value == pytest.approx(5e-2, rel=0.05)
    ratio, correlation = got["measured_over_predicted"], got["error_correlation"]
    assert ratio.ci_low is not None
    assert ratio.ci_high is not None
    assert ratio.ci_low < 1 < ratio.ci_high
    assert correlation.ci_low is not None
    assert correlation.ci_high is not None
    assert correlation.ci_low < 0 < correlation.ci_high


def test_what_both_sides_share_cancels() -> None:
    rng = np.random.default_rng(1)
    shared, own, other = rng.normal(0, 1e-2, (3, 6000))
    got = budget(pair(shared + own, shared + other))
    assert got["error_correlation"].value == pytest.approx(0.5, abs=0.05)
    assert got["measured_over_predicted"].value == pytest.approx(np.sqrt(0.5), rel=0.05)


def test_the_identity_that_holds_for_any_data() -> None:
    """mean d² = mean e_μ² + mean e_π² − 2 r √(mean e_μ² · mean e_π²)."""
    rng = np.random.default_rng(2)
    got = {k: v.value or 0.0 for k, v in budget(pair(rng.normal(1e-3, 1e-2, 500), rng.laplace(0, 2e-2, 500))).items()}
    cross = 2 * got["error_correlation"] * got["rollout_error_rms"] * got["trainer_error_rms"]
    assert got["measured_gap_rms"] ** 2 == pytest.approx(got["predicted_gap_rms"] ** 2 - cross)
    assert got["measured_over_predicted"] == pytest.approx(got["measured_gap_rms"] / got["predicted_gap_rms"])


def test_chunks_add_up() -> None:
    rng = np.random.default_rng(3)
    whole = pair(rng.normal(0, 1, 400), rng.normal(0, 1, 400))
    parts = []
    for rows in (whole.sequence < 7, whole.sequence >= 7):
        cut = {
            name: getattr(whole, name)[rows] for name in ("rollout_logprob", "trainer_logprob", "sequence", "position")
        }
        reference = whole.columns["reference_logprob"][rows]
        parts.append(replace(whole, **cut, columns={"reference_logprob": reference}))
    one, two = budget(whole), budget(*parts)
    assert {k: v.value for k, v in one.items()} == pytest.approx({k: v.value for k, v in two.items()}, rel=1e-12)


def test_tokens_that_are_not_finite_anywhere_are_left_out() -> None:
    rng = np.random.default_rng(4)
    errors = rng.normal(0, 1e-2, (2, 100))
    broken = pair(*errors)
    broken.columns["reference_logprob"][3] = np.nan  # type: ignore[index]
    broken.rollout_logprob[4] = -np.inf
    sums = BudgetSums(len(broken.prompt_ids))
    sums.update(broken)
    assert sums.n_tokens == 98
    kept = np.delete(errors[0], [3, 4])
    assert sums.metrics(replicates=50)["rollout_error_rms"].value == pytest.approx(np.sqrt((kept**2).mean()))


def test_a_side_that_is_the_reference_has_no_correlation() -> None:
    got = budget(pair(np.random.default_rng(5).normal(0, 1e-2, 100), np.zeros(100)))
    assert got["trainer_error_rms"].value == 0.0
    assert got["predicted_gap_rms"].value == pytest.approx(got["rollout_error_rms"].value)
    assert got["error_correlation"].value is None
    assert "is the reference itself" in got["error_correlation"].why


def test_nothing_finite_says_so() -> None:
    got = budget(pair(np.full(20, np.nan), np.zeros(20)))
    assert all(value.value is None and "no token has usable log-probs" in value.why for value in got.values())
