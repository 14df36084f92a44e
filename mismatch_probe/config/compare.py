"""Settings of a comparison, by group. Nothing here imports an engine, so settings are checked at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from mismatch_probe.config.engine_args import check_engine_args, engine_args_of
from mismatch_probe.config.settings import Count, Device, Dtypes, Listed, Option, PathText, Positive, Settings
from mismatch_probe.errors import UsageError
from mismatch_probe.types import (
    DTYPES,
    ROLLOUT_ENGINE,
    TRAINER_ENGINE,
    ReferenceDtype,
    SequenceSource,
    TrainerLayout,
    TrainerMode,
)

DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True)
class Sizes:
    """How much a comparison samples.

    Attributes:
        num_prompts: Prompts.
        samples_per_prompt: Responses to each.
        max_tokens: Longest response.
        rollout_batch: Requests that are in the engine at once.
        self_noise_tokens: Leading tokens of the first rollout batch that are produced twice.
        memory_budget_gib: Memory that a trainer pass may use above its weights.
    """

    num_prompts: int
    samples_per_prompt: int
    max_tokens: int
    rollout_batch: int
    self_noise_tokens: int
    memory_budget_gib: float


class CheckpointSettings(Settings):
    """How a checkpoint is read, and where its engines run."""

    TITLE: ClassVar[str] = "Model"

    revision: Annotated[str | None, Option(metavar="NAME")] = Field(
        default=None, description="Branch, tag or commit of a hub id."
    )
    trust_remote_code: Annotated[bool, Option(file=False)] = Field(
        default=False, description="Run Python code that the checkpoint brings."
    )
    device: Device = Field(default="auto", description="Device of both engines.")


class NamedModel(Settings):
    """Which model."""

    TITLE: ClassVar[str] = "Model"

    model: Annotated[PathText, Option(default=DEFAULT_MODEL, metavar="MODEL")] = Field(
        default="", description="Built-in name, checkpoint folder or hub id."
    )


class ModelSettings(CheckpointSettings, NamedModel):
    """Which model, and where its engines run."""


class RequestSettings(Settings):
    """What is asked of the rollout engine."""

    TITLE: ClassVar[str] = "Prompts and responses"

    prompts: Annotated[PathText | None, Option(default="built-in set", path=True)] = Field(
        default=None, description="Prompt file, .jsonl or .txt."
    )
    chat: bool = Field(default=False, description="Render a plain prompt as one user message by the chat template.")
    max_tokens: Annotated[Positive | None, Option(default="by device", metavar="TOKENS")] = Field(
        default=None, description="Maximum response length."
    )


class PromptSettings(RequestSettings):
    """What is sampled, and how much of it."""

    num_prompts: Annotated[Positive | None, Option(default="64, or the whole file")] = Field(
        default=None, description="Number of prompts."
    )
    samples_per_prompt: Annotated[Positive | None, Option(default="by device")] = Field(
        default=None, description="Responses per prompt."
    )
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = Field(
        default=0, description="Random seed, 0 to 2^32 − 1; each request derives its own."
    )


class RolloutDtypes(Settings):
    """Dtypes of the rollout engine."""

    TITLE: ClassVar[str] = "Policies"

    rollout_dtypes: Dtypes = Field(default=DTYPES, description="Dtypes of the rollout engine, the rows of the matrix.")


class PolicySettings(RolloutDtypes):
    """The policies that are compared."""

    trainer_dtypes: Dtypes = Field(default=DTYPES, description="Dtypes of the trainer, the columns of the matrix.")
    temperature: Annotated[
        float,
        Option(fix="Greedy decoding has no sampling distribution to compare: use --temperature 1."),
        Field(gt=0),
    ] = Field(default=1.0, description="Sampling temperature; both sides compute log-probs at this temperature.")


class DumpSettings(Settings):
    """How recorded sequences are read."""

    TITLE: ClassVar[str] = "Recorded sequences"

    dump_format: Annotated[str, Option(flag="--format", metavar="NAME")] = Field(
        default="auto", description="Format of the dump; auto tells by its keys."
    )
    dump_map: Annotated[Listed[str], Option(flag="--map", metavar="THEIRS=OURS")] = Field(
        default=(), description="Columns of the dump and the keys of the generic format that they hold."
    )
    trust_pickle: Annotated[bool, Option(file=False)] = Field(
        default=False, description="Read pickles and .pt files; what they name is not run."
    )


class RecordedSettings(DumpSettings):
    """Sequences that exist already."""

    source: Annotated[PathText | None, Option(flag="--from", path=True, metavar="SOURCE")] = Field(
        default=None, description="Dump of a framework (file or folder), or a finished run, instead of samples."
    )
    rescore: bool = Field(
        default=False,
        description="With --from: score with the trainer even if the file has trainer log-probs.",
    )
    replay: bool = Field(default=False, description="With --from: decode the recorded ids again in each dtype.")

    @model_validator(mode="after")
    def _recorded(self) -> Self:
        for name in ("rescore", "replay", *DumpSettings.model_fields):
            if self.source is None and name in self.changed:
                raise UsageError(f"{self.called(name)} needs recorded sequences.", "Give their file with --from.")
        return self


class SequenceSettings(Settings):
    """Who samples."""

    TITLE: ClassVar[str] = "Sampling"

    sequences: SequenceSource = Field(
        default="own",
        description="own: every rollout dtype samples. shared: the first samples, the others decode the same ids.",
    )


class RolloutEngine(Settings):
    """Which engine samples."""

    TITLE: ClassVar[str] = "Rollout engine"

    rollout_engine: Annotated[str, Option(metavar="NAME")] = Field(
        default=ROLLOUT_ENGINE, description="Engine that samples: vllm, hf, or one that an installed package brings."
    )


class RolloutSettings(RolloutEngine):
    """How the rollout engine runs."""

    eager: bool = Field(default=False, description="Switch CUDA graphs and compilation off.")
    rollout_batch: Annotated[Positive | None, Option(default="by device")] = Field(
        default=None, description="Requests in the engine at once."
    )
    engine_args: Annotated[
        Mapping[str, Any],
        Option(flag="--engine-arg"),
        BeforeValidator(engine_args_of),
        AfterValidator(check_engine_args),
    ] = Field(default_factory=dict, description="Argument of the rollout engine; recorded in the manifest. Repeatable.")


class TrainerAttention(Settings):
    """Attention of the trainer."""

    TITLE: ClassVar[str] = "Trainer"

    trainer_attn: Annotated[str | None, Option(default="the model's own", metavar="NAME")] = Field(
        default=None, description="Attention of transformers: sdpa, eager, flash_attention_2 and others."
    )


class TrainerSettings(TrainerAttention):
    """How the trainer runs."""

    trainer_engine: Annotated[str, Option(metavar="NAME")] = Field(
        default=TRAINER_ENGINE, description="Engine of the trainer: hf, or one that an installed package brings."
    )
    trainer_modes: Annotated[Listed[TrainerMode], Option(flag="--trainer-mode"), Field(min_length=1)] = Field(
        default=("cast",),
        description="cast: weights in the dtype. autocast: FP32 weights under torch.autocast.",
    )
    trainer_layout: TrainerLayout = Field(default="padded", description="Layout of the sequences of a batch.")
    memory_budget_gib: Annotated[
        float | None, Field(gt=0), Option(flag="--memory-budget", default="by device", metavar="GIB")
    ] = Field(default=None, description="Memory above the weights.")


class MeasurementSettings(Settings):
    """What is measured beside the log-probs of the tokens."""

    TITLE: ClassVar[str] = "Measurements"

    exact_kl: Annotated[int | Literal["all"], Option(metavar="N|all")] = Field(
        default=0, description="Positions per rollout pass at which the full rows of logits are compared."
    )
    reference: ReferenceDtype = Field(
        default="float32", description="Errors are charged against the trainer in this dtype."
    )
    self_noise_tokens: Annotated[Count | None, Option(default="by device", metavar="TOKENS")] = Field(
        default=None, description="Tokens produced twice to measure self-noise; 0 for none."
    )

    @field_validator("exact_kl", mode="before")
    @classmethod
    def _positions(cls, value: Any) -> Any:
        if value == "all" or str(value).isdecimal():
            return value
        raise UsageError(f"--exact-kl must be a number of positions or all, not {value!r}.", "Use 0 for none.")


class AnalysisSettings(Settings):
    """What is computed from the tables."""

    TITLE: ClassVar[str] = "Analysis"

    predict_lengths: Annotated[
        Listed[Positive],
        Option(flag="--predict-length", default="2, 4 and 8 times the observed length", metavar="TOKENS"),
    ] = Field(default=(), description="Response lengths at which ESS and sequence KL are predicted.")
    extrapolate: bool = Field(default=False, description="Predict beyond 8 times the observed length.")
    ratio_limits: Annotated[
        Listed[Annotated[float, Field(gt=1, le=1e6)]], Option(flag="--ratio-limit", metavar="FACTOR")
    ] = Field(default=(), description="Also compute frac_ratio_beyond_FACTOR, the fraction of ratios beyond it.")


class GateSettings(Settings):
    """When a command exits with 3."""

    TITLE: ClassVar[str] = "Limits"

    fail_on: Annotated[Listed[str], Option(metavar="LIMIT")] = Field(
        default=(),
        description="Exit with 3 when metric>value or metric<value holds, optionally of @rollout/trainer alone.",
    )


class CompareConfig(
    AnalysisSettings,
    MeasurementSettings,
    TrainerSettings,
    RolloutSettings,
    SequenceSettings,
    RecordedSettings,
    PolicySettings,
    PromptSettings,
    ModelSettings,
):
    """Settings of a comparison. Sizes of None are the device's (`engines.devices.default_sizes`). An empty model is
    `DEFAULT_MODEL`, but not for recorded sequences: only their owner knows which model made them."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.source is not None:
            if self.sequences != "own":
                raise UsageError(
                    "--sequences cannot be combined with --from.", "Use --replay to decode the file's ids again."
                )
            for name in ("prompts", "chat", "num_prompts", "samples_per_prompt", "max_tokens"):
                if getattr(self, name) not in (None, False):
                    raise UsageError(
                        f"{self.called(name)} cannot be combined with --from.",
                        "Leave it out: the file has prompts and responses.",
                    )
        if self.trainer_modes == ("autocast",) and self.trainer_dtypes == ("float32",):
            raise UsageError(
                "Autocast does not support float32.", "Add a 16-bit --trainer-dtypes, or use --trainer-mode cast."
            )
        if self.exact_kl and self.engine_args.get("enable_batch_sharded_sampling"):
            raise UsageError(
                "--exact-kl needs all rows on one rank; enable_batch_sharded_sampling distributes them.",
                "Leave that --engine-arg out.",
            )
        return self


def check_lengths(lengths: Sequence[int], option: str = "--predict-length") -> None:
    """Checks numbers of tokens.

    Raises:
        UsageError: A length is not positive.
    """
    if any(length < 1 for length in lengths):
        raise UsageError(f"{option} must be positive.", "Leave it out for the default.")
