"""Sampling for a sanity set, in a process of its own: chunk after chunk, each graded and stored as it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa

from mismatch_probe.engines import devices, registry
from mismatch_probe.engines.base import Channel, RolloutEngine, RolloutJob
from mismatch_probe.engines.events import Advance, Identity, Listener, Total
from mismatch_probe.rl.config import SanityConfig
from mismatch_probe.rl.sanity.records import SanityDirectory
from mismatch_probe.rl.tasks import Response
from mismatch_probe.rl.worker import MOST_AT_ONCE, Setup
from mismatch_probe.types import Rollout, RolloutRequest, Sampling


@dataclass(frozen=True)
class SanityJob:
    """Samples what is missing in a folder.

    Attributes:
        folder: With its `config.json`.
        model_path: Folder of the model.
        device: `cpu` or `cuda`.
    """

    folder: str
    model_path: str
    device: devices.Device
    trust_remote_code: bool = False
    subject: ClassVar[str] = "Sampling for the sanity set"
    memory_advice: ClassVar[str] = "Lower --max-tokens, or use a machine with more memory."

    def run(self, channel: Channel) -> None:
        """Sends `Identity`, `Total` and `Advance` in tokens."""
        directory = SanityDirectory.open(Path(self.folder))
        setup = Setup.of(directory.config, self.model_path)
        try:
            directory.fix_problems(setup.problems)
            with _engine_job(directory.config, self, max(map(len, setup.prompts))).started() as engine:
                channel.phase("load")
                channel.send(Identity(engine.identity() | devices.running()))
                sample(directory, setup, engine, channel.send)
                channel.phase("generate")
        finally:
            setup.task.close()


def settings_of(config: SanityConfig, device: devices.Device) -> devices.EngineSettings:
    """Arguments and environment of the engine, which has the device to itself."""
    return registry.find(config.rollout_engine).rollout_settings(
        device, config.rollout_dtype, eager=False, in_process=True, kv_cache_gib=config.kv_cache_gib
    )


def sample(directory: SanityDirectory, setup: Setup, engine: RolloutEngine, send: Listener) -> None:
    """Samples, grades and stores every chunk that is missing. A response's seed follows from the run's seed, its
    problem and its number, so a resumed run draws what an uninterrupted one would.
    """
    config, n = directory.config, directory.config.n_samples
    sampling = Sampling(config.max_tokens, config.temperature, config.seed)
    todo = directory.missing(len(setup.problems))
    send(Total(sum(len(chunk) for _, chunk in todo) * n * config.max_tokens))
    for number, chunk in todo:
        requests = [
            RolloutRequest(i * n + k, setup.prompts[i], int(seed))
            for i in chunk
            for k, seed in enumerate(np.random.default_rng((config.seed, i, 2)).integers(0, 1 << 31, n))
        ]
        rollouts = engine.generate(requests, sampling, lambda tokens: send(Advance(tokens)))
        owners = [setup.problems[i] for i in chunk for _ in range(n)]
        texts = [setup.decode(rollout.response_token_ids) for rollout in rollouts]
        answers = [Response(text, rollout.finish_reason) for text, rollout in zip(texts, rollouts, strict=True)]
        killed = setup.task.killed
        rewards = setup.task.rewards(owners, answers)
        table = _table([problem.problem_id for problem in owners], n, requests, rollouts, rewards, texts)
        directory.append(number, table, setup.task.killed - killed)
        send(Advance(len(requests) * config.max_tokens - sum(len(r.response_token_ids) for r in rollouts)))


def _table(
    names: Sequence[str],
    n_samples: int,
    requests: Sequence[RolloutRequest],
    rollouts: Sequence[Rollout],
    rewards: Sequence[float],
    texts: Sequence[str],
) -> pa.Table:
    return pa.table(
        {
            "prompt_id": names,
            "sample": [request.sequence_id % n_samples for request in requests],
            "prompt_token_ids": [request.prompt_token_ids for request in requests],
            "response_token_ids": [list(rollout.response_token_ids) for rollout in rollouts],
            "rollout_logprobs": [list(rollout.logprobs) for rollout in rollouts],
            "n_tokens": [len(rollout.response_token_ids) for rollout in rollouts],
            "finish_reason": [rollout.finish_reason for rollout in rollouts],
            "reward": list(rewards),
            "text": list(texts),
        }
    )


def _engine_job(config: SanityConfig, job: SanityJob, longest_prompt: int) -> RolloutJob:
    return RolloutJob(
        engine=config.rollout_engine,
        model_path=job.model_path,
        dtype=config.rollout_dtype,
        device=job.device,
        sampling=Sampling(config.max_tokens, config.temperature, config.seed),
        requests=(),
        batch=MOST_AT_ONCE,
        self_noise_tokens=0,
        max_model_len=longest_prompt + config.max_tokens + 1,
        arguments=settings_of(config, job.device).arguments,
    )
