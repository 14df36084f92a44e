"""The weights of a correction, as tensors. Shape legend: `B` sequences, `T` response tokens, padded."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mismatch_probe.metrics.corrections import Correction


@torch.no_grad()
def correction_weights(
    correction: Correction | None, trainer: Tensor, rollout: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """What the loss of a token is multiplied by because the rollout engine sampled it, and which weights were bounded.

    Args:
        correction: None for weights of 1.
        trainer: `[B, T]` log-probs of the tokens by the trainer, nats.
        rollout: `[B, T]` the same by the rollout engine.
        mask: `[B, T]` bool, which are response tokens.

    Returns:
        Two `[B, T]`, or `[B, 1]` where the correction has one weight a sequence; the first float64, the second bool.
        Meaningless in the padding.
    """
    log_weights = filled(mask, trainer) - filled(mask, rollout)
    if correction is None:
        return torch.ones_like(log_weights), torch.zeros_like(mask)
    if correction.level != "token":
        log_weights = log_weights.sum(dim=1, keepdim=True)
    if correction.level == "geometric":
        log_weights = log_weights / mask.sum(dim=1, keepdim=True).clamp(min=1)
    outside = correction.outside(log_weights)
    if correction.level == "geometric":
        return (~outside).double(), outside
    bound = -math.inf if correction.masks else math.log(correction.high)
    return log_weights.masked_fill(outside, bound).exp(), outside


def filled(mask: Tensor, values: Tensor) -> Tensor:
    """`[B, T]` float64, 0 in the padding: by selection, as a product would carry NaN and its gradient over."""
    return torch.where(mask, values.double(), 0.0)
