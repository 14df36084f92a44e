"""A sanity set from settings to report, and its sampling in a process of its own: chunk after chunk, each graded and
stored as it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from mismatch_probe.engines import devices, registry
from mismatch_probe.engines.base import Channel, RolloutEngine, RolloutJob
from mismatch_probe.engines.events import Advance, Event, Identity, Listener, Total
from mismatch_probe.engines.process import EngineProcess
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.session import Session
from mismatch_probe.probes.workers import told
from mismatch_probe.report.model import Report
from mismatch_probe.results.sanity import SanitySet
from mismatch_probe.rl.config import RlConfig, SanityConfig
from mismatch_probe.rl.run import Start
from mismatch_probe.rl.sanity.records import SanityDirectory
from mismatch_probe.rl.tasks import Response, read_problems
from mismatch_probe.rl.worker import MOST_AT_ONCE, Setup
from mismatch_probe.runs.state import SET
from mismatch_probe.types import Rollout, RolloutRequest, Sampling

_PASS = "sanity-set"
# What a run on the set has to share with its sampling.
_SHARED = (
    "model",
    "revision",
    "task",
    "rollout_engine",
    "rollout_dtype",
    "max_tokens",
    "temperature",
    "chat",
    "device",
)


@dataclass(frozen=True)
class SanityResult:
    """A sanity set that is finished.

    Attributes:
        path: Its folder.
        document: The content of `sanity.json`.
    """

    path: Path
    document: SanitySet

    @property
    def problems(self) -> Path:
        """The set: a file that `--problems` of `rl run` takes."""
        return self.path / SET

    def report(self) -> Report:
        """The report."""
        from mismatch_probe.report.sanity import SanityData, sanity_report

        config = SanityConfig.of(self.document.config)
        n_kept = self.document.outcome.n_kept if self.document.outcome else 0
        return sanity_report(
            SanityData(
                folder=str(self.path),
                document=self.document,
                model=config.model,
                rollout_dtype=config.rollout_dtype,
                temperature=config.temperature,
                train=tuple(_train(config, self.problems, n_kept)) if n_kept else (),
                longer=tuple(config.replace(max_tokens=2 * config.max_tokens).arguments()),
            )
        )


def _train(config: SanityConfig, problems: Path, n_kept: int) -> list[str]:
    """Options of `rl run` that train on a set, sampled as it was."""
    settings: dict[str, Any] = {name: getattr(config, name) for name in _SHARED}
    if n_kept < RlConfig().prompts_per_step:
        settings |= {"prompts_per_step": n_kept, "updates_per_rollout": 1}
    return RlConfig.of({**settings, "problems": str(problems), "n_problems": n_kept}).arguments()


def new_sanity_set(config: SanityConfig, out: str | Path | None, progress: Progress | None) -> SanityResult:
    """Makes a folder, samples and selects.

    Raises:
        ProbeError: The problems, the model, the device or the folder cannot be had, or the engine failed.
    """
    progress = progress or Progress()
    if config.problems is not None:
        read_problems(config.problems)  # a bad line is found before a model is fetched
    start = Start.of([config], progress, out)
    with Session.new(
        lambda path: SanityDirectory.create(path, config, start.provenance()),
        f"sanity-set-{Path(config.model).name}",
        out,
        progress,
    ) as session:
        return _execute(session, start)


def resume_sanity_set(path: Path, progress: Progress | None) -> SanityResult:
    """Samples what is missing; a finished set is only reported.

    Raises:
        TableError: The folder is none of a sanity set, or model or problems have changed.
    """
    with Session.resume(SanityDirectory, path, progress) as session:
        if session.complete:
            return _write(session.run)
        return _execute(session, Start.again(session.run, [session.run.config], session.progress))


def _execute(session: Session[SanityDirectory], start: Start) -> SanityResult:
    directory, progress = session.run, session.progress
    environment = settings_of(directory.config, start.device).environment
    process = EngineProcess(directory.config.rollout_engine, environment, directory.path / "logs" / "sanity-set.log")

    def on_event(event: Event) -> None:
        told(progress, _PASS, event)
        if isinstance(event, Identity):
            directory.note_engine(event.facts)

    progress.begin(_PASS, "rl sanity-set")
    with session.stoppable("finished chunks of problems are kept"):
        process.run(SanityJob(str(directory.path), str(start.model.path), start.device), on_event)
    progress.end(_PASS, "done")
    directory.finish()
    return _write(directory)


def _write(directory: SanityDirectory) -> SanityResult:
    """Writes the report of a finished set."""
    from mismatch_probe.report.render import write_report

    result = SanityResult(directory.path, directory.document)
    write_report(result.report(), {}, directory.path)
    return result


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
