"""How many times larger a metric is in one pair than in another, paired by prompt.

A replicate gives a prompt the same weight in both pairs, so what the prompts have in common cancels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.errors import UsageError
from mismatch_probe.metrics.chunks import Ints
from mismatch_probe.metrics.inference import POWER, SIGNIFICANCE, holm
from mismatch_probe.metrics.intervals import Estimate, infer, join_why, metric_value
from mismatch_probe.metrics.sample import PairTokens, count_excluded, usable_sequences, usable_tokens
from mismatch_probe.metrics.scales import as_is, exp
from mismatch_probe.metrics.summary import sequence_metrics, token_metrics
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


@dataclass(frozen=True)
class PairedComparison:
    """One metric in two pairs, over the prompts that both have.

    Attributes:
        numerator: Name of the pair above the line, e.g. `"bfloat16"`.
        denominator: Name of the pair below it.
        key: The metric, one of `PAIRED_KEYS`.
        ratio: numerator / denominator with its interval; None with the reason where there is none.
        difference: numerator − denominator with its interval, in the metric's unit.
        n_prompts: Prompts that both pairs have.
        p_value: Two-sided, of the ratio being 1: below 0.05 exactly where the ratio's interval excludes 1. None below
            16 prompts and where the ratio has no interval.
        p_holm: The same adjusted over all comparisons of one call (Holm 1979).
        detectable_ratio: Smallest ratio above 1 that these data would have shown (5 % two-sided, unadjusted) with
            80 % probability; its inverse is the largest below 1.
        differs: Whether the two differ after the adjustment; None where that cannot be told.
    """

    numerator: str
    denominator: str
    key: str
    ratio: MetricValue
    difference: MetricValue
    n_prompts: int
    p_value: float | None = None
    p_holm: float | None = None
    detectable_ratio: float | None = None
    differs: bool | None = None


def compare_pairs(
    pairs: Mapping[str, PairTokens], keys: Sequence[str] = PAIRED_KEYS, *, seed: int = 0, replicates: int = 1000
) -> list[PairedComparison]:
    """Every metric of `keys` in every two of `pairs`, as one family of tests.

    Args:
        pairs: By name, e.g. by dtype; of two pairs the earlier one is the numerator. They need `prompt_ids`.
        keys: Some of `PAIRED_KEYS`.
        seed: Seed of the bootstrap.
        replicates: Bootstrap replicates.

    Raises:
        UsageError: A key cannot be compared by ratio, or a pair does not name its prompts.
    """
    for key in keys:
        if key not in PAIRED_KEYS:
            raise UsageError(f"{key} cannot be compared by ratio.", f"Choose one of {', '.join(PAIRED_KEYS)}.")
    metrics = {(name, key): _estimate(pair, key) for name, pair in pairs.items() for key in keys}
    cases: list[PairedComparison] = []
    ratios: dict[str, Estimate] = {}
    differences: dict[str, Estimate] = {}
    for above, below in combinations(pairs, 2):
        rows = _shared_prompts(pairs[above], pairs[below])
        excluded = count_excluded(pairs[above]) + count_excluded(pairs[below])
        for key in keys:
            joint = _joint_or_why(key, metrics[above, key], metrics[below, key], rows, excluded)
            nothing = MetricValue(None, why=joint if isinstance(joint, str) else "")
            n_prompts = 0 if isinstance(joint, str) else int(joint[0].live.sum())
            if not isinstance(joint, str):
                ratios[str(len(cases))], differences[str(len(cases))] = joint
            cases.append(PairedComparison(above, below, key, nothing, nothing, n_prompts))
    of_ratio = infer(ratios, seed=seed, replicates=replicates)
    of_difference = infer(differences, seed=seed, replicates=replicates)
    for name, inference in of_ratio.items():
        case = cases[int(name)]
        ratio = metric_value(case.key, ratios[name], inference)
        tested = ratio.ci_low is not None and np.isfinite(inference.centre)
        cases[int(name)] = replace(
            case,
            ratio=ratio,
            difference=metric_value(case.key, differences[name], of_difference[name]),
            p_value=inference.p_value(0.0) if tested else None,
            detectable_ratio=exp(inference.detectable(POWER)) if tested else None,
        )
    adjusted = holm([case.p_value for case in cases])
    return [
        replace(case, p_holm=p, differs=None if p is None else p < SIGNIFICANCE)
        for case, p in zip(cases, adjusted, strict=True)
    ]


def paired_ratio(
    numerator: PairTokens, denominator: PairTokens, key: str, *, seed: int = 0, replicates: int = 1000
) -> MetricValue:
    """Metric `key` of `numerator` over that of `denominator`, over the prompts that both have.

    The arguments are those of `compare_pairs`.

    Returns:
        The ratio with its interval; None with the reason where either side has no value or the denominator is 0.

    Raises:
        UsageError: `key` cannot be compared by ratio, or a pair does not name its prompts.
    """
    pairs = {"numerator": numerator, "denominator": denominator}
    return compare_pairs(pairs, [key], seed=seed, replicates=replicates)[0].ratio


def _estimate(pair: PairTokens, key: str) -> Estimate | MetricValue:
    token = token_metrics().get(key)
    if token is not None:
        tokens = usable_tokens(pair)
        return token(tokens) if len(tokens) else MetricValue(None, why="no usable tokens")
    sequences = usable_sequences(pair)
    return sequence_metrics()[key](sequences) if len(sequences) else MetricValue(None, why="no usable sequences")


def _shared_prompts(numerator: PairTokens, denominator: PairTokens) -> tuple[Ints, Ints]:
    """Rows of the shared prompts in either pair, in the same order."""
    if not numerator.prompt_ids or not denominator.prompt_ids:
        raise UsageError("A pair does not name its prompts.", "Fill prompt_ids, so that prompts can be matched.")
    row_below = {name: row for row, name in enumerate(denominator.prompt_ids)}
    matches = [(row, row_below[name]) for row, name in enumerate(numerator.prompt_ids) if name in row_below]
    rows = np.array(matches, dtype=np.int64).reshape(-1, 2)
    return rows[:, 0], rows[:, 1]


def _joint_or_why(
    key: str,
    above: Estimate | MetricValue,
    below: Estimate | MetricValue,
    rows: tuple[Ints, Ints],
    excluded: int,
) -> tuple[Estimate, Estimate] | str:
    """Estimates of the ratio and of the difference, or why there are none."""
    if isinstance(above, MetricValue):
        return f"numerator: {above.why}"
    if isinstance(below, MetricValue):
        return f"denominator: {below.why}"
    k = above.sums.shape[1]
    sums = np.hstack([above.sums[rows[0]], below.sums[rows[1]]])
    counts = np.hstack([above.counts[rows[0]], below.counts[rows[1]]])

    def log_ratio(means: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(above.working(means[..., :k]) - below.working(means[..., k:]))

    def difference(means: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(np.exp(above.working(means[..., :k])) - np.exp(below.working(means[..., k:])))

    ratio = Estimate(sums, counts, log_ratio, exp, least_prompts=max(above.least_prompts, below.least_prompts))
    shared = int(ratio.live.sum())
    if shared == 0:
        return "the pairs share no prompt"
    if not sums[ratio.live, k:].any():
        return f"{key} of the denominator is 0"
    notes = (
        f"over the {shared} prompts that both pairs have" if max(above.live.sum(), below.live.sum()) > shared else "",
        f"without {excluded} tokens that have no usable log-probs" if excluded else "",
    )
    ratio = replace(ratio, why=join_why(*notes))
    return ratio, replace(ratio, working=difference, metric=as_is)
