"""The loss of a micro-batch: surrogate, correction for sampling from another policy, and what sums are divided by.

Shape legend: `B` sequences, `T` response tokens, padded. π is the policy being trained, π′ the same recomputed by the
trainer before the updates, μ the rollout engine's. Weights and ratios carry no gradient unless a name says otherwise.
All arithmetic is float64, and bounds are compared as logarithms, so that nothing overflows before it is capped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mismatch_probe.engines.corrections import correction_weights, filled
from mismatch_probe.rl.algorithms import Algorithm


@dataclass(frozen=True)
class Scale:
    """What sums are divided by: of the whole minibatch, so that the losses of its micro-batches add up.

    Attributes:
        sequences: Sequences of the minibatch.
        tokens: Its response tokens.
        budget: Largest number of tokens that a response may have.
    """

    sequences: int
    tokens: int
    budget: int


def policy_loss(
    spec: Algorithm,
    logprobs: Tensor,
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    scale: Scale,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the minibatch's loss.

    Whatever lies in the padding, NaN and −inf included, changes nothing. A token of the response that is not finite
    is left to make the loss so. `seq-is`, which has no cap, overflows where D exceeds 709 nats.

    Args:
        spec: The algorithm.
        logprobs: `[B, T]` log π of the tokens, nats, with gradient.
        old_logprobs: `[B, T]` log π′.
        rollout_logprobs: `[B, T]` log μ.
        advantages: `[B]` or `[B, T]`.
        mask: `[B, T]` bool, which are response tokens.
        scale: Of the minibatch.

    Returns:
        The loss, a float64 scalar, and sums and counts over the response tokens, float64 scalars without gradient:
        `n_tokens`; `n_sequences` that have any; `n_clipped` tokens whose ratio the clip holds (then without gradient;
        under CISPO those whose weight it bounds); `n_masked` tokens whose weight is masked; `n_truncated` tokens
        whose weight TIS has capped; `sum_weight` and `sum_squared_weight` of the correction's weights as applied, over
        sequences if `spec.per_sequence`, else over tokens.
    """
    current = filled(mask, logprobs)
    old = filled(mask, old_logprobs.detach())
    advantage = filled(mask, advantages if advantages.dim() == 2 else advantages.unsqueeze(1))
    sampled = current.detach() if spec.weights_of == "current" else old
    weights, outside = correction_weights(spec.correction, sampled, rollout_logprobs, mask)
    surrogate, clipped = spec.surrogate(spec, current, old, advantage, mask)
    # Again, because a ratio or weight of a whole sequence reaches its padding, and 0 × inf is not 0.
    loss = _aggregate(spec, torch.where(mask, weights * surrogate, 0.0), mask, scale)
    with torch.no_grad():
        counted = mask.any(dim=1, keepdim=True) if spec.per_sequence else mask
        applied = torch.where(counted, weights, 0.0)
        bounded, none = outside & mask, torch.zeros_like(mask)
        masks = spec.correction is not None and spec.correction.masks
        metrics = {
            "n_tokens": mask,
            "n_sequences": mask.any(dim=1),
            "n_clipped": clipped & mask,
            "n_masked": bounded if masks else none,
            "n_truncated": none if masks else bounded,
            "sum_weight": applied,
            "sum_squared_weight": applied.square(),
        }
        return loss, {name: value.sum(dtype=torch.float64) for name, value in metrics.items()}


def _aggregate(spec: Algorithm, losses: Tensor, mask: Tensor, scale: Scale) -> Tensor:
    if spec.aggregation == "sequence-mean":
        return (losses.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum() / scale.sequences
    if spec.aggregation == "token-mean":
        return losses.sum() / scale.tokens
    return losses.sum() / (scale.sequences * scale.budget)
