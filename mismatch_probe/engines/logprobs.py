"""Log-probs of response tokens with their gradients: a causal language model of transformers, padded on the right.

Shape legend: `B` sequences, `L` tokens of the longest with its prompt, `T` response tokens of the longest, `V`
vocabulary, `M` layers with a router, `K` experts of a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functional_call


@dataclass(frozen=True)
class Batch:
    """Sequences side by side, padded on the right, where causal attention makes padding harmless.

    Attributes:
        ids: `[B, L]` prompts with their responses.
        attention: `[B, L]` 1 where there is a token.
        first: `[B]` index of the first response token.
        mask: `[B, T]` where a response has a token.
        routes: `[M, B, L, K]` experts that the rollout sent tokens to, by layer with a router; None where not kept.
    """

    ids: torch.Tensor
    attention: torch.Tensor
    first: torch.Tensor
    mask: torch.Tensor
    routes: torch.Tensor | None = None

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device) -> Batch:
        assert all(prompts), "nothing predicts the first token of a response without a prompt"
        rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        longest, most = max(map(len, rows)), max(1, *map(len, responses))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        lengths = torch.tensor([len(response) for response in responses])
        return cls(
            ids.to(device),
            (torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]).long().to(device),
            torch.tensor([len(prompt) for prompt in prompts]).to(device),
            (torch.arange(most) < lengths[:, None]).to(device),
        )

    def targets(self) -> torch.Tensor:
        """`[B, T]` response tokens; some token where there is none."""
        at = self.first[:, None] + torch.arange(self.mask.shape[1], device=self.ids.device)
        return self.ids.gather(1, at.clamp(max=self.ids.shape[1] - 1))


def token_logprobs(
    model: Any, batch: Batch, temperature: float, weights: Mapping[str, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B, T]` log-probs of the response tokens in nats, and the logits `[B, T, V]` in FP32.

    Args:
        model: A causal language model of transformers.
        batch: With T response tokens at most.
        temperature: What logits are divided by.
        weights: Take the place of the model's own.
    """
    # The head runs from the row that predicts the earliest response token on.
    rows = batch.ids.shape[1] - int(batch.first.min()) + 1
    options = {"attention_mask": batch.attention, "use_cache": False, "logits_to_keep": rows}
    if weights is None:
        output = model(batch.ids, **options)
    else:
        output = functional_call(model, dict(weights), (batch.ids,), options, tie_weights=False)
    at = batch.first[:, None] - int(batch.first.min()) + torch.arange(batch.mask.shape[1], device=batch.ids.device)
    at = at.clamp(max=output.logits.shape[1] - 1)
    logits = output.logits.gather(1, at[..., None].expand(-1, -1, output.logits.shape[-1])).float()
    if temperature != 1:
        logits = logits / temperature
    chosen = logits.gather(2, batch.targets()[..., None])[..., 0]
    return chosen - logits.logsumexp(-1), logits


def entropies(logits: torch.Tensor) -> torch.Tensor:
    """`[..., V]` logits → `[...]` entropy, nats; NaN where they are no distribution."""
    logprobs = logits.log_softmax(-1)
    return -torch.where(logprobs.isneginf(), 0.0, logprobs.exp() * logprobs).sum(-1)
