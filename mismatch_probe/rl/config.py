"""Settings of RL runs and of sanity sets, by group. Nothing here imports an engine."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mismatch_probe.config.compare import RolloutEngine
from mismatch_probe.config.settings import Count, Device, DtypeName, Listed, Option, PathText, Positive, Settings
from mismatch_probe.dtypes import DTYPE_INFOS, dtype_label
from mismatch_probe.errors import UsageError
from mismatch_probe.rl.algorithms import algorithms
from mismatch_probe.rl.tasks import tasks
from mismatch_probe.types import TrainerMode

Structure = Literal["none", "weight-noise", "mantissa", "logit-noise", "stale"]
Remedy = Literal["none", "routing-replay", "zero-mismatch"]
Part = Annotated[float, Field(ge=0, lt=1)]
_FP32 = DTYPE_INFOS["float32"].bytes


class TaskSettings(RolloutEngine):
    """What is sampled of which model."""

    TITLE: ClassVar[str] = "Model and task"

    model: Annotated[PathText, Option(metavar="MODEL")] = Field(
        default="chain", description="Checkpoint folder or hub id; chain and lines come with the tool."
    )
    revision: Annotated[str | None, Option(metavar="NAME")] = Field(
        default=None, description="Branch, tag or commit of a hub id."
    )
    device: Device = Field(default="auto", description="Device of both engines.")
    task: Annotated[str, Option(metavar="NAME", known=tasks)] = Field(
        default="chain", description="Task, see `rl.tasks`; math needs --problems."
    )
    problems: Annotated[PathText | None, Option(path=True, default="drawn ones")] = Field(
        default=None, description="JSONL file of problem and answer."
    )
    chat: bool = Field(default=False, description="Render problems by the chat template.")
    n_problems: Annotated[Positive | None, Option(default="all of the file, or the task's own number")] = Field(
        default=None, description="Number of problems, drawn or of the file."
    )
    operations: Positive = Field(default=16, description="Operations in a problem of the task chain.")
    max_tokens: Annotated[Positive, Option(metavar="TOKENS")] = Field(
        default=64, description="Maximum response length; a response that reaches it counts as wrong."
    )
    temperature: Annotated[float, Field(gt=0)] = Field(default=1.0, description="Sampling temperature.")
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = Field(default=0, description="Random seed, 0 to 2^31 − 1.")
    rollout_dtype: DtypeName = Field(default="bfloat16", description="Dtype of the rollout engine.")
    kv_cache_gib: Annotated[Positive, Option(metavar="GIB")] = Field(default=1, description="KV cache on a CPU.")

    @property
    def bytes_per_weight(self) -> float:
        """Memory of a weight while it runs: in the rollout engine."""
        return DTYPE_INFOS[self.rollout_dtype].bytes

    @property
    def disk_bytes_per_weight(self) -> float:
        """Disk of a weight: its checkpoints."""
        return 0

    @model_validator(mode="after")
    def _has_problems(self) -> Self:
        if self.task == "math" and self.problems is None:
            raise UsageError("--task math needs --problems.", "Name a JSONL file of problem and answer.")
        return self


class TrainingSettings(Settings):
    """The trainer and its steps."""

    TITLE: ClassVar[str] = "Training"

    algorithm: Annotated[str, Option(metavar="NAME", known=algorithms)] = Field(
        default="dr-grpo", description="Loss, see docs/algorithms.md."
    )
    trainer_dtype: DtypeName = Field(
        default="bfloat16", description="Dtype of forward and backward passes; master weights are FP32."
    )
    trainer_mode: TrainerMode = Field(
        default="autocast", description="autocast: FP32 weights under torch.autocast. cast: a copy in the dtype."
    )
    remedy: Remedy = Field(
        default="none",
        description="routing-replay: the trainer takes the rollout's experts. zero-mismatch: the trainer chooses the "
        "tokens.",
    )
    start_from: Annotated[PathText | None, Option(path=True, metavar="CHECKPOINT", default="the model")] = Field(
        default=None, description="Checkpoint of another run to go on from, with its step and optimizer."
    )
    steps: Positive = Field(default=100, description="Rollouts; each is followed by its optimizer steps.")
    prompts_per_step: Positive = Field(default=8, description="Prompts in a rollout.")
    samples_per_prompt: Annotated[int, Field(ge=2)] = Field(default=8, description="Responses per prompt.")
    updates_per_rollout: Positive = Field(
        default=4, description="Optimizer steps per rollout; each takes its part of the prompts."
    )
    micro_batch: Positive = Field(default=16, description="Sequences in a forward and backward pass.")
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1), Option(metavar="FRACTION")] = Field(
        default=0.4, description="Fraction of a GPU's memory that the engine takes beside the trainer."
    )


class OptimizerSettings(Settings):
    """AdamW, its schedule, and the loss scale of FP16."""

    TITLE: ClassVar[str] = "Optimizer"

    learning_rate: Annotated[float, Field(gt=0)] = Field(default=1e-4, description="Learning rate of AdamW.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="Schedule over optimizer steps; linear and cosine end at 0."
    )
    warmup_steps: Count = Field(default=0, description="Optimizer steps over which the learning rate rises.")
    beta1: Part = Field(default=0.9, description="β1 of AdamW.")
    beta2: Part = Field(default=0.95, description="β2 of AdamW.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.0, description="Weight decay of AdamW.")
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="Norm at which gradients are clipped; 0 switches clipping off."
    )
    initial_loss_scale: Annotated[float, Field(gt=0)] = Field(
        default=65536.0, description="First loss scale of FP16 training."
    )
    loss_scale_growth_interval: Positive = Field(
        default=400, description="Steps without overflow after which the loss scale doubles."
    )
    minimum_loss_scale: Annotated[float, Field(gt=0)] = Field(default=1.0, description="Smallest loss scale.")


class StressSettings(Settings):
    """Injected stress on the rollout side; not precision."""

    TITLE: ClassVar[str] = "Injected stress"

    stress: Structure = Field(default="none", description="Error that is added to the rollout engine.")
    dose: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="Size: relative standard deviation (weight-noise), stored bits (mantissa), logits (logit-noise), "
        "steps (stale).",
    )


class RecordingSettings(Settings):
    """What is evaluated, checked and kept."""

    TITLE: ClassVar[str] = "Evaluation and checkpoints"

    evaluate_every: Count = Field(
        default=0, description="Steps between evaluations of the clean weights in FP32; 0 for none."
    )
    evaluate_at_end: bool = Field(default=True, description="Evaluate the last weights.")
    checkpoint_every: Positive = Field(default=50, description="Steps between checkpoints.")
    pass_above: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.95, description="The sanity test passes when the lower 95 % limit of the mean reward is above this."
    )
    pass_window: Positive = Field(default=10, description="Last steps whose rewards the sanity test averages.")
    collapse_window: Annotated[int, Field(ge=2)] = Field(
        default=10, description="Steps over which a collapse is judged."
    )
    check_sync: bool = Field(default=True, description="Check every weight sync.")
    record_rollouts: bool = Field(default=True, description="Keep every rollout, in the format of compare --from.")


class RlConfig(
    RecordingSettings,
    StressSettings,
    OptimizerSettings,
    TrainingSettings,
    TaskSettings,
):
    """Settings of an RL run; the temperature applies on both sides."""

    @property
    def bytes_per_weight(self) -> float:
        """Memory of a weight: in the rollout engine, and in `rl.policy.Policy` in FP32 as master weight, gradient and
        both moments of AdamW, in 16-bit mode cast also as a copy with its gradient, and as stale weights.
        """
        copy = DTYPE_INFOS[self.trainer_dtype].bytes
        copied = 2 * copy if self.trainer_mode == "cast" and self.trainer_dtype != "float32" else 0
        return super().bytes_per_weight + _FP32 + _FP32 + 2 * _FP32 + copied + self._stale_bytes

    @property
    def disk_bytes_per_weight(self) -> float:
        """Disk of a weight: in FP32 in the model's file, as master weight, moments and stale weights, in the newest
        checkpoint, the last healthy one and the one that is being written.
        """
        n_checkpoints = min(3, -(-self.steps // self.checkpoint_every))
        return n_checkpoints * (4 * _FP32 + self._stale_bytes)

    @property
    def _stale_bytes(self) -> float:
        """Of weights of earlier steps, which are kept with those of the present one."""
        return _FP32 * (self.dose + 1) if self.stress == "stale" else 0

    @model_validator(mode="after")
    def _together(self) -> Self:
        for wrong, what, fix in (
            (
                self.prompts_per_step % self.updates_per_rollout,
                f"--prompts-per-step ({self.prompts_per_step}) must be a multiple of --updates-per-rollout "
                f"({self.updates_per_rollout}), so that a minibatch has whole groups.",
                "Change one of them.",
            ),
            (
                self.n_problems is not None and self.prompts_per_step > self.n_problems,
                f"--prompts-per-step ({self.prompts_per_step}) exceeds --n-problems ({self.n_problems}).",
                "Change one of them.",
            ),
            (
                (self.stress == "none") != (self.dose == 0),
                "--stress and --dose need each other.",
                "Set both or neither.",
            ),
            (
                self.remedy == "zero-mismatch" and self.stress != "none",
                f"--stress {self.stress} cannot act with --remedy zero-mismatch: the trainer chooses the tokens.",
                "Leave one of them out.",
            ),
            (
                self.stress == "stale" and self.dose != int(self.dose),
                f"--dose ({self.dose:g}) of stale weights must be a whole number of steps.",
                "Write for example --dose 2.",
            ),
            (
                self.stress == "mantissa" and not (self.dose == int(self.dose) and 1 <= self.dose <= 22),
                f"--dose ({self.dose:g}) of mantissa must be a number of stored bits, 1 to 22.",
                "Write for example --dose 3.",
            ),
            (
                self.minimum_loss_scale > self.initial_loss_scale,
                f"--minimum-loss-scale ({self.minimum_loss_scale:g}) exceeds --initial-loss-scale "
                f"({self.initial_loss_scale:g}).",
                "Change one of them.",
            ),
        ):
            if wrong:
                raise UsageError(what, fix)
        return self


Accuracy = Annotated[float, Field(ge=0, le=1)]


class SanityConfig(TaskSettings):
    """Settings of a sanity set."""

    TITLE: ClassVar[str] = "Sanity set"

    n_samples: Annotated[int, Field(ge=2)] = Field(default=40, description="Responses per problem.")
    keep: Annotated[tuple[Accuracy, Accuracy], Option(metavar="LOW HIGH")] = Field(
        default=(0.2, 0.8), description="Accuracy of the problems that are kept, both bounds included."
    )

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.keep[0] > self.keep[1]:
            raise UsageError(
                f"--keep ({self.keep[0]:g} {self.keep[1]:g}) names the upper bound first.", "Exchange them."
            )
        return self


class WorkerSettings(Settings):
    """How much of a sweep runs at once."""

    TITLE: ClassVar[str] = "Sweep"

    workers: Annotated[Positive | None, Option(default="one per core or GPU")] = Field(
        default=None, description="Runs at once."
    )


class SweepSettings(WorkerSettings):
    """Settings of a sweep beside its plan."""

    seeds: Annotated[Positive | None, Option(default="the plan's")] = Field(
        default=None, description="Seeds of every arm, from 0."
    )


class DemoSettings(WorkerSettings):
    """Settings of the demo."""

    seeds: Positive = Field(default=1, description="Runs of each arm.")


class PlaceSettings(Settings):
    """Models that are placed among the arms of a sweep."""

    TITLE: ClassVar[str] = "Placing"

    place: Annotated[Listed[PathText], Option(path=True, metavar="RUN")] = Field(
        default=(), description="Runs of `compare` whose models are placed among the arms of the sweep."
    )
    planned_tokens: Annotated[Positive, Option(metavar="TOKENS")] = Field(
        default=1024, description="Response length at which their ESS is predicted."
    )


def precision_label(config: RlConfig) -> str:
    """`BF16`, or `BF16/FP32` where rollout and trainer differ."""
    rollout, trainer = dtype_label(config.rollout_dtype), dtype_label(config.trainer_dtype)
    return rollout if rollout == trainer else f"{rollout}/{trainer}"
