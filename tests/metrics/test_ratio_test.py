"""E[ρ] = 1: true where it is, found where it is not, and not judged where little is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mismatch_probe.metrics.accumulate import as_sums
from mismatch_probe.metrics.ratio_test import RatioTest, adjusted_together, mean_ratio_tests, ratio_tests
from mismatch_probe.metrics.sums import PROBABILITY_EDGES
from mismatch_probe.types import PairArrays


def two_policies(
    rng: np.random.Generator, n_prompts: int, length: int, noise: float, kept: int = 50
) -> tuple[np.ndarray, np.ndarray]:
    """b and d `[n_prompts · length]` of tokens sampled from μ: both laws are one law plus independent errors of its
    logits; μ keeps the `kept` likeliest of 50 tokens, as truncated sampling does."""
    n = n_prompts * length
    logits = rng.normal(0, 2.0, (n, 50))
    scale = noise * np.repeat(np.exp(rng.normal(0, 0.5, n_prompts)), length)[:, None]
    sides = [logits + scale * rng.normal(0, 1, logits.shape) for _ in range(2)]
    if kept < 50:
        sides[0][sides[0] < np.sort(sides[0], axis=1)[:, [-kept]]] = -np.inf
    rollout, trainer = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in sides)
    token = (rollout + rng.gumbel(0, 1, logits.shape)).argmax(axis=1)
    row = np.arange(n)
    return rollout[row, token], trainer[row, token] - rollout[row, token]


@pytest.fixture
def sampled(make_pair: Any) -> Any:
    def make(seed: int, noise: float, *, kept: int = 50, n_prompts: int = 64, **options: Any) -> PairArrays:
        b, d = two_policies(np.random.default_rng(seed), n_prompts, 60, noise, kept)
        return make_pair(b, d, [60] * n_prompts, **options)  # type: ignore[no-any-return]

    return make


def verdicts(pair: PairArrays, family: str) -> set[str]:
    return {test.verdict for test in ratio_tests(as_sums(pair), replicates=200) if test.family == family}


def test_policies_that_differ_by_symmetric_errors_hold(sampled: Any) -> None:
    false = {"overall": 0, "position": 0, "probability": 0}
    for seed in range(40):
        tests = ratio_tests(as_sums(sampled(seed, 0.05)), seed=seed, replicates=200)
        for family in false:
            false[family] += any(test.verdict == "violated" for test in tests if test.family == family)
    assert all(count <= 5 for count in false.values()), false  # 5 % of 40 is 2; more than 5 has probability 0.01


def test_a_truncated_rollout_is_found(sampled: Any, make_pair: Any) -> None:
    pair = sampled(1, 0.05, kept=10)
    overall = ratio_tests(as_sums(pair))[0]
    assert overall.verdict == "violated"
    assert overall.mean_ratio.value is not None
    assert overall.mean_ratio.value < 0.97
    assert "violated" in verdicts(pair, "position")
    assert "violated" in verdicts(pair, "probability")


def test_a_kept_mass_of_895_permille_gives_its_mean(sampled: Any, make_pair: Any) -> None:
    """Every token's rollout probability is divided by the kept mass."""
    honest = sampled(2, 0.02)
    d = honest.trainer_logprob - honest.rollout_logprob + np.log(0.895)
    overall = ratio_tests(as_sums(make_pair(honest.rollout_logprob, d, [60] * 64)))[0]
    assert overall.mean_ratio.value == pytest.approx(0.895, abs=0.003)
    assert (overall.verdict, overall.p_holm) == ("violated", pytest.approx(0, abs=1e-9))


def test_a_bias_of_log_softmax_is_significant_and_negligible(make_pair: Any) -> None:
    rng = np.random.default_rng(3)
    d = rng.normal(-1e-5, 1e-5, 64 * 60)
    for family in ("overall", "position", "probability"):
        pair = make_pair(-rng.exponential(1, len(d)), d, [60] * 64)
        assert verdicts(pair, family) - {"inconclusive"} == {"violated but negligible"}


def sums_of_laws(near: float, spread: float, one_side: bool, noise: float = 0.1) -> dict[str, np.ndarray]:
    """What 64 prompts of 4,000 positions would show with every token of their laws, as often as μ draws it: the shift
    of each bin of probability that errors make, without that of sampling. Of the positions, `near` are near certain.

    Args:
        near: Share of the positions at which one token leads.
        spread: Standard deviation of the logits; below 1 as of an untrained model.
        one_side: Whether the trainer makes no errors.
        noise: Standard deviation of the errors of a logit.
    """
    rng = np.random.default_rng(0)
    edges = PROBABILITY_EDGES
    sums = np.zeros((3, 64, len(edges) - 1))
    for prompt in range(64):
        logits = rng.normal(0, spread, (4000, 16))
        certain = rng.random(4000) < near
        logits[certain, 0] = logits[certain].max(axis=1) + rng.normal(6, 1.5, certain.sum())
        scales = (noise, 0.0 if one_side else noise)
        b, a = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in _erring(rng, logits, scales))
        mu = np.exp(b).ravel()
        bins = np.clip(np.searchsorted(edges, mu, side="right") - 1, 0, len(edges) - 2)
        for row, column in zip(sums, (np.expm1((a - b).ravel()), 1.0, (a - b).ravel() ** 2), strict=True):
            row[prompt] = np.bincount(bins, mu * column, len(edges) - 1)
    return dict(zip(("excess", "counts", "squares"), sums, strict=True)) | {"edges": edges}


def _erring(rng: np.random.Generator, logits: np.ndarray, scales: tuple[float, float]) -> list[np.ndarray]:
    return [logits + scale * rng.normal(0, 1, logits.shape) for scale in scales]


@pytest.mark.parametrize("one_side", [False, True])
@pytest.mark.parametrize(("near", "spread"), [(0.0, 2.0), (0.0, 0.5), (0.5, 2.0), (0.8, 2.0), (0.8, 1.0), (0.95, 2.0)])
def test_errors_of_near_certain_tokens_are_no_fault_however_many_there_are(
    near: float, spread: float, one_side: bool
) -> None:
    """The mean d² of all tokens was the tolerance, of which the shift is up to 26 times; the bin's is no better."""
    tests = mean_ratio_tests("probability", **sums_of_laws(near, spread, one_side), replicates=50)
    (tests,) = adjusted_together([tests])
    assert {test.verdict for test in tests} <= {"holds", "inconclusive"}
    shift = max(abs(test.mean_ratio.value - 1) for test in tests if test.n_tokens > 100 and test.mean_ratio.value)
    assert shift < tests[0].tolerance
    assert tests[0].tolerance < 0.25


def test_a_fault_does_not_raise_its_own_tolerance(make_pair: Any) -> None:
    """d² of a fault of 15 % is .026, of which `TOLERANCE` times would hide it."""
    rng = np.random.default_rng(8)
    d = np.log(0.85) + rng.normal(-0.5 * 0.02**2, 0.02, 64 * 60)
    tests = ratio_tests(as_sums(make_pair(-rng.exponential(1, len(d)), d, [60] * 64)), replicates=50)
    of_bins = [test for test in tests if test.family == "probability" and test.p_value is not None]
    assert {test.verdict for test in of_bins} == {"violated"}
    assert of_bins[0].tolerance == pytest.approx(6 * 0.02**2, rel=0.5)


@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_regression_to_the_mean_by_probability_is_not_called_a_fault(sampled: Any, noise: float) -> None:
    """Over 90,000 tokens the selection by a noisy probability shows in several bins, and stays below mean d²."""
    tests = ratio_tests(as_sums(sampled(4, noise, n_prompts=1500)), replicates=200)
    of_bins = [test for test in tests if test.family == "probability" and test.verdict != "inconclusive"]
    means = [test.mean_ratio for test in of_bins]
    assert sum(mean.ci_high < 1 for mean in means if mean.ci_high is not None) >= 3
    assert {test.verdict for test in of_bins} == {"holds"}
    assert {test.verdict for test in tests if test.family == "position"} == {"holds"}


def test_values_per_bin_are_the_plain_means(sampled: Any) -> None:
    pair = sampled(5, 0.3)
    rho, b = np.exp(pair.trainer_logprob - pair.rollout_logprob), np.exp(pair.rollout_logprob)
    for test in ratio_tests(as_sums(pair), replicates=50):
        inside = np.full(len(b), True)
        if test.left is not None and test.right is not None:
            values = b if test.family == "probability" else pair.position
            inside = (values >= test.left) & (values < test.right)
        assert test.n_tokens == inside.sum()
        if test.n_tokens:
            assert test.mean_ratio.value == pytest.approx(rho[inside].mean(), rel=1e-12)


def test_p_value_is_the_interval_and_is_adjusted_over_all_tests(sampled: Any) -> None:
    tests = ratio_tests(as_sums(sampled(6, 0.3, kept=30)), replicates=200)
    judged = [test for test in tests if test.p_value is not None]
    assert len(judged) > 15
    for test in judged:
        assert test.tolerance == 0 or test.family == "probability"
        assert test.p_holm >= test.p_value  # type: ignore[operator]
        if test.family == "probability":
            continue
        assert test.mean_ratio.ci_low is not None
        assert test.mean_ratio.ci_high is not None
        assert (test.p_value < 0.05) == (not test.mean_ratio.ci_low <= 1 <= test.mean_ratio.ci_high)  # type: ignore[operator]
    smallest = min(judged, key=lambda test: test.p_value or 0)
    assert smallest.p_holm == pytest.approx(min(1.0, len(judged) * (smallest.p_value or 0)))


def test_tests_of_all_pairs_are_adjusted_together() -> None:
    """Each pair's least p-value is .01, which stands alone and not among nine."""
    rng = np.random.default_rng(0)
    counts = np.full((64, 1), 50.0)
    (test,) = mean_ratio_tests("overall", counts * rng.normal(0.01, 0.05, counts.shape), counts, replicates=50)
    pairs = [[replace(test, p_value=p) for p in (0.01 + k * 1e-4, 0.5)] for k in range(9)]
    assert [tests[0].verdict for tests in (adjusted_together([pair])[0] for pair in pairs)] == ["violated"] * 9
    together = adjusted_together(pairs)
    assert {test.verdict for tests in together for test in tests} == {"holds"}
    assert together[0][0].p_holm == pytest.approx(18 * 0.01)
    assert [len(tests) for tests in together] == [2] * 9


def test_small_and_empty_bins_are_inconclusive() -> None:
    rng = np.random.default_rng(7)
    counts = np.column_stack([np.full(64, 10.0), np.zeros(64), np.where(np.arange(64) < 5, 200.0, 0.0), np.eye(64)[0]])
    excess = counts * rng.normal(0, 0.1, counts.shape)
    (bins,) = adjusted_together([mean_ratio_tests("bins", excess, counts, np.arange(5.0), replicates=50)])
    full, empty, few, one = bins
    assert full.verdict in ("holds", "violated")
    assert (empty.verdict, empty.mean_ratio.why) == ("inconclusive", "no tokens")
    assert few.verdict == one.verdict == "inconclusive"
    assert few.mean_ratio.why.startswith("1000 tokens of 5 prompts are too few to judge")
    assert full.p_holm == full.p_value


def test_a_policy_against_itself_holds_exactly(make_pair: Any) -> None:
    tests = ratio_tests(as_sums(make_pair(-1.0, np.zeros(64 * 60), [60] * 64)), replicates=50)
    assert {test.verdict for test in tests} == {"holds", "inconclusive"}
    assert tests[0].mean_ratio.value == 1.0
    assert tests[0].p_value == 1.0


@pytest.mark.parametrize("d", [-1000.0, -50.0, 5.0, 700.0])
def test_laws_that_lie_far_apart_have_a_tolerance_that_is_a_number(make_pair: Any, d: float) -> None:
    rng = np.random.default_rng(9)
    pair = make_pair(-rng.exponential(1, 64 * 60), d + rng.normal(0, 0.1, 64 * 60), [60] * 64)
    of_bins = [test for test in ratio_tests(as_sums(pair), replicates=50) if test.family == "probability"]
    assert all(0 <= test.tolerance < 0.2 for test in of_bins)
    assert "holds" not in {test.verdict for test in of_bins}


def test_off_policy_says_why(make_pair: Any) -> None:
    tests = ratio_tests(as_sums(make_pair(-1.0, [0.1, 0.2], on_policy=False, off_policy_why="replayed")))
    assert [(test.verdict, test.mean_ratio.why) for test in tests] == [("inconclusive", "replayed")]
    assert isinstance(tests[0], RatioTest)
