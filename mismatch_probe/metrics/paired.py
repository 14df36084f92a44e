"""How many times larger a metric is in one pair than in another, paired by prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.errors import UsageError
from mismatch_probe.metrics.chunks import Ints
from mismatch_probe.metrics.intervals import Estimate, evaluate, join_why
from mismatch_probe.metrics.sample import Pair, count_nonfinite, finite_sequences, finite_tokens
from mismatch_probe.metrics.scales import exp
from mismatch_probe.metrics.sequence import sequence_metrics
from mismatch_probe.metrics.token import token_metrics
from mismatch_probe.types import MetricValue

# Positive smooth metrics, all worked out on the logarithmic scale, where a ratio is a difference.
PAIRED_KEYS = (
    "mean_abs_logprob_diff",
    "rms_logprob_diff",
    "mean_abs_prob_diff",
    "std_prob_diff",
    "kl_k2",
    "kl_k3",
    "js_k3",
    "seq_log_ratio_std",
)


def paired_ratio(numerator: Pair, denominator: Pair, key: str, *, seed: int = 0, replicates: int = 1000) -> MetricValue:
    """Metric `key` of `numerator` over that of `denominator`, over the prompts that both have.

    A replicate gives a prompt the same weight in both pairs, so what the prompts have in common cancels.

    Args:
        numerator: The pair above the line; needs `prompt_ids`.
        denominator: The pair below it; needs `prompt_ids`.
        key: One of `PAIRED_KEYS`.
        seed: Seed of the bootstrap.
        replicates: Bootstrap replicates.

    Returns:
        The ratio with its interval; None with the reason where either side has no value or the denominator is 0.

    Raises:
        UsageError: `key` cannot be compared by ratio, or a pair does not name its prompts.
    """
    if key not in PAIRED_KEYS:
        raise UsageError(f"{key} cannot be compared by ratio.", f"Choose one of {', '.join(PAIRED_KEYS)}.")
    rows_above, rows_below = _shared_prompts(numerator, denominator)
    above, below = _estimate(numerator, key), _estimate(denominator, key)
    for side, result in (("numerator", above), ("denominator", below)):
        if isinstance(result, MetricValue):
            return MetricValue(None, why=f"{side}: {result.why}")
    assert isinstance(above, Estimate)
    assert isinstance(below, Estimate)
    joint = _joint(above, below, rows_above, rows_below)
    shared = int(joint.live.sum())
    if shared == 0:
        return MetricValue(None, why="the pairs share no prompt")
    if not joint.sums[joint.live, above.sums.shape[1] :].any():
        return MetricValue(None, why=f"{key} of the denominator is 0")
    ratio = evaluate({key: joint}, seed=seed, replicates=replicates)[key]
    dropped = max(above.live.sum(), below.live.sum()) > shared
    nonfinite = count_nonfinite(numerator) + count_nonfinite(denominator)
    notes = (
        f"over the {shared} prompts that both pairs have" if dropped else "",
        f"without {nonfinite} tokens that are not finite" if nonfinite else "",
    )
    return replace(ratio, why=join_why(*notes, ratio.why))


def _estimate(pair: Pair, key: str) -> Estimate | MetricValue:
    token = token_metrics().get(key)
    if token is not None:
        tokens = finite_tokens(pair)
        return token(tokens) if len(tokens) else MetricValue(None, why="no finite tokens")
    sequences = finite_sequences(pair)
    return sequence_metrics()[key](sequences) if len(sequences) else MetricValue(None, why="no finite sequences")


def _shared_prompts(numerator: Pair, denominator: Pair) -> tuple[Ints, Ints]:
    """Rows of the shared prompts in either pair, in the same order."""
    if not numerator.prompt_ids or not denominator.prompt_ids:
        raise UsageError("A pair does not name its prompts.", "Fill prompt_ids, so that prompts can be matched.")
    row_below = {name: row for row, name in enumerate(denominator.prompt_ids)}
    matches = [(row, row_below[name]) for row, name in enumerate(numerator.prompt_ids) if name in row_below]
    rows = np.array(matches, dtype=np.int64).reshape(-1, 2)
    return rows[:, 0], rows[:, 1]


def _joint(above: Estimate, below: Estimate, rows_above: Ints, rows_below: Ints) -> Estimate:
    k = above.sums.shape[1]

    def working(means: NDArray[Any]) -> NDArray[Any]:
        difference: NDArray[Any] = above.working(means[..., :k]) - below.working(means[..., k:])
        return difference

    return Estimate(
        sums=np.hstack([above.sums[rows_above], below.sums[rows_below]]),
        counts=np.hstack([above.counts[rows_above], below.counts[rows_below]]),
        working=working,
        metric=exp,
    )
