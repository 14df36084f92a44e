"""Plants a known mismatch between two checkpoints, runs both engines, and computes independently what must come out.

Shape legend: `N` response tokens of all sequences, in order; `V` vocabulary.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp

from mismatch_probe.engines.base import Capture, ExactPosition, RolloutJob, TrainerJob
from mismatch_probe.engines.hf.engine import HfTrainer
from mismatch_probe.engines.process import EngineProcess
from mismatch_probe.engines.rows import RowFile, stacked
from mismatch_probe.engines.vllm.settings import rollout_settings
from mismatch_probe.metrics.exact import ExactRows
from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.workers import Collected, drive
from mismatch_probe.types import DIVERGENCES, MetricValue, PairArrays, Rollout, RolloutRequest, Sampling, ScoreRequest
from tests.conftest import network
from tests.real.tiny import VOCABULARY

PROMPTS, PROMPT_TOKENS, MAX_TOKENS = 96, 6, 24
Floats = NDArray[np.float64]
Weights = dict[str, torch.Tensor]
Hook = Callable[[torch.Tensor], torch.Tensor]


def change_weights(source: Path, folder: Path, change: Callable[[Weights], None]) -> Path:
    """A copy of a checkpoint whose FP32 weights `change` has altered in place."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@dataclass(frozen=True)
class Sampled:
    """What vLLM sampled from a checkpoint, with the rows of logits of every token."""

    checkpoint: Path
    rows: Path
    requests: list[RolloutRequest]
    rollouts: list[Rollout]

    @property
    def sequences(self) -> list[ScoreRequest]:
        return [
            ScoreRequest(r.sequence_id, r.prompt_token_ids, [int(token) for token in o.response_token_ids])
            for r, o in zip(self.requests, self.rollouts, strict=True)
        ]

    @property
    def tokens(self) -> NDArray[np.int64]:
        """`[N]` token ids."""
        return np.concatenate([s.response_token_ids for s in self.sequences])

    @property
    def logprobs(self) -> Floats:
        """`[N]` b, nats."""
        return np.concatenate([np.asarray(o.logprobs, np.float64) for o in self.rollouts])


def decode(checkpoint: Path, requests: list[RolloutRequest], log: Path, **options: Any) -> Collected:
    """One start of vLLM in FP32 in a process of its own: everything at once, then what `self_noise_tokens` repeats."""
    settings = rollout_settings("cpu", "float32", eager=True, in_process=True, kv_cache_gib=1)
    job = RolloutJob(
        engine="vllm",
        model_path=str(checkpoint),
        dtype="float32",
        device="cpu",
        sampling=Sampling(MAX_TOKENS),
        requests=requests,
        batch=len(requests),
        self_noise_tokens=options.pop("self_noise_tokens", 0),
        max_model_len=PROMPT_TOKENS + MAX_TOKENS,
        arguments=settings.arguments,
        **options,
    )
    return drive(EngineProcess("vllm", settings.environment, log), "rollout", job, Progress())


def sample(checkpoint: Path, folder: Path) -> Sampled:
    """Samples a response to each of `PROMPTS` random prompts."""
    prompts = np.random.default_rng(7).integers(4, VOCABULARY, (PROMPTS, PROMPT_TOKENS)).tolist()
    requests = [RolloutRequest(i, prompt, 1000 + i) for i, prompt in enumerate(prompts)]
    rows = folder / "rows"
    found = decode(checkpoint, requests, folder / "vllm.log", capture=Capture(str(rows), PROMPTS * MAX_TOKENS))
    return Sampled(checkpoint, rows, requests, found.rollouts)


@dataclass(frozen=True)
class Measured:
    """What the tool says of a sample against a trainer's checkpoint.

    Attributes:
        log_ratio: `[N]` d, nats.
        metrics: The catalog.
    """

    log_ratio: Floats
    metrics: dict[str, MetricValue]

    def value(self, key: str) -> float:
        found = self.metrics[key].value
        assert found is not None, f"{key}: {self.metrics[key].why}"
        return found


def measure(sampled: Sampled, trainer: Path, hook: Hook | None = None) -> Measured:
    """Scores a sample with the trainer engine in FP32 and computes every metric.

    Args:
        sampled: The rollouts.
        trainer: The trainer's checkpoint.
        hook: Applied to what each decoder layer puts out.
    """
    kept = RowFile(sampled.rows).kept
    exact: dict[int, list[ExactPosition]] = {}
    for row in kept:
        position = ExactPosition(0, row.sequence_id, row.position, row.slot, row.weight, row.stands_for)
        exact.setdefault(row.sequence_id, []).append(position)
    wanted = sampled.sequences
    job = TrainerJob(
        engine="hf",
        model_path=str(trainer),
        dtype="float32",
        mode="cast",
        layout="padded",
        attention=None,
        device="cpu",
        temperature=1.0,
        requests=wanted,
        self_noise_sequences=0,
        memory_budget=1 << 28,
        exact_sources=[str(sampled.rows)],
        exact=exact,
    )
    engine = HfTrainer(job)
    _hook_layers(network(engine), hook)
    scores = {s.sequence_id: s for batch in engine.plan(wanted) for s in engine.score(batch, 1.0, exact=True)}
    engine.close()
    lengths = [len(s.response_token_ids) for s in wanted]
    pair = PairArrays(
        rollout_logprob=sampled.logprobs,
        trainer_logprob=np.concatenate([np.asarray(scores[s.sequence_id].logprobs, np.float64) for s in wanted]),
        sequence=np.repeat(np.arange(len(wanted)), lengths),
        position=np.concatenate([np.arange(length) for length in lengths]),
        prompt=np.arange(len(wanted)),
        prompt_ids=tuple(f"p{s.sequence_id}" for s in wanted),
    )
    columns = stacked([part for score in scores.values() if (part := score.exact) is not None])
    assert columns is not None
    assert len(columns["kl"]) == sum(lengths)
    rows = ExactRows(
        values={name: columns[name] for name in DIVERGENCES},
        weight=columns["weight"],
        stands_for=columns["stands_for"],
        prompt=columns["sequence_id"],
        tokens=np.array(lengths, np.float64),
        sequences=np.ones(len(wanted)),
        drift_square=columns["drift_square"],
        drift_sketch=columns["drift_sketch"],
    )
    return Measured(pair.trainer_logprob - pair.rollout_logprob, compute_metrics(pair, rows))


@torch.inference_mode()
def float64_rows(checkpoint: Path, sequences: Sequence[ScoreRequest], hook: Hook | None = None) -> Floats:
    """`[N, V]` log softmax by plain transformers in float64, one sequence at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64, attn_implementation="eager").eval()
    _hook_layers(model, hook)
    rows = []
    for sequence in sequences:
        ids = [*sequence.prompt_token_ids, *sequence.response_token_ids]
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        rows.append(logprobs[len(sequence.prompt_token_ids) - 1 : -1].numpy())
    return np.concatenate(rows)


def _hook_layers(model: Any, hook: Hook | None) -> None:
    def replace(_: Any, __: Any, output: Any) -> Any:
        assert hook is not None
        return (hook(output[0]), *output[1:]) if isinstance(output, tuple) else hook(output)

    if hook is not None:
        for layer in model.get_decoder().h:
            layer.register_forward_hook(replace)


@dataclass(frozen=True)
class Truth:
    """What a pair's metrics converge to where these tokens' prefixes stand, nats; means over positions.

    `log_ratio` `[N]` is d of the tokens that were sampled; everything else is an expectation over the token.
    """

    log_ratio: Floats
    mean_abs: float
    k2: float
    kl: float
    kl_reverse: float
    tv: float
    chi2: float
    drift: float
    mean_ratio: float = 1.0

    @classmethod
    def of_tilt(cls, log_mu: Floats, h: Floats, tokens: NDArray[np.int64]) -> Truth:
        """For π ∝ μ·exp(h) in closed form: with ψ(s) = log E_μ[exp(s·h)] d is h − ψ(1), KL(μ‖π) is ψ(1) − E_μ[h],
        KL(π‖μ) is E_π[h] − ψ(1), and χ² is exp(ψ(2) − 2ψ(1)) − 1 (exponential tilting, e.g. Esscher 1932).

        Args:
            log_mu: `[N, V]`
            h: `[N, V]`, or `[V]` where it is the same at every position.
            tokens: `[N]`
        """
        h = np.broadcast_to(h, log_mu.shape)
        first, second = logsumexp(log_mu + h, axis=1), logsumexp(log_mu + 2 * h, axis=1)
        mu, d = np.exp(log_mu), h - first[:, None]
        pi = np.exp(log_mu + d)
        return cls(
            log_ratio=d[np.arange(len(tokens)), tokens],
            mean_abs=float((mu * np.abs(d)).sum(1).mean()),
            k2=float((0.5 * mu * d**2).sum(1).mean()),
            kl=float((first - (mu * h).sum(1)).mean()),
            kl_reverse=float(((pi * h).sum(1) - first).mean()),
            tv=float(0.5 * np.abs(pi - mu).sum(1).mean()),
            chi2=float(np.expm1(second - 2 * first).mean()),
            drift=float(np.linalg.norm((mu - pi).mean(0)) / np.sqrt(((mu - pi) ** 2).sum(1).mean())),
        )
