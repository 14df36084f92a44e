"""Findings: what was found, as a code and its numbers. `report.words` turns a code into a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from mismatch_probe.results.base import Result
from mismatch_probe.types import MetricValue

Severity = Literal["info", "note", "warn", "fail"]
Value = MetricValue | bool | int | float | str | None | tuple[str, ...] | dict[str, MetricValue] | dict[str, float]


class Finding(Result):
    """A coded statement with its numbers.

    Computing layers make findings and write no prose. Every code is registered once in `report.words`, with its
    meaning, its values and what to do.
    """

    code: str
    """What was found, in kebab case, e.g. `"bf16-over-fp16"`."""
    severity: Severity
    """`info`: a result; `note`: limits the numbers; `warn` and `fail`: act on it."""
    where: str = ""
    """The pair, tensor, setting or arm that it is about, empty for the whole document."""
    values: Mapping[str, Value] = {}
    """The numbers behind it, by name."""

    def metric(self, name: str) -> MetricValue:
        """A value with its interval.

        Raises:
            TypeError: The value is no such thing.
        """
        value = self.values[name]
        if not isinstance(value, MetricValue):
            raise TypeError(f"{self.code}: {name} is no metric value")
        return value

    def metrics(self, name: str) -> dict[str, MetricValue]:
        """Values with their intervals, by what they are of.

        Raises:
            TypeError: The value is no such thing.
        """
        value = self.values[name]
        if not isinstance(value, dict):
            raise TypeError(f"{self.code}: {name} is no mapping")
        return {key: one for key, one in value.items() if isinstance(one, MetricValue)}

    def number(self, name: str) -> float:
        """A number.

        Raises:
            TypeError: The value is no such thing.
        """
        value = self.values[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{self.code}: {name} is no number")
        return value

    def whole(self, name: str) -> int:
        """A number of things.

        Raises:
            TypeError: The value is no such thing.
        """
        return int(self.number(name))

    def maybe(self, name: str) -> float | None:
        """A number, None where it is absent or None."""
        return None if self.values.get(name) is None else self.number(name)

    def text(self, name: str) -> str:
        """A text; empty where it is absent or None."""
        value = self.values.get(name)
        return "" if value is None else str(value)

    def names(self, name: str) -> tuple[str, ...]:
        """A list of texts.

        Raises:
            TypeError: The value is no such thing.
        """
        value = self.values[name]
        if not isinstance(value, tuple):
            raise TypeError(f"{self.code}: {name} is no list")
        return value
