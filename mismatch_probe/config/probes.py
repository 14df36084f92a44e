"""What `attribute`, `audit` and `rl gradient` are asked beside their comparison."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, Field, model_validator

from mismatch_probe.config.settings import DtypeName, Dtypes, Listed, Option, PathText, Positive, Settings
from mismatch_probe.dtypes import SHORT_DTYPES
from mismatch_probe.errors import UsageError
from mismatch_probe.types import DTYPES, Dtype


def pair_dtypes(pair: str) -> tuple[Dtype, Dtype]:
    """Rollout and trainer dtype of `rollout/trainer`; one dtype means both.

    Raises:
        UsageError: It names something else.
    """
    names = [SHORT_DTYPES.get(name, name) for name in pair.split("/")]
    known = [dtype for dtype in (names[0], names[-1]) if dtype in DTYPES]
    if len(names) > 2 or len(known) != 2:
        raise UsageError(f"--pair {pair!r} is not rollout/trainer.", "Write for example --pair bf16/bf16.")
    return known[0], known[1]


def _pair(text: str) -> str:
    pair_dtypes(text)
    return text


Pair = Annotated[str, AfterValidator(_pair)]


class AttributeOptions(Settings):
    """Settings of an attribution."""

    TITLE: ClassVar[str] = "Attribution"

    pair: Annotated[Pair, Option(metavar="ROLLOUT/TRAINER")] = Field(
        default="bfloat16", description="Dtypes whose gap is attributed; one dtype means both sides."
    )
    settings: Annotated[Listed[str], Option(metavar="LIST")] = Field(
        default=("default",),
        description="default, all, none, or names (see --plan). rollout: or trainer: before a name means that side.",
    )
    layers: bool = Field(default=True, description="Compare both models layer by layer.")
    layer_dtypes: Dtypes = Field(default=DTYPES, description="Dtypes in which layers are compared.")
    target: Annotated[
        float | None,
        Option(
            default="4/5 of what an FP32 trainer closes",
            metavar="FRACTION",
            fix="Write for example --target 0.9.",
        ),
        Field(gt=0, lt=1),
    ] = Field(default=None, description="Stop when the remaining gap is at or below this fraction of the gap's RMS.")

    @property
    def dtypes(self) -> tuple[Dtype, Dtype]:
        """Rollout and trainer dtype."""
        return pair_dtypes(self.pair)


class AuditOptions(Settings):
    """Settings of an audit."""

    TITLE: ClassVar[str] = "Audit"

    profile: Annotated[PathText, Option(metavar="NAME|FILE")] = Field(
        default="default", description="Limits: default, nemo-rl, verl, prime-rl, strict, or a TOML file."
    )
    planned_tokens: Annotated[
        Positive | None, Option(default="8 times the longest response here", metavar="TOKENS")
    ] = Field(default=None, description="Response length of the planned RL run.")
    step_tokens: Annotated[Positive | None, Option(default="128 planned responses", metavar="TOKENS")] = Field(
        default=None, description="Response tokens that a step's loss averages over; scales every gradient."
    )
    learning_rates: Annotated[
        Listed[Annotated[float, Field(gt=0)]], Option(flag="--learning-rate"), Field(min_length=1)
    ] = Field(default=(1e-6, 1e-5), description="Learning rates at which the engine's lag is computed.")
    pairs: Annotated[Listed[Pair], Option(flag="--pair", default="the recommended pair", metavar="ROLLOUT/TRAINER")] = (
        Field((), description="Pairs that decide the exit code; one dtype means both sides.")
    )
    strict: bool = Field(default=False, description="Exit with 3 on a warning, too.")

    @property
    def wanted_pairs(self) -> tuple[tuple[Dtype, Dtype], ...]:
        """The dtypes of `pairs`."""
        return tuple(pair_dtypes(pair) for pair in self.pairs)


class BaselineSettings(Settings):
    """What an audit is compared with."""

    TITLE: ClassVar[str] = "Baseline"

    baseline: Annotated[PathText | None, Option(path=True, metavar="AUDIT")] = Field(
        default=None, description="Older audit to compare with: its audit.json or run folder."
    )


class GradientOptions(Settings):
    """Settings of a gradient measurement."""

    TITLE: ClassVar[str] = "Gradient"

    predict_lengths: Annotated[
        Listed[Positive],
        Option(flag="--predict-length", default="those of the run, or its longest response", metavar="TOKENS"),
    ] = Field(default=(), description="Response lengths at which ESS is predicted.")


class ExperimentSettings(Settings):
    """With which weights recorded ids are scored again, to find the cause of a gap."""

    TITLE: ClassVar[str] = "Experiments"

    model: Annotated[PathText, Option(metavar="MODEL")] = Field(
        default="",
        description="The trainer's weights: built-in name, checkpoint folder or hub id. Without it none is run.",
    )
    older_checkpoint: Annotated[PathText | None, Option(path=True, metavar="FOLDER")] = Field(
        default=None, description="An earlier checkpoint of the same run."
    )
    base_model: Annotated[PathText | None, Option(metavar="MODEL")] = Field(
        default=None, description="The model that training began with."
    )
    adapter: Annotated[PathText | None, Option(path=True, metavar="FOLDER")] = Field(
        default=None, description="A LoRA adapter of --model, as PEFT saves it."
    )
    trainer_dtype: Annotated[DtypeName, Option(metavar="DTYPE")] = Field(
        default="float32", description="Dtype in which ids are scored."
    )
    engine_dtype: Annotated[DtypeName | None, Option(metavar="DTYPE")] = Field(
        default=None,
        description="Score ids in vLLM, too, in this dtype: by prefill, and decoded again. It starts the engine.",
    )
    tokens: Positive = Field(default=2500, description="Tokens that are scored, prompts included.")

    @model_validator(mode="after")
    def _of_a_model(self) -> Self:
        for name in ("older_checkpoint", "base_model", "adapter", "engine_dtype", "tokens"):
            if not self.model and name in self.changed:
                raise UsageError(f"{self.called(name)} is for experiments.", "Name the trainer's weights with --model.")
        return self
