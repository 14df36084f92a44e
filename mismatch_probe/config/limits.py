"""Limits on metrics: `--fail-on`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from mismatch_probe.dtypes import SHORT_DTYPES
from mismatch_probe.errors import UsageError
from mismatch_probe.types import DTYPES

# Stands where a dtype would for log-probs that a file brings.
RECORDED = "recorded"


@dataclass(frozen=True)
class Limit:
    """One `--fail-on`: `metric>value` or `metric<value`, with an optional `@rollout/trainer` (one dtype means both)."""

    text: str
    metric: str
    above: bool
    bound: float
    rollout_dtype: str | None
    trainer_dtype: str | None

    _PATTERN = re.compile(r"^\s*([\w.]+)\s*([<>])\s*([^@\s]+)\s*(?:@\s*(\w+)(?:/(\w+))?)?\s*$")

    @classmethod
    def parse(cls, text: str, known_metrics: Sequence[str]) -> Limit:
        """Reads one limit.

        Raises:
            UsageError: It has another form, or names an unknown metric or dtype.
        """
        match = cls._PATTERN.match(text)
        example = "Write for example --fail-on 'kl_k3>0.001@bfloat16/bfloat16'."
        if match is None:
            raise UsageError(f"--fail-on {text!r} is not of the form metric>value[@rollout/trainer].", example)
        metric, sign, number = match.groups()[:3]
        rollout, trainer = (SHORT_DTYPES.get(name, name) for name in match.groups()[3:])
        if metric not in known_metrics:
            factor = metric.partition("frac_ratio_beyond_")[2]
            fix = f"Add --ratio-limit {factor}." if factor else f"Known are: {', '.join(known_metrics)}."
            raise UsageError(f"--fail-on names the unknown metric {metric!r}.", fix)
        for dtype in (rollout, trainer):
            if dtype is not None and dtype not in (*DTYPES, RECORDED):
                known = ", ".join((*DTYPES, RECORDED))
                raise UsageError(f"--fail-on names the unknown dtype {dtype!r}.", f"Known are: {known}.")
        try:
            bound = float(number)
        except ValueError:
            bound = math.nan
        if not math.isfinite(bound):
            raise UsageError(f"--fail-on {text!r} has no finite number.", example)
        return cls(text.strip(), metric, sign == ">", bound, rollout, trainer or rollout)

    def applies_to(self, rollout_dtype: str, trainer_dtype: str) -> bool:
        return self.rollout_dtype in (None, rollout_dtype) and self.trainer_dtype in (None, trainer_dtype)

    def exceeded_by(self, value: float) -> bool:
        return value > self.bound if self.above else value < self.bound
