"""When the findings say that the mean importance ratio is not 1."""

from __future__ import annotations

import numpy as np
import pytest

from mismatch_probe.metrics.accumulate import as_sums
from mismatch_probe.metrics.ratio_test import ratio_tests
from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.probes.findings import findings
from mismatch_probe.probes.pairs import Cell, PairResult
from mismatch_probe.probes.planning import RolloutPass, TrainerPass
from mismatch_probe.types import PairArrays


def result(log_ratio: np.ndarray) -> PairResult:
    """Sequences of 30 tokens, one a prompt."""
    n = len(log_ratio)
    rollout = -np.random.default_rng(1).exponential(1.0, n)
    pair = PairArrays(rollout, rollout + log_ratio, np.arange(n) // 30, np.arange(n) % 30, np.arange(n // 30))
    sums = as_sums(pair)
    cell = Cell(RolloutPass("bfloat16", "decode"), TrainerPass("bfloat16", "cast"))
    return PairResult(cell, sums, compute_metrics(sums), None, None, ratio_tests(sums), {}, 0, None, [])


def one_sided(log_ratio: np.ndarray) -> list[str]:
    rows = findings({"bfloat16": result(log_ratio)}, {}, 0)
    return [row["text"] for row in rows if row["name"] == "one_sided"]


def test_a_truncated_rollout_is_named_with_the_kept_mass() -> None:
    noise = np.random.default_rng(2).normal(0, 0.01, 64 * 30)
    (text,) = one_sided(np.log(0.895) + noise)
    assert "bfloat16 0.89" in text
    assert "truncated or rescaled law" in text


def test_rounding_is_not_blamed() -> None:
    """Over many runs of on-policy noise, with a dozen bins each, the sentence is rare: it counts every test at once."""
    rng = np.random.default_rng(3)
    alarms = sum(bool(one_sided(rng.normal(-0.5 * 0.05**2, 0.05, 64 * 30))) for _ in range(30))
    assert alarms <= 3


def test_only_an_interval_shows_that_what_is_left_is_rounding() -> None:
    def floor(log_ratio: np.ndarray) -> str:
        rows = findings({"float32": result(log_ratio)}, {}, 0)
        return next(str(row["text"]) for row in rows if row["name"] == "fp32_floor")

    noise = np.random.default_rng(5).normal(0, 1e-6, 64 * 30)
    assert floor(noise).endswith("so what is left in 16 bits is rounding.")
    assert floor(noise[:30]).endswith("which does not exclude 0.0001 and more.")
    assert "do not compute the same thing" in floor(1e3 * noise)


@pytest.mark.parametrize("shift", [-1e-5, 1e-5])
def test_what_is_negligible_is_not_a_finding(shift: float) -> None:
    assert one_sided(shift + np.random.default_rng(4).normal(0, 1e-6, 64 * 30)) == []
