"""Plot-ready tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mismatch_probe.metrics.curves import (
    abs_diff_by_position,
    abs_diff_by_probability,
    abs_diff_ccdf,
    length_curve,
    policy_density,
)
from mismatch_probe.metrics.summary import compute_metrics


def test_policy_density_counts_both_axes(make_pair: Any) -> None:
    rollout, trainer = np.array([0.05, 0.55, 1.0, 0.55]), np.array([0.95, 0.55, 1.0, 0.12])
    density = policy_density(make_pair(np.log(rollout), np.log(trainer) - np.log(rollout)))
    want = np.zeros((50, 50))
    want[2, 47] = want[27, 27] = want[49, 49] = want[27, 6] = 1
    assert density.counts.tolist() == want.tolist()
    assert density.edges == pytest.approx(np.linspace(0, 1, 51))
    assert density.n == 4


def test_policy_density_leaves_out_nonfinite(make_pair: Any) -> None:
    density = policy_density(make_pair([-1.0, -np.inf], [0.0, 0.0]))
    assert density.n == density.counts.sum() == 1


def test_length_curve_has_the_line_of_the_summary(make_pair: Any) -> None:
    rng = np.random.default_rng(0)
    lengths = list(rng.integers(5, 80, 50))
    pair = make_pair(-1.0, rng.normal(0, 0.1, sum(lengths)), lengths)
    curve, metrics = length_curve(pair), compute_metrics(pair)
    slope = metrics["seq_log_ratio_slope_per_1k"]
    assert curve.response_length.tolist() == lengths
    assert curve.slope_per_1k == slope.value
    assert curve.slope_ci == (slope.ci_low, slope.ci_high)
    assert curve.intercept == metrics["seq_log_ratio_intercept"].value
    assert curve.slope_per_1k == pytest.approx(np.polyfit(lengths, curve.seq_log_ratio, 1)[0] * 1000)


@pytest.mark.parametrize(
    ("options", "lengths", "why"),
    [
        ({"on_policy": False, "off_policy_why": "replayed"}, [1, 3], "replayed"),
        ({}, [2, 2], "hardly vary"),
    ],
)
def test_length_curve_without_a_line(make_pair: Any, options: Any, lengths: list[int], why: str) -> None:
    curve = length_curve(make_pair(-1.0, [0.1, 0.2, 0.3, 0.4], lengths, **options))
    assert len(curve.seq_log_ratio) == 2
    assert (curve.slope_per_1k, curve.intercept, curve.slope_ci) == (None, None, None)
    assert why in curve.why


def test_ccdf_is_the_share_at_or_above(make_pair: Any) -> None:
    d = np.concatenate([np.zeros(50), np.random.default_rng(0).laplace(0, 0.1, 950)])
    tail = abs_diff_ccdf(make_pair(0.0, d))
    assert 100 < len(tail.abs_diff) <= 400
    assert (tail.abs_diff > 0).all()
    for x, share in zip(tail.abs_diff, tail.share, strict=True):
        assert share == pytest.approx((np.abs(d) >= x).mean())
    assert tail.share[0] == 0.95
    assert tail.share[-1] == 0.001
    assert (np.diff(tail.abs_diff) > 0).all()
    assert (np.diff(tail.share) < 0).all()


def test_ccdf_of_ties_and_of_nothing(make_pair: Any) -> None:
    tail = abs_diff_ccdf(make_pair(0.0, [0.1, -0.1, 0.2, 0.0], [4]))
    assert tail.share.tolist() == [0.75, 0.25]
    assert len(abs_diff_ccdf(make_pair(-1.0, [0.0, 0.0])).share) == 0


def test_bins_by_probability(make_pair: Any) -> None:
    b = np.log(np.repeat([5e-5, 0.05, 0.995, 1.0], 40))
    d = np.repeat([0.4, 0.2, 0.01, 0.03], 40)
    bins = abs_diff_by_probability(make_pair(b, d, prompts=list(range(40)) * 4))
    assert bins.left.tolist() == [0.0, 0.03, 0.99]
    assert bins.right.tolist() == [1e-4, 0.1, 1.0]
    assert bins.n.tolist() == [40, 40, 80]
    assert bins.mean_abs == pytest.approx([0.4, 0.2, 0.02])
    assert (bins.ci_low <= bins.mean_abs).all()
    assert (bins.mean_abs <= bins.ci_high).all()


@pytest.mark.parametrize("length", [1, 5, 12, 13, 40, 96, 97, 500, 32_768])
def test_bins_by_position_cover_every_token_once(make_pair: Any, length: int) -> None:
    bins = abs_diff_by_position(make_pair(-1.0, np.full(2 * length, 0.1), [length] * 2))
    assert 1 <= len(bins.n) <= 12
    assert bins.n.sum() == 2 * length
    assert bins.left[0] == 0
    assert bins.right[-1] >= length
    assert bins.left[1:].tolist() == bins.right[:-1].tolist()
    assert bins.n.tolist() == [2 * (min(r, length) - left) for left, r in zip(bins.left, bins.right, strict=True)]


def test_a_bin_of_one_prompt_has_no_interval(make_pair: Any) -> None:
    bins = abs_diff_by_position(make_pair(-1.0, [0.19, 0.2, 0.21], [2, 1]))
    assert np.isnan(bins.ci_low).tolist() == [False, True]
    assert bins.mean_abs == pytest.approx([0.2, 0.2])


def test_curves_of_no_tokens(make_pair: Any) -> None:
    pair = make_pair([], [], [])
    assert policy_density(pair).n == 0
    assert len(length_curve(pair).seq_log_ratio) == 0
    assert length_curve(pair).why
    for bins in (abs_diff_by_position(pair), abs_diff_by_probability(pair)):
        assert len(bins.n) == 0
