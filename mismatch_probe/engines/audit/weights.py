"""What converting weights to 16 bits does: to each tensor, and to log-probs as the engine's lag behind FP32 masters.

Both sides of the lag, masters and their own 16-bit copy, compute in FP32, so nothing but the cast is in the gap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mismatch_probe.engines.base import TrainerEngine
from mismatch_probe.metrics.floats import FORMATS, FloatFormat
from mismatch_probe.types import ScoreRequest

_EPSILON = 1e-8  # of Adam
_SEED = 0
TORCH_FORMATS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_CHUNK = 1 << 24


@dataclass(frozen=True)
class LagCase:
    """Where the masters are.

    Attributes:
        dtype: What the engine keeps weights in.
        rate: Learning rate of the one Adam step that took them away from a checkpoint in that dtype; None for masters
            anywhere within half a unit of the engine's weights, as after many steps.
    """

    dtype: str
    rate: float | None

    @property
    def name(self) -> str:
        return f"{self.dtype}-{'steady' if self.rate is None else f'first-{self.rate:g}'}"


class LagScorer:
    """Scores sequences with masters, and with their copy as an engine keeps it.

    Args:
        engine: In FP32; its weights are not what they were afterwards.
        model: Its network.
        gradients: Of a batch, by parameter, on the host.
    """

    def __init__(self, engine: TrainerEngine, model: nn.Module, gradients: dict[str, Tensor]) -> None:
        self._engine, self._model, self._gradients = engine, model, gradients
        # On the host: the device may hold no second copy.
        self._start = {name: p.detach().to("cpu", copy=True) for name, p in self._model.named_parameters()}

    def gaps(
        self, case: LagCase, requests: Sequence[ScoreRequest], temperature: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
        """`[N]` log-probs by the masters, `[N]` by the engine's copy, in the order of the requests, nats; and the share
        of weights that differ at the engine from where it started.
        """
        self._engine.load_weights(self._masters(case))
        masters = self._score(requests, temperature)
        changed, total = 0, 0
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(rounded(parameter, case.dtype))
                started = rounded(self._start[name].to(parameter.device), case.dtype)
                changed += int((parameter != started).sum())
                total += parameter.numel()
        return masters, self._score(requests, temperature), changed / total

    def _masters(self, case: LagCase) -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator().manual_seed(_SEED)
        for name in self._start:
            start = rounded(self._start[name], case.dtype)
            if case.rate is None:
                noise = torch.rand(start.shape, generator=generator) - 0.5
                yield name, start + noise * ulp(start, FORMATS[case.dtype])
            elif name in self._gradients:
                gradient = self._gradients[name]
                yield name, start - case.rate * gradient / (gradient.abs() + _EPSILON)
            else:
                yield name, start

    def _score(self, requests: Sequence[ScoreRequest], temperature: float) -> NDArray[np.float64]:
        found: dict[int, Any] = {}
        for batch in self._engine.plan(requests):
            found.update({score.sequence_id: score.logprobs for score in self._engine.score(batch, temperature)})
        return np.concatenate([np.asarray(found[r.sequence_id], np.float64) for r in requests])


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
