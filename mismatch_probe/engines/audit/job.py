"""An audit's measurements: what is asked of the worker process, and the files that it leaves, one a part.

Nothing here imports torch before the job runs.

Shape legend: `S` sequences, `M` tensors of a forward pass, `G` tensors with a gradient, `W` sampled weights, `E`
exponents, `N` response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.engines import devices
from mismatch_probe.engines.base import Channel, OnTrainer, TrainerEngine
from mismatch_probe.engines.events import Advance, Identity, Total
from mismatch_probe.metrics.floats import ExponentHistogram
from mismatch_probe.metrics.ranges import PeakSums
from mismatch_probe.results.ranges import PARTS, PartName
from mismatch_probe.runs.measurements import Measurement
from mismatch_probe.types import ScoreRequest

if TYPE_CHECKING:
    from mismatch_probe.engines.logprobs import Batch

# Made in the dtype by eager attention only: fused kernels keep them in FP32.
FUSED = ("attention product", "softmax input")
SAMPLED = 512
LAG_BATCH = 8
_SEED = 0
Part = tuple[dict[str, Any], dict[str, NDArray[Any]]]


@dataclass(frozen=True)
class AuditJob(OnTrainer):
    """Measures a model on some sequences of its own.

    Attributes:
        trainer: The trainer in FP32, or in FP16 for the proof, which is a job of its own; its requests are left empty.
        parts: What is to be made, by name.
        sequences: `S` prompts with responses; the first ones serve where fewer are enough.
        n_gradients: Sequences of the backward pass.
        n_lag: Sequences that are scored with masters and with their copies.
        n_proof: Sequences of the FP16 pass.
        step_tokens: Response tokens that a step's loss is averaged over.
        rates: Learning rates.
        highest: For the proof, the exponent of the largest loss scale that FP32 gradients leave room for.
    """

    parts: Mapping[PartName, Measurement]
    sequences: Sequence[ScoreRequest]
    n_gradients: int
    n_lag: int
    n_proof: int
    step_tokens: int
    rates: Sequence[float]
    highest: int | None = None
    subject: ClassVar[str] = "The audit's pass"
    memory_advice: ClassVar[str] = "Audit with a lower --max-tokens, or use a machine with more memory."

    def run(self, channel: Channel) -> None:
        """Sends `Identity`, `Total` and `Advance` in tokens; a phase for each part."""
        steps = {"forward": len(self.sequences), "backward": self.n_gradients, "lag": self.n_lag, "proof": self.n_proof}
        channel.send(Total(sum(r.length for name in self.parts for r in self.sequences[: steps.get(name, 0)])))
        with self.trainer.started() as engine:
            channel.phase("load")
            identity = engine.identity() | devices.running()
            channel.send(Identity(identity))
            for name in (part for part in PARTS if part in self.parts):
                facts, arrays = engine.run_on_model(
                    partial(self._made, name, engine, lambda n: channel.send(Advance(n)))
                )
                self.parts[name].save({**facts, "made_with": identity["versions"]}, arrays)
                channel.phase(name)

    def _made(self, name: PartName, engine: TrainerEngine, tick: Callable[[int], None], model: Any) -> Part:
        """One part."""
        match name:
            case "weights":
                return self._weights(model)
            case "forward":
                return self._forward(model, tick)
            case "backward":
                return self._backward(model, tick)
            case "lag":
                return self._lag(engine, model, tick)
            case "proof":
                return self._proof(engine, model, tick)

    def _weights(self, model: Any) -> Part:
        from mismatch_probe.engines.audit.weights import weight_rows

        return {"rows": weight_rows(model)}, {}

    def _forward(self, model: Any, tick: Callable[[int], None]) -> Part:
        """Peaks of every tensor, see `PeakSums`."""
        import torch

        from mismatch_probe.engines.audit.forward import ForwardTracker
        from mismatch_probe.engines.logprobs import token_logprobs

        tracker, sums = ForwardTracker(model), None
        with torch.inference_mode(), tracker.watching():
            for request in self.sequences:
                batch = self._batch(request)

                def run(batch: Batch = batch) -> None:
                    token_logprobs(model, batch, self.trainer.temperature)

                peaks = tracker.sequence(request.length, run)
                names = tuple(place.name for place in tracker.places)
                sums = PeakSums(names) if sums is None else sums.widened(names)
                rows = np.stack([peaks.get(name, np.zeros(request.length)) for name in names]).astype(np.float64)
                counted = [place.kind not in FUSED or not tracker.fused for place in tracker.places]
                sums.update(rows, np.array(counted), np.array([place.placed for place in tracker.places]))
                tick(request.length)
        assert sums is not None
        places = [vars(place) for place in tracker.places]
        return {"places": places, "layers": list(tracker.layers), "fused": tracker.fused}, sums.arrays()

    def _backward(self, model: Any, tick: Callable[[int], None]) -> Part:
        """`counts` and `mass` `[G, E]`, `largest` `[G]`, `largest_by_sequence` `[S]` of gradients; and of sampled
        weights `weights` `[W]`, `tensor` `[W]`, `gradients` `[S, W]`, these of the mean over a sequence's tokens.
        """
        from mismatch_probe.engines.audit.backward import GradientTracker

        sample = _Sample(model)
        tracker = GradientTracker(model.requires_grad_(True))
        largest, gradients = [], []
        with tracker.watching():
            for request, sign in zip(self.sequences[: self.n_gradients], self._signs(), strict=False):
                self._gradient(model, request, sign / self.step_tokens)
                tracker.weights()
                largest.append(tracker.largest())
                gradients.append(sample.gradients() * (self.step_tokens / len(request.response_token_ids)))
                model.zero_grad(set_to_none=True)
                tick(request.length)
        model.requires_grad_(False)
        histograms = tracker.histograms()
        facts = {
            "names": list(histograms),
            "tensors": sample.names,
            "step_tokens": self.step_tokens,
            "n_tokens": sum(len(r.response_token_ids) for r in self.sequences[: self.n_gradients]),
        }
        return facts, {
            "counts": np.stack([h.counts for h in histograms.values()]),
            "mass": np.stack([h.mass for h in histograms.values()]),
            "largest": np.array([h.largest for h in histograms.values()]),
            "largest_by_sequence": np.array(largest),
            "weights": sample.weights,
            "tensor": sample.tensor,
            "gradients": np.stack(gradients).astype(np.float32),
        }

    def _lag(self, engine: TrainerEngine, model: Any, tick: Callable[[int], None]) -> Part:
        """By case `masters-NAME` and `engine-NAME` `[N]` log-probs; `sequence` `[N]` index of each token's sequence."""
        from mismatch_probe.engines.audit.weights import TORCH_FORMATS, LagCase, LagScorer

        model.requires_grad_(True)
        batch = self.sequences[:LAG_BATCH]
        tokens = sum(len(request.response_token_ids) for request in batch)
        for request, sign in zip(batch, self._signs(), strict=False):
            self._gradient(model, request, sign / tokens)
        # On the host: the device may hold the model alone.
        found = {name: p.grad.to("cpu") for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)
        scorer, requests = LagScorer(engine, model, found), self.sequences[: self.n_lag]
        cases = [LagCase(dtype, rate) for dtype in TORCH_FORMATS for rate in (None, *self.rates)]
        arrays: dict[str, NDArray[Any]] = {}
        about = []
        for case in cases:
            masters, copy, changed = scorer.gaps(case, requests, self.trainer.temperature)
            arrays |= {f"masters-{case.name}": masters, f"engine-{case.name}": copy}
            about.append({"name": case.name, "dtype": case.dtype, "rate": case.rate, "changed": changed})
        tick(sum(request.length for request in requests))
        lengths = [len(request.response_token_ids) for request in requests]
        return {"cases": about}, arrays | {"sequence": np.repeat(np.arange(len(requests)), lengths)}

    def _proof(self, engine: TrainerEngine, model: Any, tick: Callable[[int], None]) -> Part:
        from mismatch_probe.engines.audit.backward import Fp16Proof, prove

        proof = Fp16Proof(engine, model, self.trainer.temperature, self.step_tokens, self.highest)
        batches = [self._batch(request) for request in self.sequences[: self.n_proof]]
        return {"mode": self.trainer.mode, **prove(proof, batches, self._signs()[: len(batches)], tick)}, {}

    def _gradient(self, model: Any, request: ScoreRequest, factor: float) -> None:
        """Adds the gradient of −factor · Σ log π of a sequence to the weights'."""
        from mismatch_probe.engines.logprobs import token_logprobs

        batch = self._batch(request)
        logprobs, _ = token_logprobs(model, batch, self.trainer.temperature)
        (-factor * logprobs[batch.mask].sum()).backward()  # type: ignore[no-untyped-call]

    def _batch(self, request: ScoreRequest) -> Batch:
        import torch

        from mismatch_probe.engines.logprobs import Batch

        device = torch.device(self.trainer.device)
        return Batch.of([request.prompt_token_ids], [request.response_token_ids], device)

    def _signs(self) -> list[float]:
        """Advantages of 1 and −1, as a group's normalised ones are on average."""
        draw = np.random.default_rng(_SEED)
        return [float(sign) for sign in draw.choice((-1.0, 1.0), size=len(self.sequences))]


class _Sample:
    """Some weights of every tensor, the same for every gradient."""

    def __init__(self, model: Any) -> None:
        import torch

        generator = torch.Generator().manual_seed(_SEED)
        self._parameters = dict(model.named_parameters())
        self.names = list(self._parameters)
        self._index = {
            name: torch.randint(p.numel(), (min(SAMPLED, p.numel()),), generator=generator).to(p.device)
            for name, p in self._parameters.items()
        }
        taken = [p.detach().flatten()[self._index[name]].cpu().numpy() for name, p in self._parameters.items()]
        self.weights: NDArray[np.float32] = np.concatenate(taken)
        self.tensor: NDArray[np.int64] = np.repeat(np.arange(len(taken)), [len(part) for part in taken])

    def gradients(self) -> NDArray[np.float64]:
        """`[W]` what backward passes left at the sampled weights."""
        parts = [
            np.zeros(len(self._index[name])) if p.grad is None else p.grad.flatten()[self._index[name]].cpu().numpy()
            for name, p in self._parameters.items()
        ]
        return np.asarray(np.concatenate(parts), dtype=np.float64)


def histograms_of(facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> dict[str, ExponentHistogram]:
    """By tensor, from the part `backward`."""
    columns = zip(arrays["counts"], arrays["mass"], arrays["largest"], strict=True)
    return {n: ExponentHistogram(c, m, float(top)) for n, (c, m, top) in zip(facts["names"], columns, strict=True)}
