"""Injected stress on the rollout side, in four structures, to learn what a mismatch of known size does to training.

It is never precision: whatever is drawn from it is labelled *injected stress, not precision*.

- `weight-noise`: every weight is multiplied by 1 + dose·ε, ε standard normal, fresh at each sync.
- `mantissa`: every weight is rounded to `dose` stored mantissa bits (ties to even; the exponent is not limited).
- `logit-noise`: dose·ε is added to every logit, fresh at each token; the engine reports what it sampled from.
- `stale`: the engine has the weights of `dose` steps ago.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mismatch_probe.rl.config import Structure

Weights = Mapping[str, torch.Tensor]
LABEL = "injected stress, not precision"


def stressed(weights: Weights, structure: Structure, dose: float, *, seed: int, step: int) -> dict[str, torch.Tensor]:
    """The weights that the engine is given; tensors that share memory (tied embeddings) stay equal.

    Args:
        weights: FP32 weights by name.
        structure: Only `weight-noise` and `mantissa` change weights.
        dose: See the module.
        seed, step: Decide the noise, so that a resumed run draws the same.
    """
    if structure not in ("weight-noise", "mantissa"):
        return dict(weights)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    found: dict[str, torch.Tensor] = {}
    by_memory: dict[int, torch.Tensor] = {}
    for name in sorted(weights):
        tensor = weights[name]
        if not tensor.is_floating_point():
            found[name] = tensor
            continue
        if tensor.data_ptr() not in by_memory:
            if structure == "mantissa":
                changed = round_mantissa(tensor, int(dose))
            else:
                noise = torch.randn(tensor.shape, generator=generator).to(tensor)
                changed = tensor * (1 + dose * noise)
            by_memory[tensor.data_ptr()] = changed
        found[name] = by_memory[tensor.data_ptr()]
    return found


def round_mantissa(values: torch.Tensor, bits: int) -> torch.Tensor:
    """A tensor's nearest numbers with so many stored mantissa bits, ties to even; the exponent is not limited."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp(torch.round(mantissa * 2.0 ** (bits + 1)) * 2.0 ** -(bits + 1), exponent)
