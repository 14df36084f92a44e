"""Routers of a mixture of experts in an RL run: whether both sides choose the same experts, and replay of routes.

Routes are those of the steps that sampled the tokens. Where two experts tie for the last place in the engine's 16-bit
logits nobody can say which it took: there the trainer keeps its own route, and nothing is compared.

With the remedy `routing-replay` (R3, arXiv 2510.11370) every forward pass of the trainer sends tokens to the experts of
the rollout; their weights are made from the trainer's own logits, and gradients flow through them.

Shape legend: `B` sequences, `L` tokens of the longest with its prompt, `T` response tokens of the longest, `M` layers
with a router, `K` experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mismatch_probe.engines import registry
from mismatch_probe.engines.attribute.changes import Routing, padded_routes, same_experts
from mismatch_probe.engines.attribute.trace import Routers, why_no_routes
from mismatch_probe.engines.attribute.variants import UNKNOWN, NotThereError
from mismatch_probe.engines.base import RolloutEngine
from mismatch_probe.engines.checkpoint import read_config
from mismatch_probe.engines.logprobs import Batch
from mismatch_probe.errors import EngineError
from mismatch_probe.rl.config import RlConfig
from mismatch_probe.types import Rollout, RolloutRequest, Sampling

LEAVE_OUT = "Leave --remedy out."


class TrainerRouters:
    """The routers of a trainer's model, watched and, where the run asks for it, made to follow the rollout.

    Args:
        model: What computes, of transformers.
        routers: What its `config.json` says of them.
        replay: Whether they follow.

    Raises:
        NotThereError: They are built in a way that is not known.
    """

    def __init__(self, model: Any, routers: Routers, *, replay: bool) -> None:
        self.routers, self.replay = routers, replay
        self._routing = Routing(model, routers.chosen)
        self._try_out(model)

    @classmethod
    def of(cls, model: Any, config: RlConfig, path: str | Path) -> TrainerRouters | None:
        """Those of a run; None where the model is dense, or its routes cannot be had.

        Args:
            model: What computes, of transformers.
            config: Of the run.
            path: The checkpoint's folder.

        Raises:
            EngineError: The run is to replay routes, and they cannot be replaced.
        """
        about = read_config(path)
        if why_no_routes(about) or not registry.find(config.rollout_engine).shows_inside:
            return None
        replay = config.remedy == "routing-replay"
        try:
            return cls(model, Routers.of(about), replay=replay)
        except NotThereError as error:
            if replay:
                raise EngineError(f"The trainer cannot replay routes: {error}.", LEAVE_OUT) from None
            return None

    @contextmanager
    def following(self, batch: Batch) -> Iterator[None]:
        """A forward pass of a batch."""
        if batch.routes is None:
            yield
            return
        layers = self._routing.layers
        wanted = dict(zip(layers, batch.routes.flatten(1, 2), strict=True))
        self._routing.choose(wanted if self.replay else {})
        with self._routing.watching():
            yield

    def chosen(self, batch: Batch) -> torch.Tensor:
        """`[M, B, L, K]` what they chose by themselves in the last pass, which was of this batch."""
        seen = self._routing.seen
        return torch.stack([seen[layer].reshape(*batch.ids.shape, -1) for layer in self._routing.layers])

    @torch.no_grad()
    def _try_out(self, model: Any) -> None:
        """A pass of two tokens in which they are replaced by themselves: shows whether that can be done at all."""
        ids = torch.zeros((1, 2), dtype=torch.long, device=model.device)
        unknown = torch.full((2, self.routers.chosen), UNKNOWN, device=model.device)
        self._routing.choose(dict.fromkeys(self._routing.layers, unknown))
        with self._routing.watching():
            model(ids, use_cache=False)


def sample(
    engine: RolloutEngine, requests: Sequence[RolloutRequest], sampling: Sampling, routers: TrainerRouters | None
) -> list[Rollout]:
    """Samples, with routes where there are routers.

    Raises:
        EngineError: Routes are to be replayed, and the engine's routers cannot be seen.
    """
    if routers is None:
        return engine.generate(requests, sampling, lambda _: None)
    found = engine.generate_routed(requests, sampling, lambda _: None, routers.routers)
    if routers.replay and any(rollout.routes is None for rollout in found):
        raise EngineError("The rollout engine ran no router that can be seen, so nothing can be replayed.", LEAVE_OUT)
    return found


def with_routes(batch: Batch, rollouts: Sequence[Rollout]) -> Batch:
    """The batch with the routes of its sequences, where those of all have been kept."""
    routes = [rollout.routes for rollout in rollouts if rollout.routes is not None]
    return replace(batch, routes=padded_routes(routes, batch.ids.device)) if len(routes) == len(rollouts) else batch


class Agreement:
    """How often the trainer's routers chose, by themselves, the experts of the rollout for the step that predicts a
    response token.
    """

    def __init__(self) -> None:
        self._n = torch.zeros(4, dtype=torch.long)

    def add(self, batch: Batch, routers: TrainerRouters | None) -> None:
        """Counts a batch that has just been scored."""
        if batch.routes is None or routers is None:
            return
        at = batch.first[:, None] - 1 + torch.arange(batch.mask.shape[1], device=batch.ids.device)
        sequence = torch.arange(len(at), device=at.device)[:, None]
        rows = at.clamp(max=batch.ids.shape[1] - 1)
        theirs, ours = (side[:, sequence, rows] for side in (batch.routes, routers.chosen(batch)))
        known = (theirs != UNKNOWN).all(-1) & batch.mask
        apart = known & ~same_experts(theirs, ours)
        self._n += torch.stack([known.sum(), apart.sum(), batch.mask.sum(), apart.any(0).sum()]).cpu()

    def columns(self) -> dict[str, float | None]:
        """`router_agreement`, the fraction of pairs of token and layer with the same experts, and
        `router_flipped_tokens`, that of tokens for which some layer has others; None where nothing was compared.
        """
        known, apart, tokens, flipped = self._n.tolist()
        return {
            "router_agreement": 1 - apart / known if known else None,
            "router_flipped_tokens": flipped / tokens if known else None,
        }
