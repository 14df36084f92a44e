"""Policy-gradient losses, and the weights that correct for sampling from another policy than the one that is trained.

Shape legend: `B` sequences, `T` response tokens, padded. π is the policy being trained, π′ the same recomputed by the
trainer before the updates, μ the rollout engine's. Weights and ratios carry no gradient unless a name says otherwise.
All arithmetic is float64, and bounds are compared as logarithms, so that nothing overflows before it is capped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from mismatch_probe.errors import UsageError
from mismatch_probe.rl.advantages import AdvantageKind

Ratio = Literal["none", "clip", "sequence-clip", "cispo"]
Correction = Literal["none", "token-tis", "seq-is", "seq-tis", "seq-mis", "icepop"]
Aggregation = Literal["budget", "sequence-mean", "token-mean"]
_CAPPED = ("token-tis", "seq-tis")
_MASKING = ("seq-mis", "icepop")


@dataclass(frozen=True)
class LossSpec:
    """A policy-gradient algorithm.

    Attributes:
        advantage: What `group_advantages` makes of the rewards; the loss itself takes advantages as they come.
        ratio: What limits an update away from π′: nothing (−A log π); PPO's clip of r = π/π′ per token; GSPO's clip of
            the geometric mean of r over the sequence; CISPO's cap of r as a weight, through which no gradient goes.
        correction: Weight for μ: w = π/μ where `ratio` is `none`, else π′/μ. `token-*` and `icepop` take it per
            token, `seq-*` as the product over the sequence. IS leaves w as it is, TIS takes min(w, cap), MIS
            drops w > cap, IcePop drops w outside [floor, cap].
        cap: C of the correction.
        clip_low: The ratio's lower bound is 1 − clip_low; 1 is no bound.
        clip_high: Its upper bound is 1 + clip_high.
        floor: Lower bound of IcePop.
        aggregation: `budget`: sum over tokens / (sequences × budget); `sequence-mean`: mean over sequences of the mean
            over their tokens; `token-mean`: sum over tokens / tokens.

    Raises:
        UsageError: A bound cannot be.
    """

    advantage: AdvantageKind
    ratio: Ratio
    correction: Correction
    cap: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    floor: float = 0.0
    aggregation: Aggregation = "budget"

    def __post_init__(self) -> None:
        if self.correction in (*_CAPPED, *_MASKING) and not self.cap > self.floor >= 0:
            raise UsageError(
                f"The cap {self.cap:g} of the correction {self.correction} does not exceed its floor {self.floor:g}.",
                "Set a cap above the floor.",
            )
        if not (0 <= self.clip_low <= 1 and self.clip_high >= 0):
            raise UsageError(
                f"The clip range [1 − {self.clip_low:g}, 1 + {self.clip_high:g}] is not valid.",
                "Set clip_low between 0 and 1, and clip_high to 0 or more.",
            )

    @property
    def per_sequence(self) -> bool:
        """Whether the correction has one weight a sequence, not one a token."""
        return self.correction.startswith("seq-")


def _algorithms() -> dict[str, LossSpec]:
    pg = LossSpec("centred", "none", "none")
    grpo = LossSpec("standardised", "clip", "none", aggregation="sequence-mean")
    found = {
        "pg": pg,
        "pg-token-tis": replace(pg, correction="token-tis", cap=2.0),
        "pg-seq-is": replace(pg, correction="seq-is"),
        "pg-seq-tis": replace(pg, correction="seq-tis", cap=3.0),
        "pg-seq-mis": replace(pg, correction="seq-mis", cap=3.0),
        "grpo": grpo,
        "dr-grpo": replace(grpo, advantage="centred", aggregation="budget"),
    }
    for name in ("grpo", "dr-grpo"):
        found[f"{name}-token-tis"] = replace(found[name], correction="token-tis", cap=2.0)
        # The paper has no Seq-TIS here: with the cap of Seq-MIS the two differ in one thing only.
        found[f"{name}-seq-tis"] = replace(found[name], correction="seq-tis", cap=10.0)
        found[f"{name}-seq-mis"] = replace(found[name], correction="seq-mis", cap=10.0)
    found["gspo"] = replace(grpo, ratio="sequence-clip", clip_low=3e-4, clip_high=4e-4)
    found["icepop"] = replace(grpo, correction="icepop", floor=0.5, cap=5.0)
    # An upper bound of 5 and no lower one, as in ScaleRL and in TRL's documentation.
    found["cispo"] = replace(grpo, ratio="cispo", clip_low=1.0, clip_high=4.0, aggregation="token-mean")
    return found


# Constants: Qi et al., arXiv 2510.26788, and the scripts of its code; IcePop's and CISPO's from their authors.
ALGORITHMS: Mapping[str, LossSpec] = MappingProxyType(_algorithms())


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
    spec: LossSpec,
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
        under CISPO those whose weight it bounds); `n_masked` tokens dropped by MIS or IcePop; `n_truncated` tokens
        whose weight TIS has capped; `sum_weight` and `sum_squared_weight` of the correction's weights as applied, over
        sequences if `spec.per_sequence`, else over tokens.
    """
    current = _fill(mask, logprobs)
    old = _fill(mask, old_logprobs.detach())
    advantage = _fill(mask, advantages if advantages.dim() == 2 else advantages.unsqueeze(1))
    sampled = current.detach() if spec.ratio == "none" else old
    weights = correction_weights(spec, sampled, rollout_logprobs, mask)
    surrogate, clipped = _surrogate(spec, current, old, advantage, mask)
    # Again, because a ratio or weight of a whole sequence reaches its padding, and 0 × inf is not 0.
    loss = _aggregate(spec, torch.where(mask, weights * surrogate, 0.0), mask, scale)
    with torch.no_grad():
        outside = _outside(spec, _log_weights(spec, sampled, rollout_logprobs, mask)) & mask
        counted = mask.any(dim=1, keepdim=True) if spec.per_sequence else mask
        applied = torch.where(counted, weights, 0.0)
        none = torch.zeros_like(mask)
        metrics = {
            "n_tokens": mask,
            "n_sequences": mask.any(dim=1),
            "n_clipped": clipped & mask,
            "n_masked": outside if spec.correction in _MASKING else none,
            "n_truncated": outside if spec.correction in _CAPPED else none,
            "sum_weight": applied,
            "sum_squared_weight": applied.square(),
        }
        return loss, {name: value.sum(dtype=torch.float64) for name, value in metrics.items()}


@torch.no_grad()
def correction_weights(spec: LossSpec, current: Tensor, rollout: Tensor, mask: Tensor) -> Tensor:
    """What the loss of a token is multiplied by because μ sampled it.

    Args:
        spec: The algorithm.
        current: `[B, T]` log π where `spec.ratio` is `none`, else log π′.
        rollout: `[B, T]` log μ.
        mask: `[B, T]` bool, which are response tokens.

    Returns:
        `[B, T]`, or `[B, 1]` if `spec.per_sequence`; float64. Meaningless in the padding.
    """
    log_weights = _log_weights(spec, current, rollout, mask)
    if spec.correction == "none":
        return torch.ones_like(log_weights)
    outside = _outside(spec, log_weights)
    if spec.correction in _CAPPED:
        log_weights = log_weights.masked_fill(outside, math.log(spec.cap))
    elif spec.correction in _MASKING:
        log_weights = log_weights.masked_fill(outside, -math.inf)
    return log_weights.exp()


def _fill(mask: Tensor, values: Tensor) -> Tensor:
    """`[B, T]` float64, 0 in the padding: by selection, as a product would carry NaN and its gradient over."""
    return torch.where(mask, values.double(), 0.0)


def _log_weights(spec: LossSpec, current: Tensor, rollout: Tensor, mask: Tensor) -> Tensor:
    """Uncapped, `[B, T]` or `[B, 1]`."""
    log_ratio = _fill(mask, current) - _fill(mask, rollout)
    return log_ratio.sum(dim=1, keepdim=True) if spec.per_sequence else log_ratio


def _outside(spec: LossSpec, log_weights: Tensor) -> Tensor:
    """Which weights the correction caps or drops."""
    if spec.correction not in (*_CAPPED, *_MASKING):
        return torch.zeros_like(log_weights, dtype=torch.bool)
    above = log_weights > math.log(spec.cap)
    return above | (log_weights < _log(spec.floor)) if spec.correction == "icepop" else above


def _surrogate(spec: LossSpec, current: Tensor, old: Tensor, advantage: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, T]` losses of the tokens before correction, and which of them are clipped."""
    if spec.ratio == "none":
        return -advantage * current, torch.zeros_like(mask)
    low, high = _log(1 - spec.clip_low), math.log1p(spec.clip_high)
    log_ratio = current - old
    if spec.ratio == "cispo":
        fixed = log_ratio.detach()
        return -fixed.clamp(low, high).exp() * advantage * current, (fixed < low) | (fixed > high)
    if spec.ratio == "sequence-clip":
        # The value is the sequence's, the gradient the token's own: GSPO-token, the same as GSPO where the tokens of a
        # sequence share their advantage.
        lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
        log_ratio = current - current.detach() + log_ratio.detach().sum(dim=1, keepdim=True) / lengths
    clipped = ((advantage > 0) & (log_ratio > high)) | ((advantage < 0) & (log_ratio < low))
    bounded = torch.where(clipped, log_ratio.detach().clamp(low, high), log_ratio)
    return -advantage * bounded.exp(), clipped


def _aggregate(spec: LossSpec, losses: Tensor, mask: Tensor, scale: Scale) -> Tensor:
    if spec.aggregation == "sequence-mean":
        return (losses.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum() / scale.sequences
    if spec.aggregation == "token-mean":
        return losses.sum() / scale.tokens
    return losses.sum() / (scale.sequences * scale.budget)


def _log(bound: float) -> float:
    return math.log(bound) if bound > 0 else -math.inf
