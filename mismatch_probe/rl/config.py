"""What an RL run is asked to do: a TOML file, checked without importing an engine."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mismatch_probe.dtypes import SHORT_DTYPES, dtype_label
from mismatch_probe.errors import UsageError
from mismatch_probe.results.rl_run import RlRun
from mismatch_probe.types import Dtype, TrainerMode

Structure = Literal["none", "weight-noise", "mantissa", "logit-noise", "stale"]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Settings = TypeVar("Settings", bound=BaseModel)


class TaskSettings(BaseModel):
    """What is sampled of which model, whatever else is done with it.

    Attributes:
        model: Built-in name, checkpoint folder, or hub id; `chain` is the small checkpoint that comes with the tool.
        revision: Hub revision.
        task: `chain`, `reasoning` or `math`, see `rl.tasks`.
        problems: JSONL file of problems, which `math` needs; the other tasks draw their own without it.
        chat: Renders problems through the model's chat template.
        n_problems: How many; None for all of a file, or 128 drawn ones.
        operations: Length of a chain.
        rollout_dtype: What vLLM runs in.
        max_tokens: Response budget; a response that uses it up is wrong.
        temperature: Sampling temperature.
        seed: Of everything.
        device: `auto`, `cpu` or `cuda`.
        kv_cache_gib: KV cache on a CPU.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = "chain"
    revision: str | None = None
    task: Literal["chain", "reasoning", "math"] = "chain"
    problems: str | None = None
    chat: bool = False
    n_problems: Positive | None = None
    operations: Positive = 16
    rollout_dtype: Dtype = "bfloat16"
    max_tokens: Positive = 64
    temperature: Annotated[float, Field(gt=0)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    kv_cache_gib: Positive = 1

    @field_validator("rollout_dtype", "trainer_dtype", mode="before", check_fields=False)
    @classmethod
    def _long_name(cls, value: Any) -> Any:
        return SHORT_DTYPES.get(value, value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _has_problems(self) -> Self:
        if self.task == "math" and self.problems is None:
            raise ValueError("problems must be a JSONL file for the task math")
        return self


class RlConfig(TaskSettings):
    """One RL run. Every field, those of `TaskSettings` included, is a key of the TOML file; the temperature is applied
    on both sides.

    Attributes:
        n_problems: Problems that are trained on.
        trainer_dtype: What forward and backward passes compute in; master weights are FP32 in any case.
        trainer_mode: `autocast` (FP32 weights under torch.autocast) or `cast` (a copy of the weights in the dtype).
        algorithm: Name in `rl.algorithms`.
        steps: Rollouts, each followed by `updates_per_rollout` optimizer steps.
        prompts_per_step, samples_per_prompt: Size of a rollout.
        updates_per_rollout: Minibatches that a rollout is split into, by prompt.
        micro_batch: Sequences in a forward and backward pass; gradients of a minibatch are accumulated over them.
        learning_rate, schedule, warmup_steps: Of AdamW; schedules count optimizer steps and end at 0.
        beta1, beta2, weight_decay, max_grad_norm: Likewise; a norm of 0 switches clipping off.
        initial_loss_scale, loss_scale_growth_interval, minimum_loss_scale: Of FP16 training.
        stress, dose: Injected stress on the rollout side, see `rl.stress`; never to be mistaken for precision.
        evaluate_every: Steps between evaluations of the clean weights under FP32, by transformers' own sampling, which
            is slow for long responses; 0 for none.
        evaluate_at_end: Whether the last weights are evaluated in any case.
        checkpoint_every: Steps between checkpoints.
        pass_above, pass_window: The sanity test: passed when the lower 95 % limit of the mean reward over the last so
            many steps exceeds the threshold.
        collapse_window: Steps of the collapse rule, see `rl.collapse`.
        check_sync: Whether every weight sync is checked, see `rl.sync`.
        record_rollouts: Whether every rollout is kept, in the format that `compare --from` reads.
        gpu_memory_utilization: The engine's share of a GPU that it shares with the trainer.
    """

    n_problems: Positive = 128
    trainer_dtype: Dtype = "bfloat16"
    trainer_mode: TrainerMode = "autocast"
    algorithm: str = "dr-grpo"
    steps: Positive = 100
    prompts_per_step: Positive = 8
    samples_per_prompt: Annotated[int, Field(ge=2)] = 8
    updates_per_rollout: Positive = 4
    micro_batch: Positive = 16
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = 0
    beta1: Share = 0.9
    beta2: Share = 0.95
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    initial_loss_scale: Annotated[float, Field(gt=0)] = 65536.0
    loss_scale_growth_interval: Positive = 400
    minimum_loss_scale: Annotated[float, Field(gt=0)] = 1.0
    stress: Structure = "none"
    dose: Annotated[float, Field(ge=0)] = 0.0
    evaluate_every: Count = 0
    evaluate_at_end: bool = True
    checkpoint_every: Positive = 50
    pass_above: Annotated[float, Field(gt=0, lt=1)] = 0.95
    pass_window: Positive = 10
    collapse_window: Annotated[int, Field(ge=2)] = 10
    check_sync: bool = True
    record_rollouts: bool = True
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.4

    @field_validator("algorithm")
    @classmethod
    def _known(cls, value: str) -> str:
        from mismatch_probe.rl.algorithms import algorithms

        if value not in algorithms():
            raise ValueError(f"does not accept {value!r}; known are {', '.join(algorithms())}")
        return value

    @model_validator(mode="after")
    def _together(self) -> RlConfig:
        if self.prompts_per_step % self.updates_per_rollout:
            raise ValueError(
                f"prompts_per_step ({self.prompts_per_step}) must be a multiple of updates_per_rollout "
                f"({self.updates_per_rollout}): a minibatch has whole groups"
            )
        if self.prompts_per_step > self.n_problems:
            raise ValueError(f"prompts_per_step ({self.prompts_per_step}) exceeds n_problems ({self.n_problems})")
        if (self.stress == "none") != (self.dose == 0):
            raise ValueError("stress and dose need each other: set both or neither")
        if self.stress == "stale" and self.dose != int(self.dose):
            raise ValueError(f"dose ({self.dose}) of stale weights must be a whole number of steps")
        if self.stress == "mantissa" and not (self.dose == int(self.dose) and 1 <= self.dose <= 22):
            raise ValueError(f"dose ({self.dose}) of mantissa must be a number of stored bits, 1 to 22")
        if self.minimum_loss_scale > self.initial_loss_scale:
            raise ValueError(
                f"minimum_loss_scale ({self.minimum_loss_scale:g}) exceeds initial_loss_scale "
                f"({self.initial_loss_scale:g})"
            )
        return self

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump()


def precision_label(config: RlConfig) -> str:
    """`BF16`, or `BF16/FP32` where rollout and trainer differ."""
    rollout, trainer = dtype_label(config.rollout_dtype), dtype_label(config.trainer_dtype)
    return rollout if rollout == trainer else f"{rollout}/{trainer}"


def make_config(values: Mapping[str, Any]) -> RlConfig:
    """Checks a configuration.

    Raises:
        UsageError: A key is unknown, or a value cannot be.
    """
    return checked(RlConfig, values)


def checked(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Makes a model of pydantic's, with its first complaint as the user's error.

    Raises:
        UsageError: A key is unknown, or a value cannot be.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise UsageError(
                f"The configuration has the unknown key {name!r}.", f"Known are {', '.join(kind.model_fields)}."
            ) from None
        what = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        said = f"{name} {what}".strip()
        raise UsageError(f"The configuration is wrong: {said}.", "Fix that value.") from None


def read_config(path: str | Path | None, overrides: Mapping[str, Any]) -> RlConfig:
    """Reads a TOML file, or the settings of an earlier run, and lets `overrides` (the command line's flags) win.

    Args:
        path: A TOML file, the folder of an RL run, or None for the defaults.
        overrides: Settings by name.

    Raises:
        TableError: The folder holds no RL run.
        UsageError: The file is missing or no TOML, a key is unknown, or a value cannot be.
    """
    if path is None:
        values: Mapping[str, Any] = {}
    elif Path(path).is_dir():
        values = RlRun.read(Path(path) / "run.json").config
    else:
        values = read_toml(path, "configuration")
    return make_config({**values, **overrides})


def read_toml(path: str | Path, what: str) -> dict[str, Any]:
    """Reads a TOML file, which a refusal calls `what`.

    Raises:
        UsageError: The file is missing or no TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"The {what} {path} cannot be read ({reason}).", "Check its path.") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"The {what} {path} is not valid TOML: {error}.", "Fix that line.") from None
