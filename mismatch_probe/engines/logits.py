"""What engines that show their logits do with them before a token is chosen: keep rows, add noise, let noise choose.

Shape legend: `R` rows, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mismatch_probe.engines.rows import LEAST_WEIGHT, RowChoice


def row_weights(rows: torch.Tensor) -> torch.Tensor:
    """`[R, V]` logits → `[R]` weights: one minus the likeliest token's probability, no less than the least weight."""
    top = torch.exp(rows.amax(-1) - rows.logsumexp(-1))
    # A row with NaN is kept like the least sure one, since it is what somebody will want to see.
    return (1 - top).nan_to_num(1.0).clamp(LEAST_WEIGHT, 1.0)


def keep_rows(wanted: Sequence[tuple[int, RowChoice, int]], logits: torch.Tensor) -> None:
    """Keeps what requests choose of a step's logits.

    Args:
        wanted: Row, its request's choice, and the position in the response; a negative one is not of the response.
        logits: `[R, V]` before temperature.
    """
    found = [(row, choice, at, u) for row, choice, at in wanted if (u := choice.draw(at)) is not None]
    if not found:
        return
    weights = row_weights(logits[[row for row, *_ in found]]).tolist()  # waits for the device, once a step
    kept = [
        (row, choice, slot)
        for (row, choice, at, u), weight in zip(found, weights, strict=True)
        if (slot := choice.admit(at, u, weight)) is not None
    ]
    if kept:
        rows = logits[[row for row, *_ in kept]].float().cpu()
        for (_, choice, slot), values in zip(kept, rows, strict=True):
            choice.writer.put(slot, values.numpy())


def add_noise(row: torch.Tensor, scale: float, seed: int, position: int) -> torch.Tensor:
    """Adds normal noise to `[V]` logits in place: an RL run's stress of known size (`rl.stress`), which depends on the
    request's seed and the position alone.
    """
    # Drawn on the CPU whatever the device, so that every engine adds the same.
    noise = torch.randn(row.shape, generator=_generator("cpu", seed, position))
    return row.add_(scale * noise.to(row))


def winner(row: torch.Tensor, seed: int, position: int) -> torch.Tensor:
    """`[V]` logits, at the temperature that is sampled at → `[]` a token drawn from their softmax: the one whose logit
    plus Gumbel noise is the largest. The noise depends on the seed and the position alone, so passes whose logits
    differ by rounding nearly always draw the same token.
    """
    generator = _generator(row.device, seed, position)
    uniform = torch.rand(row.shape, dtype=torch.float64, device=row.device, generator=generator)
    # A draw of 0 would make the noise infinite, and a token win that cannot occur.
    waits = -torch.log1p(-uniform.clamp_(min=2**-54))
    return (row - waits.log()).argmax()


def _generator(device: torch.device | str, seed: int, position: int) -> torch.Generator:
    # A hash, since a CPU's generator takes no more than the lower 32 bits.
    key = int(np.random.SeedSequence((seed, position)).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(key)


def leave_winner(row: torch.Tensor, temperature: float, seed: int, position: int) -> torch.Tensor:
    """Takes every token but the winner out of `[V]` logits, in place."""
    chosen = winner(row / temperature, seed, position)
    return row.fill_(-torch.inf).index_fill_(0, chosen[None], 0.0)
