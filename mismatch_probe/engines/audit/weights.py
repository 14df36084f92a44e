"""What converting each weight tensor to 16 bits does to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mismatch_probe.metrics.floats import FORMATS, FloatFormat

TORCH_FORMATS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_CHUNK = 1 << 24


def weight_rows(model: nn.Module) -> list[dict[str, Any]]:
    """A row per weight tensor and 16-bit format.

    `error` is ‖w − round(w)‖ / ‖w‖ (Frobenius), over elements that stay finite; `largest` max |w| of the finite ones;
    `n_nonfinite`, `n_overflow`, `n_flushed` and `n_subnormal` count elements that are not finite to begin with, become
    infinite, become 0 without being 0, and lose digits below the smallest normal number.
    """
    return [
        {
            "name": name,
            "dtype": dtype,
            "n": parameter.numel(),
            "ndim": parameter.ndim,
            **_conversion(parameter.detach(), FORMATS[dtype]),
        }
        for name, parameter in model.named_parameters()
        for dtype in TORCH_FORMATS
    ]


def _conversion(tensor: Tensor, form: FloatFormat) -> dict[str, Any]:
    sums = torch.zeros(7, dtype=torch.float64, device=tensor.device)
    for part in torch.split(tensor.flatten(), _CHUNK):
        broken = ~torch.isfinite(part)
        part = torch.where(broken, 0.0, part.float())
        magnitude, kept = part.abs(), part.to(TORCH_FORMATS[form.name]).float()
        over = torch.isinf(kept)
        found = (
            torch.where(over, 0.0, kept - part).double().square().sum(),
            part.double().square().sum(),
            over.sum(),
            ((kept == 0) & (part != 0)).sum(),
            ((magnitude < form.smallest_normal) & (part != 0)).sum(),
            broken.sum(),
        )
        sums[:6] += torch.stack([value.double() for value in found])
        sums[6] = torch.maximum(sums[6], magnitude.max().double() if part.numel() else sums[6])
    squared, total, over, flushed, subnormal, nonfinite, largest = sums.tolist()
    return {
        "error": (squared / total) ** 0.5 if total else 0.0,
        "largest": largest,
        "n_nonfinite": int(nonfinite),
        "n_overflow": int(over),
        "n_flushed": int(flushed),
        "n_subnormal": int(subnormal),
    }


def ulp(values: Tensor, form: FloatFormat) -> Tensor:
    """The distance between the format's numbers around each value."""
    exponent = torch.where(values == 0, form.lowest, torch.frexp(values).exponent - 1)
    return torch.ldexp(torch.ones_like(values), exponent.clamp(min=form.lowest) - form.digits + 1)


def rounded(values: Tensor, dtype: str) -> Tensor:
    """Each value as a 16-bit format keeps it, in the dtype that it came in."""
    return values.to(TORCH_FORMATS[dtype]).to(values.dtype)
