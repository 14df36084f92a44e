"""Metrics of gradients: enumeration of every sign, closed forms, invariances."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mismatch_probe.metrics.gradient import GRADIENT_KEYS, Weighted, gradient_metrics, random_walk_ess, sign_draws
from mismatch_probe.metrics.intervals import Floats
from mismatch_probe.types import MetricValue, PairArrays

seeds = st.integers(0, 10_000)
N, K = 6, 5


def per_sequence(weights: Floats, score: Floats) -> Weighted:
    return Weighted(weights[:, None] * score, np.ones(len(weights)), weights - 1, (weights - 1) ** 2)


def drawn(seed: int, n: int = N, spread: float = 0.5) -> tuple[Weighted, Floats, Floats]:
    """A correction that weights sequences, the scores, and the reference vectors."""
    draw = np.random.default_rng(seed)
    score = draw.normal(0, draw.uniform(0.2, 3, (n, 1)), (n, K))
    weights = np.exp(draw.normal(0, spread, (2, n)))
    return per_sequence(weights[0], score), score, weights[1][:, None] * score


def values(corrected: Weighted, score: Floats, reference: Floats, prompt: Floats | None = None) -> dict[str, float]:
    index = np.arange(len(score)) if prompt is None else prompt
    found = gradient_metrics(corrected, score, reference, index.astype(np.int64), replicates=20)
    return {key: value.value for key, value in vars(found).items() if value.value is not None}


@given(seeds)
def test_all_signs_together_give_what_is_computed_without_any(seed: int) -> None:
    corrected, score, reference = drawn(seed)
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=N)))
    g, h, plain = (signs @ vectors / N for vectors in (corrected.vectors, reference, score))

    def product(a: Floats, b: Floats) -> float:
        return float((a * b).sum(axis=1).mean())

    def trace(a: Floats) -> float:
        return float(np.trace(np.cov(a.T, bias=True)))

    expected = {
        "cosine": product(g, h) / np.sqrt(product(g, g) * product(h, h)),
        "norm_ratio": np.sqrt(product(g, g) / product(h, h)),
        "added_variance": trace(g) / trace(plain) - 1,
        "effective_batch": product(g, plain) ** 2 / (product(g, g) * product(plain, plain)),
    }
    found = values(corrected, score, reference)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key


@given(seeds)
def test_scores_of_equal_length_make_the_effective_batch_that_of_kish(seed: int) -> None:
    draw = np.random.default_rng(seed)
    score = draw.normal(size=(N, K))
    score /= np.linalg.norm(score, axis=1, keepdims=True)
    weights = np.exp(draw.normal(0, 0.7, N))
    kish = weights.sum() ** 2 / (N * (weights**2).sum())
    found = values(per_sequence(weights, score), score, score)
    assert found["effective_batch"] == pytest.approx(kish, rel=1e-9)
    assert found["ess_weights"] == pytest.approx(kish, rel=1e-9)
    assert found["cosine"] == pytest.approx(np.sqrt(kish), rel=1e-9)
    assert found["added_variance"] == pytest.approx((weights**2).mean() - 1, rel=1e-9, abs=1e-12)


def test_equal_policies_change_nothing() -> None:
    _, score, _ = drawn(0, n=12)
    found = gradient_metrics(per_sequence(np.ones(12), score), score, score, np.arange(12), replicates=50)
    for key in GRADIENT_KEYS:
        same = 0.0 if key == "added_variance" else 1.0
        value: MetricValue = getattr(found, key)
        assert (value.value, value.ci_low, value.ci_high) == (same, same, same), key


@given(seeds, st.floats(0.1, 10))
def test_length_of_the_vectors_reaches_the_norm_alone(seed: int, factor: float) -> None:
    corrected, score, reference = drawn(seed)
    scaled = Weighted(factor * corrected.vectors, corrected.n_weights, corrected.excess, corrected.squared_excess)
    before, after = values(corrected, score, reference), values(scaled, score, reference)
    assert after["norm_ratio"] == pytest.approx(factor * before["norm_ratio"], rel=1e-9)
    assert after["added_variance"] + 1 == pytest.approx(factor**2 * (before["added_variance"] + 1), rel=1e-9)
    for key in ("cosine", "effective_batch"):
        assert after[key] == pytest.approx(before[key], rel=1e-9)


@given(seeds)
def test_neither_order_nor_rotation_matters(seed: int) -> None:
    corrected, score, reference = drawn(seed)
    draw = np.random.default_rng(seed)
    order, turn = draw.permutation(N), np.linalg.qr(draw.normal(size=(K, K)))[0]
    turned = Weighted(
        corrected.vectors[order] @ turn,
        corrected.n_weights[order],
        corrected.excess[order],
        corrected.squared_excess[order],
    )
    after = values(turned, score[order] @ turn, reference[order] @ turn)
    assert after == pytest.approx(values(corrected, score, reference), rel=1e-9)


@given(seeds)
def test_limits_stay_where_the_metric_lives(seed: int) -> None:
    corrected, score, reference = drawn(seed, n=24, spread=2.0)
    found = gradient_metrics(corrected, score, reference, np.arange(24), replicates=100)
    for key, low in (("cosine", -1.0), ("effective_batch", 0.0), ("ess_weights", 0.0)):
        value = getattr(found, key)
        assert value.value is not None
        if value.ci_low is None:
            assert "no interval" in value.why
            continue
        assert value.ci_high is not None
        assert low <= value.ci_low <= value.value <= value.ci_high <= 1.0, key


def test_the_interval_covers_the_long_run_value() -> None:
    # One sequence a prompt, log-normal weights of spread σ on scores of equal length: cos² = exp(−σ²).
    sigma, n, hits, repeats, withheld = 0.3, 48, 0, 120, 0
    draw = np.random.default_rng(1)
    for _ in range(repeats):
        score = draw.normal(size=(n, 64))
        score /= np.linalg.norm(score, axis=1, keepdims=True)
        weights = np.exp(draw.normal(-(sigma**2) / 2, sigma, n))
        cosine = gradient_metrics(per_sequence(weights, score), score, score, np.arange(n), replicates=200).cosine
        if cosine.ci_low is None or cosine.ci_high is None:
            withheld += 1
        else:
            hits += cosine.ci_low <= np.exp(-(sigma**2) / 2) <= cosine.ci_high
    assert withheld <= 6
    assert hits / (repeats - withheld) > 0.88


def test_a_tiny_angle_keeps_its_digits() -> None:
    score = np.eye(N, K + N)
    bent = score + 1e-5 * np.roll(score, K, axis=1)
    weighted = Weighted(bent, np.ones(N), np.zeros(N), np.zeros(N))
    found = values(weighted, score, score)
    assert 1 - found["cosine"] == pytest.approx(0.5e-10, rel=1e-5)
    assert found["added_variance"] == pytest.approx(1e-10, rel=1e-5)


def test_weights_of_tokens_count_by_token() -> None:
    draw = np.random.default_rng(0)
    tokens = [draw.uniform(0.5, 2, n) for n in (3, 9, 1)]
    every = np.concatenate(tokens)
    sums = np.array([[len(w), (w - 1).sum(), ((w - 1) ** 2).sum()] for w in tokens]).T
    score = draw.normal(size=(3, K))
    found = values(Weighted(score, *sums), score, score)
    assert found["ess_weights"] == pytest.approx(every.sum() ** 2 / (len(every) * (every**2).sum()), rel=1e-12)


@pytest.mark.parametrize(("vectors", "why"), [(0.0, "every weighted gradient is 0"), (np.inf, "overflows float64")])
def test_what_has_no_direction_says_why(vectors: float, why: str) -> None:
    _, score, reference = drawn(0)
    corrected = Weighted(np.full((N, K), vectors), np.ones(N), np.zeros(N), np.zeros(N))
    found = gradient_metrics(corrected, score, reference, np.arange(N))
    assert all(value.value is None and why in value.why for value in vars(found).values())


def test_draws_are_of_the_batch_as_it_is() -> None:
    corrected, score, reference = drawn(0)
    signs = np.random.default_rng(0).integers(0, 2, (30, N)) * 2.0 - 1
    cosine, norm = sign_draws(corrected.vectors, reference, signs)
    for r in (0, 29):
        g = sum(a * v for a, v in zip(signs[r], corrected.vectors, strict=True))
        h = sum(a * v for a, v in zip(signs[r], reference, strict=True))
        assert norm[r] == pytest.approx(np.linalg.norm(g) / np.linalg.norm(h))
        assert cosine[r] == pytest.approx(g @ h / (np.linalg.norm(g) * np.linalg.norm(h)))
    same, one = sign_draws(score, score, signs)
    np.testing.assert_allclose(same, 1)
    np.testing.assert_allclose(one, 1)


def test_random_walk_is_the_formula_and_the_gaussian_ess_of_independent_tokens() -> None:
    draw = np.random.default_rng(0)
    n, length, sigma = 4000, 20, 0.1
    d = draw.normal(0, sigma, (n, length))
    pair = PairArrays(
        rollout_logprob=np.zeros(d.size),
        trainer_logprob=d.ravel(),
        sequence=np.repeat(np.arange(n), length),
        position=np.tile(np.arange(length), n),
        prompt=np.arange(n),
    )
    found = random_walk_ess(pair, {"own": length, "far": 10.0 * length}, replicates=50)
    assert found["own"].value == pytest.approx(np.exp(-(d**2).mean() * length), rel=1e-9)
    assert found["far"].value == pytest.approx(np.exp(-(d**2).mean() * 10 * length), rel=1e-9)
    assert found["own"].value == pytest.approx(np.exp(-d.sum(axis=1).var(ddof=1)), abs=0.01)
    nothing = PairArrays(np.empty(0), np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64))
    assert random_walk_ess(nothing, {"own": 1}) == {"own": MetricValue(None, why="no usable tokens")}
