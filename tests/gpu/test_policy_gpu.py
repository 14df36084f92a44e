"""Losses, policy and injected stress on a CUDA device, against float64 on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mismatch_probe.engines.logprobs import Batch, token_logprobs
from mismatch_probe.rl.algorithms import algorithms
from mismatch_probe.rl.config import RlConfig
from mismatch_probe.rl.losses import Scale, policy_loss
from mismatch_probe.rl.policy import Policy
from mismatch_probe.rl.stress import round_mantissa, stressed

pytestmark = [pytest.mark.gpu, pytest.mark.engine]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
PRECISIONS = [
    ("float32", "cast"),
    ("bfloat16", "cast"),
    ("bfloat16", "autocast"),
    ("float16", "cast"),
    ("float16", "autocast"),
]
# Of the whole gradient, relative to its norm; 2⁻⁸ and 2⁻¹¹ are half a unit in the last place of the two types.
GRADIENT_ERROR = {"float32": 1e-4, "float16": 0.03, "bfloat16": 0.2}


def policy(path: Path, dtype: str, mode: str, **options: Any) -> Policy:
    config = RlConfig.of({"trainer_dtype": dtype, "trainer_mode": mode, "max_grad_norm": 0.0, **options})
    return Policy(str(path), config, CUDA)


def batch(device: torch.device, count: int = 6) -> Batch:
    draw = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 30, (count, 2), generator=draw).tolist()
    rows = [torch.randint(3, 20, (a + b,), generator=draw).tolist() for a, b in lengths]
    return Batch.of(
        [row[:a] for row, (a, _) in zip(rows, lengths, strict=True)],
        [row[a:] for row, (a, _) in zip(rows, lengths, strict=True)],
        device,
    )


def loss_of(logprobs: torch.Tensor, given: Batch) -> torch.Tensor:
    advantages = torch.linspace(-1, 1, len(given.ids), device=logprobs.device)
    old = logprobs.detach()
    scale = Scale(len(given.ids), int(given.mask.sum()), given.mask.shape[1])
    return policy_loss(algorithms()["dr-grpo"], logprobs, old, old, advantages, given.mask, scale)[0]


def float64_gradient(path: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    loss_of(token_logprobs(model, batch(CPU), 1.0)[0], batch(CPU)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("dtype", "mode"), PRECISIONS)
def test_a_steps_gradient_is_float64s_up_to_rounding(chain: Path, dtype: str, mode: str) -> None:
    expected = float64_gradient(chain)
    ours = policy(chain, dtype, mode)
    given = batch(CUDA)
    ours.backward(loss_of(ours.logprobs(given)[0], given))
    facts = ours.step()
    assert not facts.skipped
    # The first moment after a first step is the gradient, as AdamW saw it, times 1 − β₁.
    moments = ours.state()[0]
    seen = {name: moments[f"{name}.exp_avg"].double().cpu() / 0.1 for name in expected}
    size = torch.sqrt(sum(value.square().sum() for value in expected.values()))
    off = torch.sqrt(sum((seen[name] - expected[name]).square().sum() for name in expected)) / size
    assert off < GRADIENT_ERROR[dtype]
    assert facts.grad_norm == pytest.approx(float(size), rel=GRADIENT_ERROR[dtype])


@pytest.mark.parametrize("mode", ["cast", "autocast"])
def test_a_gradient_that_overflows_fp16_is_skipped_and_lowers_the_scale(chain: Path, mode: str) -> None:
    ours = policy(chain, "float16", mode, initial_loss_scale=2.0**40)
    before = {name: tensor.clone() for name, tensor in ours.weights().items()}
    given = batch(CUDA)
    ours.backward(loss_of(ours.logprobs(given)[0], given))
    facts = ours.step()
    assert facts.skipped
    assert facts.loss_scale == 2.0**39
    assert all(torch.equal(before[name], tensor) for name, tensor in ours.weights().items())


@pytest.mark.parametrize(("dtype", "mode"), PRECISIONS)
def test_scoring_and_update_see_the_same_bits(chain: Path, dtype: str, mode: str) -> None:
    ours, given = policy(chain, dtype, mode), batch(CUDA)
    with torch.no_grad():
        scored = ours.logprobs(given)[0]
    assert torch.equal(scored[given.mask], ours.logprobs(given)[0].detach()[given.mask])


@pytest.mark.parametrize(("dtype", "mode"), [("float32", "cast"), ("float16", "autocast"), ("bfloat16", "cast")])
def test_a_restored_policy_goes_on_as_the_one_that_was_kept(chain: Path, dtype: str, mode: str) -> None:
    given = batch(CUDA)

    def step(ours: Policy) -> None:
        ours.backward(loss_of(ours.logprobs(given)[0], given))
        ours.step()

    kept = policy(chain, dtype, mode)
    step(kept)
    # As a checkpoint keeps them.
    weights, (moments, numbers) = {k: v.cpu().clone() for k, v in kept.weights().items()}, kept.state()
    moments = {k: v.cpu().clone() for k, v in moments.items()}
    other = policy(chain, dtype, mode)
    other.restore(weights, moments, numbers)
    step(kept)
    step(other)
    for name, tensor in kept.weights().items():
        torch.testing.assert_close(other.weights()[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("algorithm", algorithms())
def test_losses_and_their_gradients_are_the_cpus(algorithm: str) -> None:
    draw = torch.Generator().manual_seed(1)
    current, old, rollout = (-3 * torch.rand(5, 40, generator=draw, dtype=torch.float64) for _ in range(3))
    old, rollout = current + 0.1 * old, current + 0.1 * rollout
    advantages = torch.randn(5, generator=draw, dtype=torch.float64)
    mask = torch.arange(40) < torch.tensor([40, 3, 0, 17, 25])[:, None]
    found = []
    for device in (CPU, CUDA):
        leaf = current.detach().to(device).clone().requires_grad_()
        loss, sums = policy_loss(
            algorithms()[algorithm],
            leaf,
            *(side.to(device) for side in (old, rollout, advantages, mask)),
            Scale(5, 85, 40),
        )
        loss.backward()
        found.append((loss.detach().cpu(), leaf.grad.cpu(), {k: float(v) for k, v in sums.items()}))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-12, atol=1e-15)
    assert found[1][2] == pytest.approx(found[0][2], rel=1e-12)


@pytest.mark.parametrize("bits", [1, 7, 10, 22])
def test_rounding_of_the_mantissa_is_the_cpus(bits: int) -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-50, 50).repeat(100)
    assert torch.equal(round_mantissa(values.to(CUDA), bits).cpu(), round_mantissa(values, bits))


@pytest.mark.parametrize(("structure", "dose"), [("weight-noise", 1e-3), ("mantissa", 7)])
def test_stress_is_the_cpus_and_keeps_tied_weights_tied(structure: Any, dose: float) -> None:
    weights = {"a": torch.randn(50, 30, generator=torch.Generator().manual_seed(0))}
    on_device = {"a": weights["a"].to(CUDA)}
    on_device["tied"] = on_device["a"]
    found = stressed(on_device, structure, dose, seed=1, step=2)
    assert torch.equal(found["a"].cpu(), stressed(weights, structure, dose, seed=1, step=2)["a"])
    assert found["tied"] is found["a"]
