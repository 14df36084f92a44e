"""Jobs of the RL tests that run in an engine's own process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.engines import registry
from mismatch_probe.engines.base import Channel, RolloutJob
from mismatch_probe.engines.devices import Device
from mismatch_probe.engines.events import Event
from mismatch_probe.errors import EngineError
from mismatch_probe.types import Dtype, RolloutRequest, Sampling


def engine_job(model_path: str, dtype: Dtype, device: Device = "cpu", engine: str = "vllm") -> RolloutJob:
    """A rollout engine as an RL run starts it."""
    settings = registry.find(engine).rollout_settings(
        device, dtype, eager=True, in_process=True, kv_cache_gib=1, beside_trainer=0.4
    )
    return RolloutJob(
        engine=engine,
        model_path=model_path,
        dtype=dtype,
        device=device,
        sampling=Sampling(16),
        requests=(),
        batch=16,
        self_noise_tokens=0,
        max_model_len=64,
        logit_noise=True,
        arguments=settings.arguments,
    )


@dataclass(frozen=True)
class Said(Event):
    """What the check of a sync said of a checkpoint, by fault."""

    folder: str
    texts: Mapping[str, str]


class Tampering:
    """An engine that gets other weights than it is sent; `had` are those that it was sent before."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.tamper: Callable[[dict[str, Any]], dict[str, Any]] = lambda weights: weights
        self.had: dict[str, Any] = {}

    def load_weights(self, weights: Iterable[tuple[str, Any]]) -> None:
        given = dict(weights)
        changed = self.tamper(given)
        if changed:
            self._engine.load_weights(changed.items())
        self.had = given

    def hold_back(self, part: str) -> None:
        """From now on tensors with that in their name stay as they are."""
        self.tamper = lambda weights: weights | {name: old for name, old in self.had.items() if part in name}

    def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        found: list[NDArray[np.float32]] = self._engine.score(sequences)
        return found


@dataclass(frozen=True)
class SyncFaultsJob:
    """Syncs changed weights, well and with every fault, and sends what the check said, by fault."""

    model_path: str
    dtype: Dtype
    step_size: float
    device: Device = "cpu"
    trust_remote_code: bool = False
    subject: str = "The sync test"
    memory_advice: str = ""

    def run(self, channel: Channel) -> None:
        import torch

        from mismatch_probe.engines.vllm.engine import VllmRollout
        from mismatch_probe.rl.config import RlConfig
        from mismatch_probe.rl.policy import Policy
        from mismatch_probe.rl.sync import WeightSync

        engine = Tampering(VllmRollout(engine_job(self.model_path, self.dtype, self.device)))
        config = RlConfig(trainer_dtype="float32", rollout_dtype=self.dtype)
        policy = Policy(self.model_path, config, torch.device(self.device))
        draw = torch.Generator().manual_seed(1)
        probes = torch.randint(4, 100, (8, 24), generator=draw).tolist()
        sync = WeightSync(engine, policy, self.dtype, probes, check=True, fresh=True, scan_every=1)

        def move() -> None:
            with torch.no_grad():
                for parameter in policy.model.parameters():
                    parameter.add_(self.step_size * torch.randn(parameter.shape, generator=draw).to(parameter))

        victim = "model.layers.1.mlp.down_proj.weight"
        faults: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "none": lambda weights: weights,
            "stale": lambda weights: {},
            "partial": lambda weights: weights | {victim: engine.had[victim]},
            "missing": lambda weights: {k: v for k, v in weights.items() if k != victim},
            "tied": lambda weights: {k: v for k, v in weights.items() if k != "lm_head.weight"},
            "cast": lambda weights: {k: v.to(torch.bfloat16).to(v.dtype) for k, v in weights.items()},
        }
        said: dict[str, str] = {}
        for name, tamper in faults.items():
            move()
            engine.tamper = tamper
            try:
                said[name] = f"gap {sync.send(policy.weights()).gap}"
            except EngineError as error:
                said[name] = error.what
            engine.tamper = faults["none"]
            with torch.no_grad():
                sync.resend(policy.weights())
        try:
            sync.send({k: v for k, v in policy.weights().items() if k != "lm_head.weight"})
        except EngineError as error:
            said["names"] = error.what
        channel.send(Said("", said))


@dataclass(frozen=True)
class FamiliesJob:
    """Starts an engine for one checkpoint after another, syncs weights that have changed, then the same with experts
    that stay behind, and sends what the check said, by the checkpoint's folder and the sync.
    """

    folders: Sequence[str]
    dtype: Dtype
    step_size: float
    trust_remote_code: bool = False
    subject: str = "The family"
    memory_advice: str = ""

    @property
    def model_path(self) -> str:
        return self.folders[0]

    def run(self, channel: Channel) -> None:
        import torch

        from mismatch_probe.engines.vllm.engine import VllmRollout
        from mismatch_probe.rl.config import RlConfig
        from mismatch_probe.rl.policy import Policy
        from mismatch_probe.rl.sync import WeightSync

        config = RlConfig(trainer_dtype="float32", rollout_dtype=self.dtype)
        for folder in self.folders:
            vllm, draw = VllmRollout(engine_job(folder, self.dtype)), torch.Generator().manual_seed(1)
            engine, probes = Tampering(vllm), torch.randint(4, 100, (8, 24), generator=draw).tolist()
            said: dict[str, str] = {}
            with vllm.configured():
                policy = Policy(folder, config, torch.device("cpu"))
            try:
                sync = WeightSync(engine, policy, self.dtype, probes, check=True, fresh=True)
                for name in ("well", "experts left behind"):
                    with torch.no_grad():
                        for parameter in policy.model.parameters():
                            parameter.add_(self.step_size * torch.randn(parameter.shape, generator=draw))
                    said[name] = f"gap {sync.send(policy.weights()).gap}"
                    engine.hold_back(".experts.")
            except EngineError as error:
                said["refused" if not said else "experts left behind"] = error.what
            channel.send(Said(folder, said))
            vllm.close()


@dataclass(frozen=True)
class RoutesSaid(Event):
    """What an engine and a trainer did with the routes of sampled tokens.

    Attributes:
        same_bits: Whether sampling is the same with routes kept.
        decode: Fraction of known pairs of token and layer whose experts are those of a prefill of the same tokens.
        known: Fraction of all pairs, the last token's apart, whose route is known.
        columns: Of the steps table, by remedy.
        rms: RMS of d, nats, by remedy.
        applied: Fraction of known pairs that went to the engine's experts in the replay.
    """

    same_bits: bool
    decode: float
    known: float
    columns: Mapping[str, Mapping[str, float | None]]
    rms: Mapping[str, float]
    applied: float


@dataclass(frozen=True)
class RoutesJob:
    """Samples from a mixture with its routes, scores it with both remedies, and says what it saw."""

    model_path: str
    dtype: Dtype
    trainer_mode: str
    trust_remote_code: bool = False
    subject: str = "The routes"
    memory_advice: str = ""

    def run(self, channel: Channel) -> None:
        import torch

        from mismatch_probe.engines.attribute.trace import Routers
        from mismatch_probe.engines.checkpoint import read_config
        from mismatch_probe.engines.logprobs import Batch
        from mismatch_probe.engines.vllm.engine import VllmRollout
        from mismatch_probe.rl.config import RlConfig
        from mismatch_probe.rl.policy import Policy
        from mismatch_probe.rl.routing import Agreement, with_routes

        job = engine_job(self.model_path, self.dtype)
        engine = VllmRollout(replace(job, logit_noise=False, max_model_len=256))
        draw = np.random.default_rng(0)
        # The second is longer than a block of the cache, which the others of its group then take it from.
        prompts = [draw.integers(3, 128, length).tolist() for length in (6, 150, 20)]
        requests = [RolloutRequest(i, prompts[i % 3], i, ()) for i in range(24)]
        sampling, routers = Sampling(48), Routers.of(read_config(self.model_path), most_tokens=4096)
        plain = engine.generate(requests, sampling, lambda _: None)
        found = engine.generate_routed(requests, sampling, lambda _: None, routers)
        responses = [[int(token) for token in rollout.response_token_ids] for rollout in found]
        sequences = [[*request.prompt_token_ids, *ids] for request, ids in zip(requests, responses, strict=True)]
        prefill, ends = engine.routes(sequences, routers).experts, np.cumsum([len(ids) for ids in sequences])
        decoded = np.delete(np.concatenate([r.routes for r in found if r.routes is not None], 1), ends - 1, 1)
        prefilled = np.delete(prefill, ends - 1, 1)
        both = (decoded >= 0).all(2) & (prefilled >= 0).all(2)
        batch = Batch.of([list(r.prompt_token_ids) for r in requests], responses, torch.device("cpu"))
        batch, rollout = with_routes(batch, found), np.concatenate([r.logprobs for r in found])
        columns, rms, applied = {}, {}, 0.0
        for remedy in ("none", "routing-replay"):
            config = RlConfig.of({"trainer_dtype": self.dtype, "trainer_mode": self.trainer_mode, "remedy": remedy})
            policy, agreement, sent = Policy(self.model_path, config, torch.device("cpu")), Agreement(), []
            computing = policy._compute
            for layer in computing.model.layers:
                layer.mlp.experts.register_forward_pre_hook(lambda _, args, sent=sent: sent.append(args[1]))
            with torch.no_grad():
                logprobs = policy.logprobs(batch)[0][batch.mask].double().numpy()
            agreement.add(batch, policy.routers)
            columns[remedy], rms[remedy] = agreement.columns(), float(np.sqrt(np.mean((logprobs - rollout) ** 2)))
            assert batch.routes is not None
            theirs, ours = batch.routes.flatten(1, 2).sort(-1).values, torch.stack(sent).sort(-1).values
            known = (theirs >= 0).all(-1)
            # Left with that of the last remedy, the replay.
            applied = float((theirs == ours).all(-1)[known].double().mean())
        channel.send(
            RoutesSaid(
                same_bits=all(
                    np.array_equal(a.response_token_ids, b.response_token_ids)
                    and np.array_equal(a.logprobs, b.logprobs)
                    for a, b in zip(plain, found, strict=True)
                ),
                decode=float((np.sort(decoded) == np.sort(prefilled)).all(2)[both].mean()),
                known=float((decoded >= 0).all(2).mean()),
                columns=columns,
                rms=rms,
                applied=applied,
            )
        )
