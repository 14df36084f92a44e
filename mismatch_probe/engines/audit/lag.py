"""The engine's lag behind FP32 masters as a gap between log-probs: masters against their own 16-bit copy.

Both sides compute in FP32, so nothing but the cast of the weights is in the gap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mismatch_probe.engines.audit.weights import rounded, ulp
from mismatch_probe.engines.base import TrainerEngine
from mismatch_probe.metrics.floats import FORMATS
from mismatch_probe.types import ScoreRequest

_EPSILON = 1e-8  # of Adam
_SEED = 0


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
