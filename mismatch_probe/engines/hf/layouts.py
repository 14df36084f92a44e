"""How the sequences of a batch become the inputs of a forward pass.

Shape legend: `B` sequences, `T` tokens of the longest, `R` response tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any, Literal

import torch

from mismatch_probe.types import ScoreRequest, TrainerLayout

# Padding on the left is what generation with transformers uses; a trainer that scores so must number positions itself.
BatchLayout = TrainerLayout | Literal["left-padded"]


def model_inputs(
    batch: Sequence[ScoreRequest], layout: BatchLayout, device: torch.device
) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """Model inputs of a batch, the flat rows that predict response tokens `[R]`, and those tokens `[R]`.

    Padded batches are padded on the right, where causal attention makes padding harmless, and carry a mask unless all
    lengths agree. Packed ones are one row whose position ids start again at each sequence.
    """
    sequences = [list(r.prompt_token_ids) + list(r.response_token_ids) for r in batch]
    targets = torch.tensor([token for r in batch for token in r.response_token_ids], device=device)
    if layout == "packed":
        starts = list(accumulate(map(len, sequences), initial=0))[:-1]
        inputs = {
            "input_ids": torch.tensor([list(chain.from_iterable(sequences))], device=device),
            "position_ids": torch.cat([torch.arange(len(s)) for s in sequences])[None].to(device),
        }
    else:
        longest = max(map(len, sequences))
        gaps = [longest - len(s) for s in sequences]
        before = gaps if layout == "left-padded" else [0] * len(gaps)
        starts = [i * longest + left for i, left in enumerate(before)]
        rows_of = [[0] * left + s + [0] * (gap - left) for s, gap, left in zip(sequences, gaps, before, strict=True)]
        inputs = {"input_ids": torch.tensor(rows_of, device=device)}
        if any(gaps):
            mask = [
                [0] * left + [1] * len(s) + [0] * (gap - left)
                for s, gap, left in zip(sequences, gaps, before, strict=True)
            ]
            inputs["attention_mask"] = torch.tensor(mask, device=device)
        if layout == "left-padded":
            inputs["position_ids"] = torch.tensor([[0] * left + list(range(longest - left)) for left in before]).to(
                device
            )
    rows = [
        start + len(r.prompt_token_ids) - 1 + t
        for start, r in zip(starts, batch, strict=True)
        for t in range(len(r.response_token_ids))
    ]
    return inputs, torch.tensor(rows, device=device), targets
