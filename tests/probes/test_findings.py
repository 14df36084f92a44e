"""When the findings say that the mean importance ratio is not 1."""

from __future__ import annotations

import numpy as np
import pytest

from mismatch_probe.metrics.accumulate import as_sums
from mismatch_probe.metrics.ratio_test import ratio_tests
from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.passes import PassId
from mismatch_probe.probes.findings import findings
from mismatch_probe.probes.pairs import PairResult, PassPair, pair_of
from mismatch_probe.results.finding import Finding
from mismatch_probe.types import PairArrays


def result(log_ratio: np.ndarray) -> PairResult:
    """Sequences of 30 tokens, one a prompt."""
    n = len(log_ratio)
    rollout = -np.random.default_rng(1).exponential(1.0, n)
    pair = PairArrays(rollout, rollout + log_ratio, np.arange(n) // 30, np.arange(n) % 30, np.arange(n // 30))
    sums = as_sums(pair)
    both = PassPair(PassId.rollout("vllm", "bfloat16"), PassId.trainer("hf", "bfloat16"))
    found = pair_of(both, sums, compute_metrics(sums)).model_copy(update={"ratio_tests": tuple(ratio_tests(sums))})
    return PairResult(both, found, sums, None)


def found_of(name: str, log_ratio: np.ndarray) -> dict[str, Finding]:
    """What is found of one pair, by code."""
    one = result(log_ratio)
    return {finding.code: finding for finding in findings([one.pair], {name: one.pair}, None, {})}


def one_sided(log_ratio: np.ndarray) -> Finding | None:
    return found_of("bfloat16", log_ratio).get("mean-ratio-not-one")


def test_a_truncated_rollout_is_named_with_the_kept_mass() -> None:
    noise = np.random.default_rng(2).normal(0, 0.01, 64 * 30)
    found = one_sided(np.log(0.895) + noise)
    assert found is not None
    assert (found.severity, found.where) == ("warn", "bfloat16")
    assert found.metric("mean_ratio").value == pytest.approx(0.895, abs=0.01)


def test_rounding_is_not_blamed() -> None:
    """Over many runs of on-policy noise, with a dozen bins each, the finding is rare: it counts every test at once."""
    rng = np.random.default_rng(3)
    alarms = sum(one_sided(rng.normal(-0.5 * 0.05**2, 0.05, 64 * 30)) is not None for _ in range(30))
    assert alarms <= 3


def test_only_an_interval_shows_that_what_is_left_is_rounding() -> None:
    def floor(log_ratio: np.ndarray) -> str:
        return found_of("float32", log_ratio)["fp32-floor"].severity

    noise = np.random.default_rng(5).normal(0, 1e-6, 64 * 30)
    assert floor(noise) == "info"
    assert floor(noise[:30]) == "note"
    assert floor(1e3 * noise) == "warn"


@pytest.mark.parametrize("shift", [-1e-5, 1e-5])
def test_what_is_negligible_is_not_a_finding(shift: float) -> None:
    assert one_sided(shift + np.random.default_rng(4).normal(0, 1e-6, 64 * 30)) is None
