"""An engine's process in an attribution: the run's own tokens under one configuration, in one way after another.

Nothing here imports torch or vLLM before the job runs.

Shape legend: `N` response tokens, `L` layers with a router, `R` tokens with their prompts, `K` experts of a token.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.arrays import save_arrays
from mismatch_probe.engines import faults
from mismatch_probe.engines.attribute.memory import peak_bytes, reset_peak
from mismatch_probe.engines.attribute.trace import TraceRequest
from mismatch_probe.engines.attribute.variants import PassKind
from mismatch_probe.engines.base import RolloutJob
from mismatch_probe.types import RolloutRequest

if TYPE_CHECKING:
    from mismatch_probe.engines.vllm.engine import VllmRollout

ROUTES = "routes"


@dataclass(frozen=True)
class Routers:
    """What a mixture of experts looks like.

    Attributes:
        layers: Decoder layers of the model.
        experts: Experts of a layer.
        chosen: Experts of a token.
        most_tokens: What the engine's scheduler takes at once.
    """

    layers: int
    experts: int
    chosen: int
    most_tokens: int


@dataclass(frozen=True)
class RolloutVariants:
    """Passes of vLLM in one configuration, each a file `NAME.npz` with `logprobs` `[N]`, `index` of its sequences and
    how many response `tokens` it has of each.

    Attributes:
        rollout: The engine; its requests bring the tokens to decode again.
        passes: By name, how the engine goes over the tokens.
        keys: By name, of `ROUTES` too, a digest of all that the pass depends on.
        folder: Where passes go.
        alone: Of a pass that runs one sequence at a time: response tokens of each of the first sequences.
        trace: What is kept of its inside, if anything.
        routers: Where given, the experts of every token are kept as the pass `ROUTES`.
    """

    rollout: RolloutJob
    passes: Mapping[str, PassKind]
    keys: Mapping[str, str]
    folder: str
    alone: Sequence[int]
    trace: TraceRequest | None = None
    routers: Routers | None = None
    memory_advice: str = field(
        default="Attribute with a lower --rollout-batch, or leave this setting out of --settings.", init=False
    )

    @property
    def subject(self) -> str:
        return f"The engine with {', '.join(self.passes) or 'hooks'}"

    @property
    def model_path(self) -> str:
        return self.rollout.model_path

    @property
    def trust_remote_code(self) -> bool:
        return self.rollout.trust_remote_code

    def run(self, channel: Any) -> None:
        """Events: `identity`, `total` and `progress` in sequences; a phase for each pass."""
        import torch

        from mismatch_probe.engines import devices
        from mismatch_probe.engines.vllm.engine import VllmRollout

        reset_peak(torch.device(self.rollout.device))
        engine = VllmRollout(self.rollout)
        self._warm(engine)
        channel.phase("load")
        identity = engine.identity()
        channel.send("identity", identity | devices.running())
        channel.send("total", len(self.passes) + (self.trace is not None) + (self.routers is not None))
        facts = {"identity": identity, "made_with": devices.package_versions()}
        for name, kind in self.passes.items():
            self._save(name, *self._read(engine, kind, facts))
            channel.send("progress", 1)
            channel.phase(name)
        if self.trace is not None:
            self._trace(engine, self.trace)
            channel.send("progress", 1)
            channel.phase("trace")
        if self.routers is not None:
            layers, routes, logprobs = self._routes(engine, self.routers)
            self._save(ROUTES, facts | {"layers": layers}, {"routes": routes, "logprobs": logprobs})
            channel.send("progress", 1)
            channel.phase(ROUTES)
        engine.close()

    def _read(
        self, engine: VllmRollout, kind: PassKind, facts: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Facts and arrays of one pass; one that fails leaves the others, and where the engine itself is gone, the
        next one says so.
        """
        import torch

        device, requests = torch.device(self.rollout.device), list(self.rollout.requests)
        if kind.endswith("alone"):
            requests = [
                replace(request, forced_token_ids=request.forced_token_ids[:tokens])
                for request, tokens in zip(requests, self.alone, strict=False)
            ]
        try:
            if kind == "decode-warm":
                self._decode(engine, requests)
            started = time.perf_counter()
            found = self._pass(engine, kind, requests)
            seconds = time.perf_counter() - started
        except Exception as error:
            empty: dict[str, NDArray[Any]] = {"logprobs": np.empty(0, np.float32), "index": np.empty(0, np.int64)}
            return {**facts, "failed": faults.told(error, self)}, empty
        # On a card vLLM takes its share whatever it needs, so that its peak says nothing.
        peak = peak_bytes(device) if device.type == "cpu" else None
        return {**facts, "seconds": seconds, "peak_bytes": peak}, {
            "logprobs": np.concatenate(found),
            "index": np.arange(len(requests)),
            "tokens": np.array([len(request.forced_token_ids) for request in requests], np.int64),
        }

    def _warm(self, engine: VllmRollout) -> None:
        """Sets up whatever is set up at first use, which is not the first pass's."""
        first = list(self.rollout.requests)[: self.rollout.batch]
        if any(kind.startswith("decode") for kind in self.passes.values()):
            engine.generate(first, replace(self.rollout.sampling, max_tokens=1), _nothing)
        elif self.passes:  # an engine that splits prompts may not be able to decode with seeds (see `devices`)
            _prefill(engine, first)

    def _pass(
        self, engine: VllmRollout, kind: PassKind, requests: Sequence[RolloutRequest]
    ) -> list[NDArray[np.floating[Any]]]:
        """`[T]` log-probs of each sequence's response."""
        if kind.startswith("prefill"):
            groups = [[request] for request in requests] if kind == "prefill-alone" else [list(requests)]
            return [logprobs for group in groups for logprobs in _prefill(engine, group)]
        if kind == "decode-alone":
            return [logprobs for request in requests for logprobs in self._decode(engine, [request])]
        return self._decode(engine, requests, keep_cache=kind == "decode-warm")

    def _decode(
        self, engine: VllmRollout, requests: Sequence[RolloutRequest], *, keep_cache: bool = False
    ) -> list[NDArray[np.floating[Any]]]:
        """As a comparison's pass does it, so that the same company gives the same bits."""
        batch = self.rollout.batch
        groups = [group for group in (list(requests)[:batch], list(requests)[batch:]) if group]
        found = [engine.generate(group, self.rollout.sampling, _nothing, keep_cache=keep_cache) for group in groups]
        return [np.asarray(rollout.logprobs, np.float32) for group in found for rollout in group]

    def _trace(self, engine: VllmRollout, request: TraceRequest) -> None:
        from mismatch_probe.engines.vllm import hooks

        engine.on_model(partial(hooks.start_trace, request))
        engine.score(request.sequences)
        engine.on_model(hooks.finish_trace)

    def _routes(
        self, engine: VllmRollout, routers: Routers
    ) -> tuple[list[int], NDArray[np.int16], NDArray[np.float32]]:
        """Layers with a router, `[L, R, K]` experts, and the `[N]` log-probs of the same prefill."""
        from mismatch_probe.engines.vllm import hooks

        requests = list(self.rollout.requests)
        ids = tuple(_ids(request) for request in requests)
        begin = partial(hooks.start_routes, ids, routers.layers, routers.experts, routers.chosen)
        engine.on_model(begin)
        # No more at once than one step takes: a sequence that is split over two is in no step as a whole.
        groups: list[list[RolloutRequest]] = []
        for request in requests:
            room = routers.most_tokens - sum(len(_ids(r)) for r in groups[-1]) if groups else 0
            if len(_ids(request)) <= room and len(groups[-1]) < self.rollout.batch:
                groups[-1].append(request)
            else:
                groups.append([request])
        found = [logprobs for group in groups for logprobs in _prefill(engine, group)]
        kept = engine.on_model(hooks.finish_routes)
        routes = np.frombuffer(kept["routes"], np.int16).reshape(kept["shape"])
        return list(kept["layers"]), routes, np.concatenate(found)

    def _save(self, name: str, facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        save_arrays(Path(self.folder) / f"{name}.npz", self.keys[name], facts, arrays)


def _ids(request: RolloutRequest) -> tuple[int, ...]:
    return (*request.prompt_token_ids, *(int(token) for token in request.forced_token_ids))


def _prefill(engine: VllmRollout, requests: Sequence[RolloutRequest]) -> list[NDArray[np.float32]]:
    found = engine.score([_ids(request) for request in requests])
    return [row[len(r.prompt_token_ids) - 1 :] for row, r in zip(found, requests, strict=True)]


def _nothing(_: int) -> None:
    """Nobody counts the tokens of a step."""
