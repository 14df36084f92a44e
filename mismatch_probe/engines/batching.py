"""How sequences become batches within a memory budget. Pure arithmetic, so it is tested without torch.

Shape legend: `B` sequences of a batch, `T` tokens of its longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mismatch_probe.types import ScoreRequest, TrainerLayout

# A CPU gains nothing from more tokens at once, and smaller batches stay in cache and waste less on padding.
MOST_TOKENS = {"cpu": 512, "cuda": 32768}
_MOST_ROWS = {"cpu": 128, "cuda": 4096}


@dataclass(frozen=True)
class Footprint:
    """Memory of a forward pass without gradients, in bytes.

    Attributes:
        per_token: Live activations of one token.
        per_mask_entry: Of one entry of a `[B, 1, T, T]` attention mask; 0 where the attention takes lengths instead.
        per_score_entry: Of one entry of `[B, T, T]` attention scores, all heads; 0 where no kernel ever holds them.
    """

    per_token: int
    per_mask_entry: int
    per_score_entry: int

    @classmethod
    def of_model(cls, *, hidden: int, intermediate: int, heads: int, itemsize: int, attention: str) -> Footprint:
        """Counts what is alive at once in a layer: residual, norm, q, k, v, attention output, the MLP's three."""
        live = 6 * hidden + 3 * intermediate
        return cls(
            # FP32 copies inside norms and softmax double it.
            per_token=2 * live * itemsize,
            # Kept as booleans and once more in the compute dtype.
            per_mask_entry=1 + itemsize if attention in ("sdpa", "eager") else 0,
            # Eager attention holds scores and probabilities in the compute dtype and once in FP32.
            per_score_entry=heads * (2 * itemsize + 4) if attention == "eager" else 0,
        )

    def of_batch(self, lengths: Sequence[int], layout: TrainerLayout) -> int:
        """Bytes of a batch. A batch of one length needs no mask: causal attention alone is right."""
        if layout == "packed":
            tokens, rows = sum(lengths), 1
            masked = len(lengths) > 1
        else:
            tokens, rows = max(lengths) * len(lengths), len(lengths)
            masked = min(lengths) < max(lengths)
        width = tokens // rows
        per_entry = self.per_score_entry + (self.per_mask_entry if masked else 0)
        return tokens * self.per_token + rows * width * width * per_entry


def plan_batches(
    requests: Sequence[ScoreRequest], layout: TrainerLayout, footprint: Footprint, budget: int, device_type: str
) -> list[list[ScoreRequest]]:
    """Batches of similar length, longest first, so that running out of memory shows at once.

    Args:
        requests: What to score, in any order; each of them lands in exactly one batch.
        layout: `single` gives batches of one.
        footprint: The model's.
        budget: Bytes for activations and mask; a single sequence that exceeds it still gets a batch of its own.
        device_type: `cpu` or `cuda`.
    """
    ordered = sorted(requests, key=lambda r: (-r.length, r.sequence_id))
    if layout == "single":
        return [[request] for request in ordered]
    batches: list[list[ScoreRequest]] = []
    for request in ordered:
        if batches and _fits([*batches[-1], request], layout, footprint, budget, MOST_TOKENS[device_type]):
            batches[-1].append(request)
        else:
            batches.append([request])
    return batches


def plan_in_order(
    requests: Sequence[ScoreRequest], footprint: Footprint, budget: int, most_tokens: int, most_rows: int
) -> list[list[ScoreRequest]]:
    """Padded batches of neighbours, in the order of the requests: as many at once as both limits and the budget allow.

    Args:
        requests: What to score.
        footprint: The model's.
        budget: Bytes for activations and mask; a single sequence that exceeds it still gets a batch of its own.
        most_tokens: Tokens of a batch, padding not counted.
        most_rows: Sequences of a batch.
    """
    batches: list[list[ScoreRequest]] = []
    for request in requests:
        grown = [*batches[-1], request] if batches else [request]
        lengths = [r.length for r in grown]
        fits = len(grown) <= most_rows and sum(lengths) <= most_tokens
        if batches and fits and footprint.of_batch(lengths, "padded") <= budget:
            batches[-1].append(request)
        else:
            batches.append([request])
    return batches


def _fits(
    batch: Sequence[ScoreRequest], layout: TrainerLayout, footprint: Footprint, budget: int, most_tokens: int
) -> bool:
    lengths = [request.length for request in batch]
    tokens = sum(lengths) if layout == "packed" else max(lengths) * len(lengths)
    return tokens <= most_tokens and footprint.of_batch(lengths, layout) <= budget


def rows_per_chunk(vocabulary: int, budget: int, device_type: str) -> int:
    """Rows of logits that exist at once: them, what is made of them, and room, within a quarter of the budget."""
    return max(1, min(_MOST_ROWS[device_type], budget // 4 // (12 * vocabulary)))
