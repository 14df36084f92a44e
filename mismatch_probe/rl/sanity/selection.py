"""Which problems a sanity set keeps, and what their accuracy is worth.

The construction is that of arXiv 2510.26788: sample n responses to each problem, keep those whose accuracy lies within
bounds. Accuracy of n samples is noisy, so a problem also gets in, or stays out, by luck, and the kept ones' sampled
accuracy regresses to the mean when they are sampled again. Samples that had no part in the selection tell by how much.

Shape legend: `P` problems, `S` responses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from mismatch_probe.metrics.intervals import share_interval

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
NOTE = (
    "Problems are chosen by a noisy accuracy, so the kept ones' accuracy as sampled regresses to the mean on fresh "
    "samples. The estimate lets one half of the samples choose and counts the other half, averaged over all ways to "
    "halve them: without that bias, for a choice by half as many samples."
)


def keeps(accuracy: Floats, keep: tuple[float, float]) -> NDArray[np.bool_]:
    """Whether an accuracy lies within the bounds, both included."""
    return np.asarray((accuracy >= keep[0]) & (accuracy <= keep[1]))


def split_half(right: Counts, n_samples: int, keep: tuple[float, float]) -> tuple[Floats, Floats]:
    """Lets ⌈n/2⌉ samples choose and counts the others, in expectation over all ways to split the samples.

    Of a problem with k right samples, m choosing ones hold J ~ Hypergeometric(n, k, m) of them; the n − m others then
    hold k − J. The others are independent of the choice, so the ratio of the sums over problems is free of selection.

    Args:
        right: `[P]` right responses of each problem.
        n_samples: n ≥ 2, responses to each problem.
        keep: The bounds.

    Returns:
        `[P]` right responses among those that count, and `[P]` responses that count; both 0 where no split chooses the
        problem.
    """
    m = n_samples - n_samples // 2
    chosen = np.arange(m + 1)
    chance = stats.hypergeom.pmf(chosen, n_samples, right[:, None], m) * keeps(chosen / m, keep)
    counted = chance.sum(axis=1) * (n_samples - m)
    return np.asarray((chance * (right[:, None] - chosen)).sum(axis=1)), np.asarray(counted)


def statistics(
    right: Counts, n_samples: int, keep: tuple[float, float], lengths: Counts, truncated: NDArray[np.bool_]
) -> dict[str, Any]:
    """What is said of a set.

    Args:
        right: `[P]` right responses of each problem.
        n_samples: Responses to each problem.
        keep: The bounds.
        lengths: `[S]` tokens of each response.
        truncated: `[S]` whether it used up its budget.

    Returns:
        JSON: counts of problems, `problems_by_right` (how many problems have 0, 1, … n right responses), accuracies
        with their 95 % intervals over problems where they have one, lengths and truncation of the responses.
    """
    accuracy = right / n_samples
    kept = keeps(accuracy, keep)
    hits, counts = split_half(right, n_samples, keep)
    interval = share_interval(hits, counts) if counts.sum() else None
    return {
        "n_problems": len(right),
        "n_kept": int(kept.sum()),
        "n_below": int((accuracy < keep[0]).sum()),
        "n_above": int((accuracy > keep[1]).sum()),
        "n_samples": n_samples,
        "keep": list(keep),
        "problems_by_right": np.bincount(right, minlength=n_samples + 1).tolist(),
        "accuracy": float(accuracy.mean()),
        "accuracy_of_kept_as_sampled": float(accuracy[kept].mean()) if kept.any() else None,
        "accuracy_of_kept_estimate": {
            "value": float(hits.sum() / counts.sum()) if counts.sum() else None,
            "ci_low": interval[0] if interval else None,
            "ci_high": interval[1] if interval else None,
            "note": NOTE,
        },
        "response_tokens": {
            "mean": float(lengths.mean()),
            "median": float(np.median(lengths)),
            "p90": float(np.quantile(lengths, 0.9)),
            "max": int(lengths.max()),
        },
        "truncated_share": float(truncated.mean()),
    }
