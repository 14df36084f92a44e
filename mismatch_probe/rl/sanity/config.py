"""What the construction of a sanity set is asked to do, checked without importing an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from mismatch_probe.rl.config import TaskSettings, checked

Accuracy = Annotated[float, Field(ge=0, le=1)]


class SanityConfig(TaskSettings):
    """One sanity set.

    Attributes:
        n_samples: Responses to each problem.
        keep: Bounds of the accuracy of the problems that are kept, both included.
    """

    n_samples: Annotated[int, Field(ge=2)] = 40
    keep: tuple[Accuracy, Accuracy] = (0.2, 0.8)

    @model_validator(mode="after")
    def _together(self) -> SanityConfig:
        if self.keep[0] > self.keep[1]:
            raise ValueError(f"keep ({self.keep[0]:g} {self.keep[1]:g}) names the upper bound first")
        return self

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def make_sanity_config(values: Mapping[str, Any]) -> SanityConfig:
    """Checks a configuration.

    Raises:
        UsageError: A key is unknown, or a value cannot be.
    """
    return checked(SanityConfig, values)
