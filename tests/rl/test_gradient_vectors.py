"""Gradients of sequences against autograd, the loss code and enumeration, on a policy that is a table.

Shape legend: `V` tokens of the vocabulary, `Y` all responses, `T` their length, `K` components.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mismatch_probe.engines import gradient
from mismatch_probe.engines.gradient import (
    DIRECTIONS,
    WEIGHTED,
    SequenceTask,
    Sketch,
    WeightedGradients,
    sequence_vectors,
)
from mismatch_probe.rl.algorithms import algorithms
from mismatch_probe.rl.losses import Scale, policy_loss

V, T = 4, 3
PROMPT = [1, 2]
RESPONSES = [list(y) for y in itertools.product(range(V), repeat=T)]


@dataclass
class Output:
    logits: Tensor


class Bigram(nn.Module):
    """Logits of the next token by the last one; called as a model of transformers."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table.clone())
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, ids: Tensor, logits_to_keep: int, **_: Any) -> Output:
        return Output(self.table[ids][:, -logits_to_keep:])

    def logprobs(self, temperature: float = 1.0) -> Tensor:
        """`[Y, T]`"""
        law = (self.table.double() / temperature).log_softmax(-1)
        last = torch.tensor([[PROMPT[-1], *y[:-1]] for y in RESPONSES])
        return law[last, torch.tensor(RESPONSES)]


def tables(gap: float) -> tuple[Tensor, Tensor]:
    """`[V, V]` logits of π and of μ."""
    draw = np.random.default_rng(0)
    trained = draw.normal(0, 0.7, (V, V))
    return torch.from_numpy(trained), torch.from_numpy(trained + draw.normal(0, gap, (V, V)))


def tasks(model: Bigram, sampling: Bigram, temperature: float = 1.0) -> list[SequenceTask]:
    b, a = (policy.logprobs(temperature).detach().numpy() for policy in (sampling, model))
    return [SequenceTask(PROMPT, y, np.arange(T), b[i], {"fp32": a[i]}) for i, y in enumerate(RESPONSES)]


def project(model: Bigram, full: Tensor) -> np.ndarray:
    """`[K]` of a gradient in the table."""
    return Sketch(model.parameters()).project([full, None])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_consistent_weights_are_unbiased_and_none_are_not(temperature: float) -> None:
    table, other = tables(0.6)
    model, sampling = Bigram(table), Bigram(other)
    rewards = torch.from_numpy(np.random.default_rng(1).normal(size=len(RESPONSES)))
    objective = (model.logprobs(temperature).sum(1).exp() * rewards).sum()
    (full,) = torch.autograd.grad(objective, model.table)
    target = project(model, full)
    chance = sampling.logprobs(temperature).sum(1).exp().detach().numpy() * rewards.numpy()
    gradients = WeightedGradients(model, temperature)
    rows = [sequence_vectors(gradients, task) for task in tasks(model, sampling, temperature)]
    consistent = sum(p * row.weights["seq-is", "fp32"] * row.score for p, row in zip(chance, rows, strict=True))
    np.testing.assert_allclose(consistent, target, atol=2e-6)
    plain = sum(p * row.score for p, row in zip(chance, rows, strict=True))
    of_tokens = sum(p * row.of_tokens["token-tis", "fp32"] for p, row in zip(chance, rows, strict=True))
    for biased in (plain, of_tokens):
        assert np.linalg.norm(biased - target) > 0.05 * np.linalg.norm(target)


@pytest.mark.parametrize("correction", [found.name for found in WEIGHTED])
def test_vectors_are_the_losses_own_gradients(correction: str) -> None:
    # A gap so wide that every cap and mask holds something.
    table, other = tables(1.5)
    model, sampling = Bigram(table), Bigram(other)
    spec = algorithms()[f"pg-{correction}"]
    advantages = torch.from_numpy(np.random.default_rng(2).choice([-1.0, 1.0], len(RESPONSES)))
    mask = torch.ones(len(RESPONSES), T, dtype=torch.bool)
    logprobs, scale = model.logprobs(), Scale(len(RESPONSES), T * len(RESPONSES), T)
    loss, facts = policy_loss(spec, logprobs, logprobs, sampling.logprobs(), advantages, mask, scale)
    (full,) = torch.autograd.grad(-loss * len(RESPONSES) * T, model.table)
    gradients = WeightedGradients(model, 1.0)
    rows = [sequence_vectors(gradients, task) for task in tasks(model, sampling)]
    key = (correction, "fp32")
    vectors = [row.of_tokens.get(key, row.weights[key][0] * row.score) for row in rows]
    found = sum(float(a) * v for a, v in zip(advantages, vectors, strict=True))
    np.testing.assert_allclose(found, project(model, full), atol=2e-5)
    if correction != "seq-is":
        assert float(facts["n_masked"] + facts["n_truncated"]) > 0
    total = sum(float(row.weights[key].sum()) for row in rows)
    assert total == pytest.approx(float(facts["sum_weight"]), rel=1e-6)


def test_equal_policies_have_weights_of_one() -> None:
    table, _ = tables(0.0)
    model = Bigram(table)
    row = sequence_vectors(WeightedGradients(model, 1.0), tasks(model, model)[5])
    assert all((weights == 1).all() for weights in row.weights.values())
    assert all((vector == row.score).all() for vector in row.of_tokens.values())


def test_log_probs_come_back_for_comparison() -> None:
    table, other = tables(0.3)
    model = Bigram(table)
    task = tasks(model, Bigram(other))[7]
    row = sequence_vectors(WeightedGradients(model, 1.0), task)
    np.testing.assert_allclose(row.logprobs, task.trainers["fp32"], atol=1e-6)


def test_only_counted_tokens_enter() -> None:
    table, other = tables(0.3)
    model = Bigram(table)
    whole = tasks(model, Bigram(other))[27]
    part = SequenceTask(
        whole.prompt, whole.response, np.array([0, 2]), whole.rollout[[0, 2]], {"fp32": whole.trainers["fp32"][[0, 2]]}
    )
    (full,) = torch.autograd.grad(model.logprobs()[27, [0, 2]].sum(), model.table)
    row = sequence_vectors(WeightedGradients(model, 1.0), part)
    np.testing.assert_allclose(row.score, project(model, full), atol=1e-6)
    d = (part.trainers["fp32"] - part.rollout).sum()
    assert row.weights["seq-is", "fp32"][0] == pytest.approx(np.exp(d))


def test_equal_weightings_share_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    table, other = tables(0.05)  # no cap holds anything, so both corrections of tokens are the plain ratio
    model, calls = Bigram(table), []
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or real(*a, **k))
    row = sequence_vectors(WeightedGradients(model, 1.0), tasks(model, Bigram(other))[3])
    assert len(calls) == 2
    assert (row.of_tokens["token-tis", "fp32"] == row.of_tokens["token-mis", "fp32"]).all()


class TestSketch:
    def test_products_are_kept_within_the_error_that_is_stated(self) -> None:
        draw = torch.Generator().manual_seed(1)
        shapes = [(300, 500), (7,), (40_000,)]
        x, e = ([torch.randn(shape, generator=draw) for shape in shapes] for _ in range(2))
        y = [a + 0.5 * b for a, b in zip(x, e, strict=True)]
        full_x, full_y = (torch.cat([part.flatten() for part in v]).double().numpy() for v in (x, y))
        sketch = Sketch(x)
        a, b = sketch.project(x), sketch.project(y)
        norms = np.linalg.norm(full_x) * np.linalg.norm(full_y)
        for found, exact in ((a @ b, full_x @ full_y), (a @ a, full_x @ full_x)):
            assert abs(found - exact) < 4 * np.sqrt(2 / DIRECTIONS) * norms
        cosine = full_x @ full_y / norms
        error = a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) - cosine
        assert abs(error) < 4 * (1 - cosine**2) / np.sqrt(DIRECTIONS)

    def test_it_is_unbiased_and_as_precise_as_it_says(self, monkeypatch: pytest.MonkeyPatch) -> None:
        draw = torch.Generator().manual_seed(2)
        # Of one sign, so that components would add up without signs of their own; more than K, so that they meet.
        x, y = torch.randn(2, 3 * DIRECTIONS, generator=draw).abs()
        y = x + y
        errors = []
        for seed in range(60):
            monkeypatch.setattr(gradient, "_SEED", seed)
            sketch = Sketch([x])
            errors.append(sketch.project([x]) @ sketch.project([y]) - float(x.double() @ y.double()))
        exact, squares = float(x.double() @ y.double()), float((x @ x) * (y @ y))
        standard_error = np.sqrt((squares + exact**2) / DIRECTIONS)
        assert abs(np.mean(errors)) < 4 * standard_error / np.sqrt(len(errors))
        assert 0.6 * standard_error < np.std(errors) < 1.2 * standard_error

    def test_it_is_linear_and_always_the_same(self) -> None:
        x, y = torch.randn(2, 1000, generator=torch.Generator().manual_seed(3)).double()
        sketch, again = Sketch([x]), Sketch([x])
        combined = 2 * sketch.project([x]) - sketch.project([y])
        np.testing.assert_allclose(again.project([2 * x - y]), combined, atol=1e-12)

    def test_a_large_tensor_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x = torch.randn(1000, generator=torch.Generator().manual_seed(4))
        whole = Sketch([x]).project([x])
        monkeypatch.setattr(gradient, "_CHUNK", 64)
        np.testing.assert_allclose(Sketch([x]).project([x]), whole, atol=1e-12)
