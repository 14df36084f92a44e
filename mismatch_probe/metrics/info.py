"""What the catalogue says of a metric. It needs no numpy, so that the command line's help stays cheap."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# Prompts from which 95 % intervals cover about 95 % under heavy tails (validation/coverage.py).
CALIBRATED_PROMPTS = 32
# Second moments of heavy tails need more. What a few huge weights decide is marked by these: `sample.few_decide`.
SECOND_MOMENT_PROMPTS = 64
INF = math.inf


@dataclass(frozen=True)
class Threshold:
    """A published threshold.

    Attributes:
        text: What it says.
        who: Who set it.
        above: Values of it beyond which a metric is too large, the mildest first; empty where the text alone says them.
        below: Values below which it is too small, the mildest first.
        of_size: Whether the size of a signed metric counts.
    """

    text: str
    who: str
    above: tuple[float, ...] = ()
    below: tuple[float, ...] = ()
    of_size: bool = False


@dataclass(frozen=True)
class MetricInfo:
    """A metric as tables, figures, reports and `docs/metrics.md` show it.

    Attributes:
        key: Name in every file, e.g. `"kl_k3"`.
        title: A few words for a heading or an axis.
        formula: In `SYMBOLS`.
        unit: `"nats"`, `"probability"`, …; empty for a pure number.
        level: Whether rows are tokens, sequences, or positions of which the full rows of logits were compared.
        needs_on_policy: True where the metric means nothing unless the rollout policy itself sampled the tokens.
        positive: True where the metric is ≥ 0 and is compared by ratio, on a logarithmic axis.
        has_interval: False for extremes, counts, k̂ and what has a test instead.
        bounds: What no value can lie beyond.
        calibrated_prompts: Below so many prompts its interval is marked uncalibrated.
        sign: What the sign or the size says.
        estimator: How it is computed, and when it fails.
        source: Where the definition comes from.
        names: What other frameworks call it, by framework.
        thresholds: What others have published.
    """

    key: str
    title: str
    formula: str
    unit: str
    level: Literal["token", "sequence", "exact"]
    needs_on_policy: bool = False
    positive: bool = False
    has_interval: bool = True
    bounds: tuple[float, float] = (-INF, INF)
    calibrated_prompts: int = CALIBRATED_PROMPTS
    sign: str = ""
    estimator: str = ""
    source: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    thresholds: tuple[Threshold, ...] = ()

    def __post_init__(self) -> None:
        if self.positive:
            object.__setattr__(self, "bounds", (max(self.bounds[0], 0.0), self.bounds[1]))
