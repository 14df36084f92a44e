"""RL runs in a process of their own: one engine, and one run after another on it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mismatch_probe.engines import devices
from mismatch_probe.engines.base import EncodeJob, RolloutJob
from mismatch_probe.rl.records import RlDirectory
from mismatch_probe.types import Prompt, Sampling

MOST_AT_ONCE = 256


@dataclass(frozen=True)
class RlJob:
    """Runs that share an engine: equal model, rollout dtype, task and sizes.

    Attributes:
        folders: Of the runs, each with its `config.json`.
        model_path: Folder of the initial model.
        device: `cpu` or `cuda`.
        threads: Torch threads on a CPU; 0 for torch's own choice.
    """

    folders: Sequence[str]
    model_path: str
    device: str
    threads: int = 0
    trust_remote_code: bool = False
    subject: str = "The RL run"

    def run(self, channel: Any) -> None:
        """Runs them in their order. Events: `total`, `step`, `message`, and `result` of each."""
        import torch

        from mismatch_probe.engines.vllm import VllmRollout
        from mismatch_probe.rl.loop import Pieces, Training

        if self.threads:
            torch.set_num_threads(self.threads)
        directories = [RlDirectory.open(Path(folder)) for folder in self.folders]
        config = directories[0].config
        setup = Setup.of(config, self.model_path)
        engine = VllmRollout(_engine_job(directories, self, max(map(len, setup.prompts))))
        channel.phase("load")
        channel.send("identity", engine.identity() | devices.running())
        try:
            for directory in directories:
                tell = _Teller(channel, directory)
                if directory.config != config:
                    setup.task.close()
                    config, setup = directory.config, Setup.of(directory.config, self.model_path)
                pieces = Pieces(
                    config=directory.config,
                    directory=directory,
                    source=Path(self.model_path),
                    device=torch.device(self.device),
                    engine=engine,
                    task=setup.task,
                    problems=setup.problems,
                    prompts=setup.prompts,
                    decode=setup.decode,
                    end_ids=setup.end_ids,
                    tell=tell,
                )
                result = Training(pieces).run()
                directory.finish(result)
                channel.send("result", (str(directory.path), result))
        finally:
            setup.task.close()
        engine.close()


class _Teller:
    """Names the run in each event."""

    def __init__(self, channel: Any, directory: RlDirectory) -> None:
        self._channel, self._path = channel, str(directory.path)

    def __call__(self, name: str, payload: Any) -> None:
        self._channel.send(name, (self._path, payload))


class TaskSettings(Protocol):
    """What configurations say of model and task, whatever else is done with them."""

    @property
    def model(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def task(self) -> str: ...
    @property
    def problems(self) -> str | None: ...
    @property
    def chat(self) -> bool: ...
    @property
    def n_problems(self) -> int | None: ...
    @property
    def operations(self) -> int: ...
    @property
    def seed(self) -> int: ...


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
        from transformers import AutoTokenizer

        from mismatch_probe.engines.encoding import encode
        from mismatch_probe.rl.tasks import make_task

        task = make_task(
            config.task,
            n_problems=config.n_problems,
            seed=config.seed if config.task != "chain" else 0,
            operations=config.operations,
            path=config.problems,
        )
        problems = task.problems()
        texts = [Prompt(p.problem_id, text=p.prompt) for p in problems]
        encoded = encode(EncodeJob(model_path, texts, config.chat, trust_remote_code=False))
        tokenizer = AutoTokenizer.from_pretrained(model_path, local_files_only=True)
        return cls(
            task,
            problems,
            [prompt.token_ids for prompt in encoded.prompts],
            lambda ids: tokenizer.decode([int(i) for i in ids], skip_special_tokens=True),
            _end_ids(model_path, tokenizer),
        )


def _end_ids(model_path: str, tokenizer: Any) -> list[int]:
    """Tokens that end a response: vLLM takes them from the tokenizer, the model's and its generation configuration."""
    from transformers import AutoConfig, GenerationConfig

    found = [tokenizer.eos_token_id, AutoConfig.from_pretrained(model_path, local_files_only=True).eos_token_id]
    with suppress(OSError):  # the checkpoint may have none
        found.append(GenerationConfig.from_pretrained(model_path, local_files_only=True).eos_token_id)
    ids: set[int] = set()
    for entry in found:
        ids.update(entry if isinstance(entry, list) else [] if entry is None else [entry])
    return sorted(ids)


def _engine_job(directories: Sequence[RlDirectory], job: RlJob, longest_prompt: int) -> RolloutJob:
    """An engine that serves all the runs."""
    configs = [directory.config for directory in directories]
    first = configs[0]
    device: devices.Device = "cuda" if job.device == "cuda" else "cpu"
    settings = devices.rollout_settings(
        device, first.rollout_dtype, eager=True, in_process=True, kv_cache_gib=first.kv_cache_gib
    )
    # Log-probs are those of the law that was sampled from, whatever the temperature and the injected noise.
    arguments = {**settings.arguments, "logprobs_mode": "processed_logprobs"}
    if device == "cuda":
        arguments["gpu_memory_utilization"] = first.gpu_memory_utilization
    if any(config.stress == "logit-noise" for config in configs):
        arguments["logits_processors"] = ["mismatch_probe.engines.vllm_processors:NoiseV1"]
    return RolloutJob(
        engine="vllm",
        model_path=job.model_path,
        dtype=first.rollout_dtype,
        device=device,
        sampling=Sampling(max(c.max_tokens for c in configs), first.temperature, first.seed),
        requests=(),
        batch=min(MOST_AT_ONCE, max(c.prompts_per_step * c.samples_per_prompt for c in configs)),
        null_tokens=0,
        max_model_len=longest_prompt + max(c.max_tokens for c in configs) + 1,
        trust_remote_code=job.trust_remote_code,
        arguments=arguments,
    )
