"""Our k̂ against ArviZ's older package, a program of its own beside the arviz-stats that we call, and against known k.

The two take tails of ⌈·⌉ and ⌊·⌋ of 3√n values (of n/5 up to n = 225), so they are equal where that is a whole number.
"""

from __future__ import annotations

import math
import warnings
from types import ModuleType

import numpy as np
import pytest
from scipy import stats

from mismatch_probe.metrics.summary import compute_metrics, pareto_k_threshold
from mismatch_probe.types import MetricValue, PairArrays
from tests.oracles.batches import load


@pytest.fixture(scope="module")
def arviz() -> ModuleType:
    return load("arviz")


def pareto_k(seq_log_ratio: np.ndarray) -> MetricValue:
    """`pareto_k` of sequences of one token each."""
    n = len(seq_log_ratio)
    rows = np.arange(n)
    zeros = np.zeros(n)
    pair = PairArrays(zeros, seq_log_ratio, sequence=rows, position=np.zeros(n, np.int64), prompt=rows)
    return compute_metrics(pair, replicates=20)["pareto_k"]


def weights(kind: str, n: int) -> np.ndarray:
    draw = np.random.default_rng(7)
    return {
        "Gaussian": lambda: draw.normal(-0.5, 1.0, n),
        "narrow": lambda: draw.normal(0, 0.02, n),
        "heavy": lambda: 0.5 * draw.standard_t(3, n),
        "Pareto": lambda: np.log(stats.genpareto.rvs(0.6, loc=0.1, size=n, random_state=draw)),
    }[kind]()


KINDS = ("Gaussian", "narrow", "heavy", "Pareto")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [200, 225, 400, 2500])
def test_same_khat(arviz: ModuleType, kind: str, n: int) -> None:
    d = weights(kind, n)
    value = pareto_k(d).value
    assert value is not None
    assert value == pytest.approx(float(arviz.psislw(d)[1]), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [226, 1000, 4321])
def test_same_khat_of_the_same_tail(arviz: ModuleType, kind: str, n: int) -> None:
    """At other n the tails differ by one value, which a relative efficiency above 1 takes from the older package's."""
    d = weights(kind, n)
    value = pareto_k(d).value
    assert value is not None
    tail = math.floor(3 * math.sqrt(n))
    assert value == pytest.approx(float(arviz.psislw(d, reff=n / (tail / 3) ** 2 * (1 + 1e-9))[1]), rel=1e-9)
    rounded_up = float(arviz.psislw(d)[1])
    assert value != pytest.approx(rounded_up, rel=1e-6)
    assert value == pytest.approx(rounded_up, abs=0.1)


@pytest.mark.parametrize(("kind", "n"), [("Gaussian", 400), ("Pareto", 400), ("heavy", 2500)])
def test_same_verdict_as_leave_one_out(arviz: ModuleType, kind: str, n: int) -> None:
    """ArviZ's `loo` has weights exp(−log-likelihood): given −D, it finds our k̂ and threshold, and warns where we do."""
    d = weights(kind, n)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = arviz.from_dict(posterior={"x": d[None]}, log_likelihood={"y": -d[None, :, None]})
        found = arviz.loo(data, pointwise=True, reff=1.0)
    metric = pareto_k(d)
    assert metric.value == pytest.approx(float(found.pareto_k[0]), rel=1e-9)
    assert pareto_k_threshold(n) == pytest.approx(found.good_k)
    assert bool(metric.why) == any("shape parameter of Pareto" in str(w.message) for w in caught)
    assert bool(metric.why) == (found.pareto_k[0] > found.good_k)


@pytest.mark.parametrize("n", [200, 1000, 2154, 2155, 10_000])
def test_threshold(n: int) -> None:
    """1 − 1/log10 n up to 0.7, which it reaches at n = 10^(10/3) ≈ 2,154."""
    assert pareto_k_threshold(n) == pytest.approx(1 - 1 / math.log10(n) if n < 2155 else 0.7)


@pytest.mark.parametrize("k", [-0.3, 0.1, 0.5, 0.7, 0.9, 1.5])
def test_known_shape(k: float) -> None:
    """A generalised Pareto variable above a threshold is one again, of the same k. The fit's prior adds 10 times ½."""
    n = 40_000
    d = np.log(stats.genpareto.ppf((np.arange(n) + 0.5) / n, k) + 1.0)
    metric = pareto_k(d)
    tail = 3 * math.sqrt(n)
    assert metric.value == pytest.approx((tail * k + 5) / (tail + 10), abs=0.02)
    assert ("unreliable" in metric.why) == (k > 0.7)
