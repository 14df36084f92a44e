"""RL runs in a process of their own: one engine, and one run after another on it."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mismatch_probe.engines import devices, registry
from mismatch_probe.engines.base import Channel, RolloutEngine, RolloutJob
from mismatch_probe.engines.encoding import EncodeJob, encode, reader_of
from mismatch_probe.engines.events import Event, Identity, InRun, RunBegins, RunEnded
from mismatch_probe.errors import FolderBusy
from mismatch_probe.files import locked
from mismatch_probe.rl.config import RlConfig, TaskSettings
from mismatch_probe.rl.records import RlDirectory
from mismatch_probe.types import Prompt, Sampling

MOST_AT_ONCE = 256


@dataclass(frozen=True)
class RlJob:
    """Runs that share an engine: equal model, rollout engine and dtype, task and sizes.

    Attributes:
        folders: Of the runs, each with its `run.json`.
        model_path: Folder of the initial model.
        device: `cpu` or `cuda`.
        cores: Of a CPU, which the process keeps to; none for all.
        shared: Other processes work through the same folders. Each is locked while it is trained, and one that is
            locked or has ended is left out.
    """

    folders: Sequence[str]
    model_path: str
    device: str
    cores: Sequence[int] = ()
    shared: bool = False
    trust_remote_code: bool = False
    subject: ClassVar[str] = "The RL run"
    memory_advice: ClassVar[str] = (
        "Lower max_tokens, micro_batch, prompts_per_step or gpu_memory_utilization, or use a machine with more memory."
    )

    def run(self, channel: Channel) -> None:
        """Runs them in their order. Sends `Identity`, and of each run, `InRun`: `RunBegins`, `Total` in steps,
        `StepDone`, `Found`, `Message` and `RunEnded`.
        """
        import torch

        if self.cores:
            os.sched_setaffinity(0, self.cores)
            torch.set_num_threads(len(self.cores))
        directories = [RlDirectory.open(Path(folder)) for folder in self.folders]
        setups = {key: Setup.of(config, self.model_path) for key, config in _tasks(directories).items()}
        longest = max(len(prompt) for setup in setups.values() for prompt in setup.prompts)
        try:
            with _engine_job(directories, self, longest).started() as engine:
                channel.phase("load")
                channel.send(Identity(engine.identity() | devices.running()))
                fresh = True
                for directory in directories:
                    key = _task_of(directory.config)
                    with suppress(_Taken), self._hold(directory):
                        self._train(directory, setups[key], engine, fresh, channel)
                        fresh = False
        finally:
            for setup in setups.values():
                setup.task.close()

    def _train(
        self, directory: RlDirectory, setup: Setup, engine: RolloutEngine, fresh: bool, channel: Channel
    ) -> None:
        import torch

        from mismatch_probe.rl.loop import Pieces, Training

        def tell(event: Event) -> None:
            channel.send(InRun(str(directory.path), event))

        tell(RunBegins())
        pieces = Pieces(
            config=directory.config,
            directory=directory,
            source=Path(self.model_path),
            device=torch.device(self.device),
            engine=engine,
            fresh=fresh,
            task=setup.task,
            problems=setup.problems,
            prompts=setup.prompts,
            decode=setup.decode,
            end_ids=setup.end_ids,
            tell=tell,
        )
        with engine.configured():
            training = Training(pieces)
        ending = training.run()
        directory.finish(ending)
        tell(RunEnded(ending))

    @contextmanager
    def _hold(self, directory: RlDirectory) -> Iterator[None]:
        """Holds a folder that others may want, too."""
        with ExitStack() as stack:
            if self.shared:
                try:
                    stack.enter_context(locked(directory.path))
                except FolderBusy:
                    raise _Taken from None
                if directory.ending() is not None:
                    raise _Taken
            yield


class _Taken(Exception):
    """Another process has this run, or has ended it."""


@dataclass(frozen=True)
class Setup:
    """What follows from task and tokenizer."""

    task: Any
    problems: list[Any]
    prompts: list[list[int]]
    decode: Any
    end_ids: list[int]

    @classmethod
    def of(cls, config: TaskSettings, model_path: str) -> Setup:
        from mismatch_probe.rl.tasks import make_task

        task = make_task(
            config.task,
            n_problems=config.n_problems,
            seed=_problem_seed(config),
            operations=config.operations,
            path=config.problems,
        )
        problems = task.problems()
        texts = [Prompt(p.problem_id, text=p.prompt) for p in problems]
        encoded = encode(EncodeJob(model_path, texts, config.chat, trust_remote_code=False))
        return cls(task, problems, [prompt.token_ids for prompt in encoded.prompts], *reader_of(model_path))


def _problem_seed(config: TaskSettings) -> int:
    """The chain's problems are those that its checkpoint knows the difficulty of."""
    return 0 if config.task == "chain" else config.seed


def _tasks(directories: Sequence[RlDirectory]) -> dict[Hashable, RlConfig]:
    """A configuration for each set of problems."""
    return {_task_of(directory.config): directory.config for directory in directories}


def _task_of(config: RlConfig) -> Hashable:
    """Runs of equal value have the same problems."""
    return config.task, config.problems, config.n_problems, config.operations, config.chat, _problem_seed(config)


def engine_settings(config: RlConfig, device: devices.Device) -> devices.EngineSettings:
    """Arguments and environment of the rollout engine, whose process is the trainer's, too."""
    return registry.find(config.rollout_engine).rollout_settings(
        device,
        config.rollout_dtype,
        eager=True,
        in_process=True,
        kv_cache_gib=config.kv_cache_gib,
        beside_trainer=config.gpu_memory_utilization,
    )


def _engine_job(directories: Sequence[RlDirectory], job: RlJob, longest_prompt: int) -> RolloutJob:
    """An engine that serves all the runs."""
    configs = [directory.config for directory in directories]
    first = configs[0]
    device: devices.Device = "cuda" if job.device == "cuda" else "cpu"
    return RolloutJob(
        engine=first.rollout_engine,
        model_path=job.model_path,
        dtype=first.rollout_dtype,
        device=device,
        sampling=Sampling(max(c.max_tokens for c in configs), first.temperature, first.seed),
        requests=(),
        batch=min(MOST_AT_ONCE, max(c.prompts_per_step * c.samples_per_prompt for c in configs)),
        self_noise_tokens=0,
        max_model_len=longest_prompt + max(c.max_tokens for c in configs) + 1,
        logit_noise=any(c.stress == "logit-noise" or c.remedy == "zero-mismatch" for c in configs),
        trust_remote_code=job.trust_remote_code,
        arguments=engine_settings(first, device).arguments,
    )
