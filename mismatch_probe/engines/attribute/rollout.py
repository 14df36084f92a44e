"""An engine's process in an attribution: the run's own tokens under one configuration, in one way after another.

Nothing here imports torch or vLLM before the job runs.

Shape legend: `N` response tokens, `L` layers with a router, `R` tokens with their prompts, `K` experts of a token.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.engines import devices, faults
from mismatch_probe.engines.attribute.trace import Routers, TraceRequest
from mismatch_probe.engines.attribute.variants import PassKind
from mismatch_probe.engines.base import Channel, RolloutEngine, RolloutJob
from mismatch_probe.engines.devices import peak_bytes, reset_peak
from mismatch_probe.engines.events import Advance, Identity, Total
from mismatch_probe.runs.measurements import Measurement
from mismatch_probe.types import RolloutRequest

ROUTES = "routes"


@dataclass(frozen=True)
class RolloutVariants:
    """Passes of vLLM in one configuration, each a file `NAME.npz` with `logprobs` `[N]`, `index` of its sequences and
    how many response `tokens` it has of each.

    Attributes:
        rollout: The engine; its requests bring the tokens to decode again.
        passes: By name, how the engine goes over the tokens.
        files: Where each pass goes, `ROUTES` too.
        alone: Of a pass that runs one sequence at a time: response tokens of each of the first sequences.
        trace: What is kept of its inside, if anything.
        routers: Where given, the experts of every token are kept as the pass `ROUTES`.
    """

    rollout: RolloutJob
    passes: Mapping[str, PassKind]
    files: Mapping[str, Measurement]
    alone: Sequence[int]
    trace: TraceRequest | None = None
    routers: Routers | None = None
    memory_advice: ClassVar[str] = (
        "Attribute with a lower --rollout-batch, or leave this setting out of --settings. Or use a machine with more "
        "memory."
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

    def run(self, channel: Channel) -> None:
        """Sends `Identity`, `Total` and `Advance` in passes; a phase for each pass."""
        import torch

        reset_peak(torch.device(self.rollout.device))
        with self.rollout.started() as engine:
            self._warm(engine)
            channel.phase("load")
            identity = engine.identity()
            channel.send(Identity(identity | devices.running()))
            channel.send(Total(len(self.passes) + (self.trace is not None) + (self.routers is not None)))
            facts = {"identity": identity, "made_with": devices.package_versions()}
            for name, kind in self.passes.items():
                self._save(name, *self._read(engine, kind, facts))
                channel.send(Advance(1))
                channel.phase(name)
            if self.trace is not None:
                engine.trace(self.trace)
                channel.send(Advance(1))
                channel.phase("trace")
            if self.routers is not None:
                layers, routes, logprobs = self._routes(engine, self.routers)
                self._save(ROUTES, facts | {"layers": layers}, {"routes": routes, "logprobs": logprobs})
                channel.send(Advance(1))
                channel.phase(ROUTES)

    def _read(
        self, engine: RolloutEngine, kind: PassKind, facts: Mapping[str, Any]
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

    def _warm(self, engine: RolloutEngine) -> None:
        """Sets up whatever is set up at first use, which is not the first pass's."""
        first = list(self.rollout.requests)[: self.rollout.batch]
        if any(kind.startswith("decode") for kind in self.passes.values()):
            engine.replay(first, replace(self.rollout.sampling, max_tokens=1), _nothing)
        elif self.passes:  # an engine that splits prompts may not be able to decode with seeds (see `devices`)
            _prefill(engine, first)

    def _pass(
        self, engine: RolloutEngine, kind: PassKind, requests: Sequence[RolloutRequest]
    ) -> list[NDArray[np.floating[Any]]]:
        """`[T]` log-probs of each sequence's response."""
        if kind.startswith("prefill"):
            groups = [[request] for request in requests] if kind == "prefill-alone" else [list(requests)]
            return [logprobs for group in groups for logprobs in _prefill(engine, group)]
        if kind == "decode-alone":
            return [logprobs for request in requests for logprobs in self._decode(engine, [request])]
        return self._decode(engine, requests, keep_cache=kind == "decode-warm")

    def _decode(
        self, engine: RolloutEngine, requests: Sequence[RolloutRequest], *, keep_cache: bool = False
    ) -> list[NDArray[np.floating[Any]]]:
        """As a comparison's pass does it, so that the same company gives the same bits."""
        batch = self.rollout.batch
        groups = [group for group in (list(requests)[:batch], list(requests)[batch:]) if group]
        found = [engine.replay(group, self.rollout.sampling, _nothing, keep_cache=keep_cache) for group in groups]
        return [np.asarray(rollout.logprobs, np.float32) for group in found for rollout in group]

    def _routes(
        self, engine: RolloutEngine, routers: Routers
    ) -> tuple[list[int], NDArray[np.int16], NDArray[np.float32]]:
        """Layers with a router, `[L, R, K]` experts, and the `[N]` log-probs of the same prefill."""
        found = engine.routes([_ids(request) for request in self.rollout.requests], routers)
        return list(found.layers), found.experts, np.concatenate(_responses(found.logprobs, self.rollout.requests))

    def _save(self, name: str, facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        self.files[name].save(facts, arrays)


def _ids(request: RolloutRequest) -> tuple[int, ...]:
    return (*request.prompt_token_ids, *(int(token) for token in request.forced_token_ids))


def _prefill(engine: RolloutEngine, requests: Sequence[RolloutRequest]) -> list[NDArray[np.float32]]:
    return _responses(engine.score([_ids(request) for request in requests]), requests)


def _responses(rows: Sequence[NDArray[np.float32]], requests: Sequence[RolloutRequest]) -> list[NDArray[np.float32]]:
    """`[T]` log-probs of each response, of those of whole sequences."""
    return [row[len(r.prompt_token_ids) - 1 :] for row, r in zip(rows, requests, strict=True)]


def _nothing(_: int) -> None:
    """Nobody counts the tokens of a step."""
