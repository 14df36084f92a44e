"""Routers of a mixture in an RL run: replayed routes and their gradients, agreement, and what is refused.

Shape legend: `B` sequences, `L` tokens of the longest with its prompt, `T` response tokens of the longest, `M` layers
with a router, `K` experts of a token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from mismatch_probe.engines.attribute import changes
from mismatch_probe.engines.attribute.trace import Routers
from mismatch_probe.engines.attribute.variants import UNKNOWN
from mismatch_probe.engines.hf.rollout import HfRollout
from mismatch_probe.engines.logprobs import Batch
from mismatch_probe.engines.models import resolve
from mismatch_probe.engines.patching import replaced_forward
from mismatch_probe.errors import EngineError, UsageError
from mismatch_probe.report.render.html import html_page
from mismatch_probe.report.rl_run import rl_run_report
from mismatch_probe.rl.config import RlConfig
from mismatch_probe.rl.loop import Training
from mismatch_probe.rl.policy import Policy
from mismatch_probe.rl.routing import Agreement, TrainerRouters, sample
from mismatch_probe.rl.run import check_remedy, run_data
from mismatch_probe.rl.summary import summarise
from mismatch_probe.types import Rollout, RolloutRequest, Sampling
from tests.rl.loops import JOB, pieces

CPU = torch.device("cpu")
EXPERTS, CHOSEN, LAYERS = 4, 2, 2
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
RESPONSES = [[20, 21], [22, 23, 24, 25, 26], [27]]
TOKENS = sum(map(len, RESPONSES))
REPLAY = {"remedy": "routing-replay"}
MODES: dict[str, dict[str, Any]] = {
    "fp32": {"trainer_dtype": "float32"},
    "bf16-autocast": {"trainer_dtype": "bfloat16"},
    "bf16-cast": {"trainer_dtype": "bfloat16", "trainer_mode": "cast"},
    "fp16-autocast": {"trainer_dtype": "float16", "initial_loss_scale": 64.0},
}


def _policy(checkpoint: Path, **options: Any) -> Policy:
    return Policy(str(checkpoint), RlConfig.of({"trainer_dtype": "float32"} | options), CPU)


def _routers(policy: Policy) -> TrainerRouters:
    assert policy.routers is not None
    return policy.routers


def _batch() -> Batch:
    return Batch.of(PROMPTS, RESPONSES, CPU)


def _unknown(batch: Batch) -> Batch:
    return replace(batch, routes=torch.full((LAYERS, *batch.ids.shape, CHOSEN), UNKNOWN))


def _own(policy: Policy) -> Batch:
    """The batch with the routes that the trainer takes by itself."""
    batch = _unknown(_batch())
    policy.logprobs(batch)
    return replace(batch, routes=_routers(policy).chosen(batch))


def _step(policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """`[B, T]` log-probs, 0 where there is no token, and the gradients of their sum."""
    logprobs, _ = policy.logprobs(batch)
    kept = torch.where(batch.mask, logprobs, 0.0)
    policy.backward(kept.sum())
    gradients = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.drop_gradients()
    return kept.detach(), gradients


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["likeliest-first", "otherwise"])
@pytest.mark.parametrize("mode", MODES)
def test_own_routes_change_no_bit_of_log_probs_and_gradients(mixture: Path, mode: str, order: tuple[int, int]) -> None:
    policy = _policy(mixture, **MODES[mode], **REPLAY)
    plain, gradients = _step(policy, _batch())
    own = _own(policy)
    assert own.routes is not None
    replayed, again = _step(policy, replace(own, routes=own.routes[..., order]))
    assert torch.equal(plain, replayed)
    assert gradients.keys() == again.keys()
    assert all(torch.equal(gradients[name], again[name]) for name in gradients)


def _by_hand(model: Any, routes: Tensor) -> list[Callable[..., Tensor]]:
    """Forwards of the model's mixtures, every expert on every token, for routes `[M, B, L, K]`."""

    def forward(block: Any, chosen: Tensor) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            probabilities = (x @ block.gate.weight.T).softmax(-1)
            weights = probabilities * torch.nn.functional.one_hot(chosen, EXPERTS).sum(-2)
            weights = weights / weights.sum(-1, keepdim=True)
            outputs = []
            for expert in range(EXPERTS):
                gate, up = (x @ block.experts.gate_up_proj[expert].T).chunk(2, -1)
                outputs.append(silu(gate) * up @ block.experts.down_proj[expert].T)
            return (torch.stack(outputs, -1) * weights[..., None, :]).sum(-1)

        return call

    return [forward(layer.mlp, routes[k]) for k, layer in enumerate(model.model.layers)]


def test_other_routes_are_a_forward_pass_by_hand_with_its_gradients(mixture: Path) -> None:
    policy = _policy(mixture, **REPLAY)
    plain, _ = _step(policy, _batch())
    own = _own(policy)
    assert own.routes is not None
    other = (own.routes + 1) % EXPERTS
    replayed, gradients = _step(policy, replace(own, routes=other))
    assert (plain - replayed).abs().max() > 0.01
    first, second = _by_hand(policy.model, other)
    layers = policy.model.model.layers
    with replaced_forward(layers[0].mlp, first), replaced_forward(layers[1].mlp, second):
        expected, theirs = _step(policy, _batch())
    torch.testing.assert_close(replayed, expected, atol=2e-5, rtol=1e-5)
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-4, rtol=1e-3)
    assert all(gradients[f"model.layers.{k}.mlp.gate.weight"].abs().max() > 1e-3 for k in range(LAYERS))


def test_a_token_of_unknown_route_keeps_its_own(mixture: Path) -> None:
    policy = _policy(mixture, **REPLAY)
    plain, _ = _step(policy, _batch())
    kept, _ = _step(policy, _unknown(_batch()))
    assert torch.equal(plain, kept)


def test_without_the_remedy_routes_are_only_compared(mixture: Path) -> None:
    policy = _policy(mixture)
    plain, _ = _step(policy, _batch())
    own = _own(policy)
    assert own.routes is not None
    watched, _ = _step(policy, replace(own, routes=(own.routes + 1) % EXPERTS))
    assert torch.equal(plain, watched)


def test_agreement_counts_the_steps_that_predict_response_tokens(mixture: Path) -> None:
    policy = _policy(mixture)
    own = _own(policy)
    assert own.routes is not None
    shifted = (own.routes + 1) % EXPERTS

    def columns(*places: tuple[int, int, int]) -> tuple[float | None, float | None]:
        """Of routes that differ at places of layer, sequence and token."""
        assert own.routes is not None
        routes, agreement = own.routes.flip(-1), Agreement()
        for place in places:
            routes[place] = shifted[place]
        batch = replace(own, routes=routes)
        policy.logprobs(batch)
        agreement.add(batch, policy.routers)
        found = agreement.columns()
        return found["router_agreement"], found["router_flipped_tokens"]

    pairs = LAYERS * TOKENS
    assert columns() == (1, 0)
    # The prompt before its last token, the last token sampled, the padding.
    assert columns((0, 0, 1), (1, 0, 4), (0, 0, 5), (1, 1, 5)) == (1, 0)
    assert columns((0, 0, 2)) == (1 - 1 / pairs, 1 / TOKENS)
    assert columns((0, 1, 4), (1, 1, 4), (1, 2, 4)) == (1 - 3 / pairs, 2 / TOKENS)
    routes = own.routes.clone()
    routes[0, 0, 2] = UNKNOWN
    routes[1, 0, 2] = shifted[1, 0, 2]
    agreement = Agreement()
    for batch in (replace(own, routes=routes), replace(own, routes=None)):
        policy.logprobs(batch)
        agreement.add(batch, policy.routers)
    assert agreement.columns() == {"router_agreement": 1 - 1 / (pairs - 1), "router_flipped_tokens": 1 / TOKENS}
    assert Agreement().columns() == {"router_agreement": None, "router_flipped_tokens": None}


class _Routed(HfRollout):
    """Keeps the routes of a pass over what it has sampled, in layer 0 by `shift` experts on."""

    def __init__(self, checkpoint: Path, shift: int) -> None:
        super().__init__(replace(JOB, model_path=str(checkpoint)))
        self._shift = shift

    def generate_routed(
        self,
        requests: Sequence[RolloutRequest],
        sampling: Sampling,
        on_tokens: Callable[[int], None],
        routers: Routers,
    ) -> list[Rollout]:
        assert routers == Routers(LAYERS, EXPERTS, CHOSEN)
        found = self.generate(requests, sampling, on_tokens)
        return self.run_on_model(
            lambda model: [self._with_routes(model, q, r) for q, r in zip(requests, found, strict=True)]
        )

    @torch.no_grad()
    def _with_routes(self, model: Any, request: RolloutRequest, rollout: Rollout) -> Rollout:
        routing = changes.Routing(model, CHOSEN)
        with routing.watching():
            model(torch.tensor([[*request.prompt_token_ids, *map(int, rollout.response_token_ids)]]))
        routes = torch.stack([routing.seen[layer] for layer in routing.layers]).short()
        routes[0] = (routes[0] + self._shift) % EXPERTS
        routes[:, -1] = UNKNOWN
        return replace(rollout, routes=routes.numpy())


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("remedy", ["none", "routing-replay"])
def test_a_run_on_a_mixture_shows_agreement_and_replays(mixture: Path, tmp_path: Path, remedy: str, shift: int) -> None:
    made = pieces(tmp_path / "run", _Routed(mixture, shift), remedy=remedy, steps=2)
    parts = replace(made, source=mixture, decode=lambda ids: "".join(map(chr, ids)), end_ids=[2])
    parts.directory.finish(Training(parts).run())
    steps = parts.directory.steps()
    # By two of four experts on the two that were chosen can be chosen again.
    assert ((steps["router_agreement"] == 1) if shift == 0 else steps["router_agreement"].between(0.5, 0.9)).all()
    assert ((steps["router_flipped_tokens"] == 0) == (shift == 0)).all()
    moved = steps["mean_abs_logprob_diff"] > 1e-3
    assert (moved == (shift != 0 and remedy != "none")).all()
    summary = summarise(steps, parts.config)
    assert summary.end is not None
    assert summary.end.router_agreement == pytest.approx(steps["router_agreement"].iloc[-1])
    assert "routers that choose the same experts" in html_page(rl_run_report(run_data(parts.directory, steps)), {})


@pytest.mark.parametrize(
    ("options", "about", "why"),
    [
        ({}, {"num_experts": 0, "num_local_experts": 0}, "the model has no routers"),
        ({}, {"n_group": 4}, "choose by more than their logits"),
        ({"rollout_engine": "hf"}, {}, "the engine hf does not show its routers"),
    ],
)
def test_replay_is_refused_before_a_run_begins(
    mixture: Path, tmp_path: Path, options: dict[str, Any], about: dict[str, Any], why: str
) -> None:
    config = json.loads((mixture / "config.json").read_text()) | about
    model = replace(resolve(str(mixture)), config=config)
    check_remedy(RlConfig.of(options), model)
    with pytest.raises(UsageError, match=f"--remedy routing-replay is impossible here: .*{why}"):
        check_remedy(RlConfig.of(options | REPLAY), model)
    check_remedy(RlConfig.of(REPLAY), resolve(str(mixture)))


def test_a_router_that_is_built_otherwise_is_left_alone_or_refused(
    mixture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "_RULES", changes._RULES[:1])  # this one normalises
    assert _policy(mixture).routers is None
    with pytest.raises(EngineError, match="cannot replay routes: the router's weighting"):
        _policy(mixture, **REPLAY)


def test_a_dense_model_has_no_routers(tied: Path) -> None:
    assert _policy(tied).routers is None


def test_an_engine_without_routers_says_so(mixture: Path) -> None:
    engine = HfRollout(replace(JOB, model_path=str(mixture)))
    with pytest.raises(EngineError, match="does not show its routers"):
        engine.generate_routed([], Sampling(4), lambda _: None, Routers(LAYERS, EXPERTS, CHOSEN))


def test_routes_that_are_not_there_are_not_replayed(mixture: Path) -> None:
    class Blind(HfRollout):
        def generate_routed(self, requests: Any, sampling: Any, on_tokens: Any, routers: Routers) -> list[Rollout]:
            return self.generate(requests, sampling, on_tokens)

    engine, requests = Blind(replace(JOB, model_path=str(mixture))), [RolloutRequest(0, [5, 6], 0, ())]
    (seen,) = sample(engine, requests, Sampling(2), _routers(_policy(mixture)))
    assert seen.routes is None
    with pytest.raises(EngineError, match="nothing can be replayed"):
        sample(engine, requests, Sampling(2), _routers(_policy(mixture, **REPLAY)))


def test_the_closest_rule_is_a_routers_own() -> None:
    """Nearly certain routers: within the tolerance of 16 bits are two rules."""
    logits = torch.tensor([[9.0, 5.0, 0.0, 0.0]])
    indices = torch.tensor([[0, 1]])
    for rule in changes._RULES[:2]:
        weights = rule(logits, indices).bfloat16()
        found = changes._rule(logits, weights, indices)
        assert torch.equal(found(logits, indices).bfloat16(), weights)


def test_routes_are_padded_on_the_right() -> None:
    routes = [np.arange(4, dtype=np.int16).reshape(1, 2, 2), np.array([[[7, 8]]], np.int16)]
    assert changes.padded_routes(routes, CPU).tolist() == [[[[0, 1], [2, 3]], [[7, 8], [UNKNOWN, UNKNOWN]]]]
