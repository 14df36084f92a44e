"""The simulated motion of weights against torch's Adam, and against what noise gives in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mismatch_probe.metrics.floats import FORMATS
from mismatch_probe.metrics.ranges import simulate_adam

BF16, FP16 = FORMATS["bfloat16"], FORMATS["float16"]


def test_steps_are_those_of_torchs_adam() -> None:
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(0)
    weights = draw.normal(0, 0.1, 40)
    gradients = draw.normal(0, 1e-3, (3, 40)) * np.exp(draw.normal(0, 2, 40))
    steps, batch, rate = 300, 2, 1e-4
    found = simulate_adam(weights, gradients, (rate,), (BF16, FP16), steps=steps, batch=batch, seed=5)

    parameter = torch.tensor(np.zeros(40), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([parameter], lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    replay, moved = np.random.default_rng(5), [np.zeros(40)]
    offsets = {form.name: replay.uniform(-1, 1, 40) for form in (BF16, FP16)}
    for _ in range(steps):
        chosen = replay.integers(3, size=batch)
        signs = replay.choice((-1.0, 1.0), size=batch)
        parameter.grad = torch.tensor((signs[:, None] * gradients[chosen]).sum(0) / batch)
        adam.step()
        moved.append(parameter.detach().numpy().copy())
    path = np.stack(moved)
    sizes = np.abs(np.diff(path, axis=0))
    np.testing.assert_allclose(found.first, sizes[0], rtol=1e-6)
    np.testing.assert_allclose(found.steady, sizes[100:].mean(0), rtol=1e-6)
    for form in (BF16, FP16):
        start = form.rounded(weights)
        changed = form.rounded(start + rate * path) != start
        first = np.where(changed.any(0), changed.argmax(0), 0)
        # A change of exactly half a unit may round either way.
        assert (found.passed[form.name, rate] == first).mean() > 0.9
        away = start + offsets[form.name] * form.ulp(start) / 2
        changed = form.rounded(away + rate * path) != form.rounded(away)
        first = np.where(changed.any(0), changed.argmax(0), 0)
        assert (found.passed_generic[form.name, rate] == first).mean() > 0.9


def test_pure_noise_moves_a_weight_as_the_closed_form_says() -> None:
    draw = np.random.default_rng(1)
    gradients = draw.normal(0, 1, (400, 600))
    motion = simulate_adam(np.full(600, 0.1), gradients, (1e-6,), (BF16,), steps=600, batch=1, betas=(0.9, 0.999))
    # m̂ of unit noise has the variance (1 − β1)/(1 + β1), and v̂ is nearly 1.
    expected = math.sqrt((1 - 0.9) / (1 + 0.9)) * math.sqrt(2 / math.pi)
    assert motion.steady.mean() == pytest.approx(expected, rel=0.03)
    np.testing.assert_allclose(motion.first, 1.0, rtol=1e-5)


def test_the_scale_of_gradients_does_not_matter_above_epsilon() -> None:
    draw = np.random.default_rng(2)
    gradients = draw.normal(0, 1, (5, 30))
    one, other = (simulate_adam(np.ones(30), gradients * scale, (1e-5,), (BF16,), steps=120) for scale in (1, 1e-4))
    np.testing.assert_allclose(one.steady, other.steady, rtol=1e-3)
    tiny = simulate_adam(np.ones(30), gradients * 1e-12, (1e-5,), (BF16,), steps=120)
    assert tiny.steady.max() < 1e-3


def test_a_weight_without_a_gradient_never_moves_and_says_so() -> None:
    gradients = np.array([[0.0, 1.0], [0.0, -1.0]])
    motion = simulate_adam(np.ones(2), gradients, (1.0,), (BF16,), steps=20)
    assert motion.alive.tolist() == [False, True]
    assert motion.first[0] == motion.steady[0] == motion.passed["bfloat16", 1.0][0] == 0
    assert motion.passed["bfloat16", 1.0][1] == 1


def test_a_finer_format_and_a_larger_rate_reach_the_engine_sooner() -> None:
    draw = np.random.default_rng(3)
    weights, gradients = draw.normal(0, 0.02, 200), draw.normal(0, 1, (8, 200))
    motion = simulate_adam(weights, gradients, (1e-6, 1e-5), (BF16, FP16), steps=200)
    shares = {key: (reached > 0).mean() for key, reached in motion.passed.items()}
    assert shares["float16", 1e-6] > shares["bfloat16", 1e-6]
    assert shares["bfloat16", 1e-5] > shares["bfloat16", 1e-6]


def test_a_weight_that_is_pushed_one_way_moves_by_the_learning_rate() -> None:
    torch = pytest.importorskip("torch")
    parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([parameter], lr=1e-3, betas=(0.9, 0.95))
    for _ in range(50):
        parameter.grad = torch.full((1,), 0.3, dtype=torch.float64)
        adam.step()
    assert float(parameter.detach()) == pytest.approx(-50e-3, rel=1e-5)


def test_what_is_not_finite_counts_as_without_a_gradient() -> None:
    gradients = np.array([[np.nan, 1.0, 1.0], [1.0, 1.0, np.inf]])
    motion = simulate_adam(np.array([1.0, np.inf, 1.0]), gradients, (1e-3,), (BF16,), steps=3)
    assert motion.alive.tolist() == [False, False, False]
    assert motion.first.tolist() == [0.0, 0.0, 0.0]
