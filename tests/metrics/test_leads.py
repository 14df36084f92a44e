"""Leads and lags: against scipy's correlation and all pairings, and how often nothing is called something."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mismatch_probe.errors import UsageError
from mismatch_probe.metrics.leads import leads


def walks(rng: np.random.Generator, runs: int, steps: int, memory: float) -> np.ndarray:
    """Series that remember, around a trend that all runs share."""
    noise = rng.standard_normal((runs, steps))
    for t in range(1, steps):
        noise[:, t] += memory * noise[:, t - 1]
    return noise + np.linspace(0, 3, steps)


@given(st.integers(0, 10_000), st.integers(-3, 3))
def test_correlations_are_those_of_scipy(seed: int, lag: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = walks(rng, 4, 20, 0.5), walks(rng, 4, 20, 0.5)

    def pearson(i: int, j: int) -> float:
        early, late = (x[i, : 20 - lag], y[j, lag:]) if lag >= 0 else (x[i, -lag:], y[j, :lag])
        return float(stats.pearsonr(early, late).statistic)

    (found,) = leads(x, y, [lag])
    assert found.correlation == pytest.approx(np.mean([pearson(i, i) for i in range(4)]))
    every = [np.mean([pearson(i, j) for i, j in enumerate(p)]) for p in itertools.permutations(range(4))]
    assert found.elsewhere == pytest.approx(np.mean(every))
    further = np.abs(every - np.mean(every)) >= abs(every[0] - np.mean(every)) * (1 - 1e-9)
    assert found.p_value == pytest.approx(further.mean())


def test_the_one_that_goes_first_is_told() -> None:
    rng = np.random.default_rng(1)
    x = walks(rng, 8, 60, 0.3)
    y = np.roll(x, 2, axis=1) + 0.5 * walks(rng, 8, 60, 0.3)  # two steps later
    found = {lead.lag: lead for lead in leads(x[:, 4:], y[:, 4:], range(-4, 5))}
    assert max(found.values(), key=lambda lead: lead.correlation - lead.elsewhere).lag == 2
    assert found[2].p_value < 0.01


@pytest.mark.parametrize("memory", [0.0, 0.9])
def test_unrelated_series_are_rarely_called_related(memory: float) -> None:
    """At 5 % over all lags; a binomial limit of 200 draws."""
    rng = np.random.default_rng(2)
    alarms = 0
    for _ in range(200):
        found = leads(walks(rng, 6, 40, memory), walks(rng, 6, 40, memory), range(-3, 4))
        alarms += min(lead.p_value for lead in found) < 0.05
    assert stats.binom.sf(alarms - 1, 200, 0.05) > 0.001


@pytest.mark.parametrize(
    ("first", "second", "lags", "said"),
    [
        (np.ones((4, 20)), np.ones((4, 19)), [0], "do not pair"),
        (np.eye(3, 20), np.eye(3, 20), [0], "3 runs cannot show"),
        (np.eye(4, 20), np.eye(4, 20), [13], "20 steps are too few"),
        (np.full((4, 20), np.nan), np.eye(4, 20), [0], "not finite"),
        (np.ones((4, 20)), np.eye(4, 20), [0], "does not change"),
    ],
)
def test_what_cannot_be_told_is_refused(first: np.ndarray, second: np.ndarray, lags: list[int], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        leads(first, second, lags)
