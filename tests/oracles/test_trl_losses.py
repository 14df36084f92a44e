"""Our losses against those of TRL's GRPO trainer, and their gradients, for the same log-probs.

The trainer has a toy model, of which only the log-probs of a forward pass are replaced: its own methods weight the
tokens of a batch, and then compute the loss.

Shape legend: `B` sequences, `T` response tokens, padded.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mismatch_probe.rl.algorithms import Algorithm, algorithms
from mismatch_probe.rl.algorithms.published import cispo, clip, plain, sequence_clip
from mismatch_probe.rl.losses import Scale, policy_loss
from tests.oracles.batches import Batch, load, make_batch

pytestmark = pytest.mark.slow

BUDGET = 50
AGGREGATIONS = {"sequence-mean": "grpo", "budget": "dr_grpo"}
# TRL's names of the corrections. Without bounds it can mask, but not truncate.
CORRECTIONS = {
    "token-tis": "token_truncate",
    "seq-is": "sequence_mask",
    "seq-tis": "sequence_truncate",
    "seq-mis": "sequence_mask",
    "token-mis": "token_mask",
}
ALGORITHMS = algorithms()
WITH_RATIO = sorted(name for name, spec in ALGORITHMS.items() if spec.surrogate is not plain)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    load("trl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load("tests.oracles.trl_oracle").make_trainer(tmp_path_factory.mktemp("trl"))


def make_inputs(seed: int) -> tuple[Batch, Tensor, Tensor]:
    """μ and π′ of a batch, as wide as its longest response, which is what TRL pads to; `[B, T]` π; `[B]` advantages."""
    batch = make_batch(seed, 0.5)
    longest = int(batch.mask.sum(axis=1).max())
    batch = Batch(batch.rollout[:, :longest], batch.trainer[:, :longest], batch.mask[:, :longest])
    draw = np.random.default_rng(seed + 100)
    current = batch.trainer + draw.normal(0.0, 0.3, batch.mask.shape)
    return batch, torch.from_numpy(current), torch.from_numpy(draw.normal(0.0, 1.0, len(current)))


def configure(trainer: Any, spec: Algorithm) -> None:
    correction = spec.correction
    trainer.use_vllm = correction is not None
    trainer.vllm_importance_sampling_correction = trainer.use_vllm
    trainer.vllm_importance_sampling_mode = CORRECTIONS[correction.name] if correction else "token_mask"
    trainer.vllm_importance_sampling_clip_max = correction.high if correction and correction.high < math.inf else None
    trainer.vllm_importance_sampling_clip_min = (correction and correction.low) or None
    trainer.importance_sampling_level = "sequence" if spec.surrogate is sequence_clip else "token"
    trainer.loss_type = "cispo" if spec.surrogate is cispo else AGGREGATIONS[spec.aggregation]
    # TRL bounds CISPO's ratio by the number itself, not by 1 plus it.
    trainer.epsilon_low = spec.clip_low
    trainer.epsilon_high = 1 + spec.clip_high if spec.surrogate is cispo else spec.clip_high
    trainer.max_completion_length = BUDGET
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1


def by_trl(trainer: Any, spec: Algorithm, batch: Batch, current: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """Loss, and its gradient `[B, T]`."""
    configure(trainer, spec)
    trainer.rollout, trainer.trainer, trainer.mask = batch.rollout, batch.trainer, batch.mask
    leaf = current.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        inputs = trainer._generate_and_score_completions([{"prompt": "word"}] * len(batch.mask))
        # Without vLLM's log-probs TRL has no reason to recompute π′.
        inputs["old_per_token_logps"] = torch.from_numpy(batch.trainer)
        inputs["advantages"] = advantages
        forward = (leaf, torch.zeros_like(leaf), None)
        patch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: forward)
        trainer.model.train()
        loss = trainer._compute_loss(SimpleNamespace(), inputs)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def ours(
    spec: Algorithm, batch: Batch, current: Tensor, advantages: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    leaf, mask = current.clone().requires_grad_(), torch.from_numpy(batch.mask)
    old, rollout = torch.from_numpy(batch.trainer), torch.from_numpy(batch.rollout)
    scale = Scale(len(mask), int(mask.sum()), BUDGET)
    loss, metrics = policy_loss(spec, leaf, old, rollout, advantages, mask, scale)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient, metrics


@pytest.mark.parametrize("name", WITH_RATIO)
def test_same_loss_and_gradient(trainer: Any, name: str) -> None:
    spec, inputs = ALGORITHMS[name], make_inputs(1)
    loss, gradient = by_trl(trainer, spec, *inputs)
    found, found_gradient, _ = ours(spec, *inputs)
    torch.testing.assert_close(found, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["grpo", "dr-grpo-seq-mis"])
def test_same_share_of_clipped_tokens(trainer: Any, name: str) -> None:
    spec, inputs = ALGORITHMS[name], make_inputs(1)
    trainer._metrics["train"].clear()
    by_trl(trainer, spec, *inputs)
    metrics = ours(spec, *inputs)[2]
    [share] = trainer._metrics["train"]["clip_ratio/region_mean"]
    assert float(metrics["n_clipped"] / metrics["n_tokens"]) == pytest.approx(share)  # TRL counts in float32


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - set(WITH_RATIO)))
def test_policy_gradient_is_grpo_before_the_first_update(trainer: Any, name: str) -> None:
    """TRL has no loss without a ratio; where π is π′, the gradient of its ratio is that of log π."""
    spec = ALGORITHMS[name]
    batch, _, advantages = make_inputs(2)
    current = torch.from_numpy(batch.trainer)
    _, gradient = by_trl(trainer, replace(spec, surrogate=clip, weights_of="old"), batch, current, advantages)
    torch.testing.assert_close(ours(spec, batch, current, advantages)[1], gradient, rtol=1e-12, atol=1e-15)


def test_comparison_is_not_vacuous() -> None:
    """Clips, caps and masks all hold something, and not everything."""
    inputs = make_inputs(1)
    for name in WITH_RATIO:
        spec = ALGORITHMS[name]
        _, _, metrics = ours(spec, *inputs)
        bounded = spec.correction is not None and spec.correction.bounded
        masks = spec.correction is not None and spec.correction.masks
        limits = [key for key in ("n_clipped", "n_masked", "n_truncated") if metrics[key] > 0]
        assert ("n_masked" in limits) == (bounded and masks), name
        assert ("n_truncated" in limits) == (bounded and not masks), name
        assert ("n_clipped" in limits) == (spec.surrogate is not cispo), name
        assert all(metrics[key] < metrics["n_tokens"] for key in limits)
