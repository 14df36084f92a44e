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
# The others are mistakes: padding on the left that positions count (`left-unnumbered`), or that attention sees, too
# (`left-attended`); packed sequences that see those before them (`packed-leak`), or go on with their positions, too
# (`packed-joined`).
BatchLayout = TrainerLayout | Literal["left-padded", "left-unnumbered", "left-attended", "packed-leak", "packed-joined"]


def _before(batch: Sequence[ScoreRequest], layout: BatchLayout) -> list[int]:
    """Padding on the left of each sequence: up to the longest one, or in the mistaken layouts up to the longest prompt,
    as trainers lay out prompts and responses.
    """
    if layout == "left-padded":
        lengths = [r.length for r in batch]
    elif layout.startswith("left"):
        lengths = [len(r.prompt_token_ids) for r in batch]
    else:
        return [0] * len(batch)
    return [max(lengths) - length for length in lengths]


def model_inputs(
    batch: Sequence[ScoreRequest], layout: BatchLayout, device: torch.device
) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """Model inputs of a batch, the flat rows that predict response tokens `[R]`, and those tokens `[R]`.

    Padded batches are padded on the right, where causal attention makes padding harmless, and carry a mask unless all
    lengths agree. Packed ones are one row whose position ids start again at each sequence.
    """
    sequences = [list(r.prompt_token_ids) + list(r.response_token_ids) for r in batch]
    targets = torch.tensor([token for r in batch for token in r.response_token_ids], device=device)
    if layout.startswith("packed"):
        starts = list(accumulate(map(len, sequences), initial=0))[:-1]
        inputs = {"input_ids": torch.tensor([list(chain.from_iterable(sequences))], device=device)}
        if layout != "packed-joined":
            inputs["position_ids"] = torch.cat([torch.arange(len(s)) for s in sequences])[None].to(device)
        if layout == "packed-leak":  # with a mask, transformers looks for no sequences in the positions
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    else:
        before = _before(batch, layout)
        longest = max(left + len(s) for left, s in zip(before, sequences, strict=True))
        gaps = [longest - len(s) for s in sequences]
        starts = [i * longest + left for i, left in enumerate(before)]
        rows_of = [[0] * left + s + [0] * (gap - left) for s, gap, left in zip(sequences, gaps, before, strict=True)]
        inputs = {"input_ids": torch.tensor(rows_of, device=device)}
        if any(gaps) and layout != "left-attended":
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
