"""Where a compared model lies on the axes of a dose–response figure. Imports no engine."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from mismatch_probe.config import check_lengths
from mismatch_probe.dtypes import dtype_label
from mismatch_probe.probes.analysis import analyse
from mismatch_probe.results.sweep import Place
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.types import MetricValue

_DRAWS = 4000


def places_of(path: Path, tokens: int, sequences: int) -> list[Place]:
    """A place for every precision that a comparison has on both sides.

    Args:
        path: Run directory of `compare`.
        tokens: Planned response length, at which ESS is predicted.
        sequences: Of a step of the sweep, whose sample ESS the arms show.

    Raises:
        TableError: The folder holds no run, or nothing in it can be compared.
        UsageError: The length cannot be.
    """
    check_lengths((tokens,))
    summary = analyse(RunDirectory.open(path)).report(predict_lengths=(tokens,), extrapolate=True).summary
    model = Path(summary.model).name
    found = []
    for dtype, length in summary.length.items():
        alike = [p for p in summary.pairs if p.rollout_dtype == p.trainer_dtype]
        pairs = [p for p in alike if p.rollout_dtype == dtype]
        if not pairs or not length.predictions:
            continue
        label = f"{model}, {dtype_label(dtype)}, {tokens:,} tokens"
        ess = length.predictions[0].values["ess_seq"]
        found.append(
            Place(
                label=label,
                dtype=pairs[0].rollout_dtype,
                predicted_ess=ess,
                ess_seq=_as_seen(ess, sequences),
                mean_abs_logprob_diff=pairs[0].metrics["mean_abs_logprob_diff"],
            )
        )
    return found


def sample_ess(ess: float, n: int) -> float:
    """What n sequences show on average of a policy's ESS, if log weights are normal.

    The sample ESS (Σw)²/(nΣw²) is at least 1/n and above the policy's, the more so the lower that is.

    Args:
        ess: 1 / E w², in [0, 1].
        n: Sequences.
    """
    variance = -math.log(max(ess, 1e-300))
    draws = np.random.default_rng(0).standard_normal((_DRAWS, n)) * math.sqrt(variance)
    weights = np.exp(draws - draws.max(axis=1, keepdims=True))
    return float((weights.sum(axis=1) ** 2 / (n * (weights**2).sum(axis=1))).mean())


def _as_seen(value: MetricValue, n: int) -> MetricValue:
    seen, low, high = (None if x is None else sample_ess(x, n) for x in (value.value, value.ci_low, value.ci_high))
    return MetricValue(seen, low, high, value.why)
