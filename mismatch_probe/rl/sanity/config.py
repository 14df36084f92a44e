"""What the construction of a sanity set is asked to do, checked without importing an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mismatch_probe.config import SHORT_DTYPES
from mismatch_probe.rl.config import Positive, checked
from mismatch_probe.types import Dtype

Accuracy = Annotated[float, Field(ge=0, le=1)]


class SanityConfig(BaseModel):
    """One sanity set.

    Attributes:
        model: As in `rl.config.RlConfig`, like `revision`, `task`, `problems`, `chat`, `operations`.
        n_problems: How many problems are tried; None for all of a file, or 128 drawn ones.
        n_samples: Responses to each problem.
        keep: Bounds of the accuracy of the problems that are kept, both included.
        max_tokens: Response budget; a response that uses it up is wrong.
        temperature: Sampling temperature.
        rollout_dtype: What vLLM runs in.
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
    n_samples: Annotated[int, Field(ge=2)] = 40
    keep: tuple[Accuracy, Accuracy] = (0.2, 0.8)
    max_tokens: Positive = 64
    temperature: Annotated[float, Field(gt=0)] = 1.0
    rollout_dtype: Dtype = "bfloat16"
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    kv_cache_gib: Positive = 1

    @field_validator("rollout_dtype", mode="before")
    @classmethod
    def _long_name(cls, value: Any) -> Any:
        return SHORT_DTYPES.get(value, value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _together(self) -> SanityConfig:
        if self.keep[0] > self.keep[1]:
            raise ValueError(f"keep ({self.keep[0]:g} {self.keep[1]:g}) names the upper bound first")
        if self.task == "math" and self.problems is None:
            raise ValueError("problems must name a JSONL file for the task math")
        return self

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def make_sanity_config(values: Mapping[str, Any]) -> SanityConfig:
    """Checks a configuration.

    Raises:
        UsageError: A key is unknown, or a value cannot be.
    """
    return checked(SanityConfig, values)
