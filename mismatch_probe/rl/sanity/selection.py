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

from mismatch_probe.metrics.intervals import share_interval

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
NOTE = (
    "Problems are chosen by a noisy accuracy, so the kept ones' accuracy as sampled regresses to the mean on fresh "
    "samples. The estimate lets all samples of a problem but one choose and counts the one, averaged over which it is: "
    "without that bias, for a choice by one sample less."
)


def keeps(accuracy: Floats, keep: tuple[float, float]) -> NDArray[np.bool_]:
    """Whether an accuracy lies within the bounds, both included."""
    return np.asarray((accuracy >= keep[0]) & (accuracy <= keep[1]))


def leave_one_out(right: Counts, n_samples: int, keep: tuple[float, float]) -> tuple[Floats, Floats]:
    """Lets n − 1 samples choose and counts the other one, in expectation over which it is.

    It is right with chance k/n, of a problem with k right samples, and then k − 1 of the choosing ones are. It is
    independent of the choice, so the ratio of the sums over problems is free of selection. Fewer choosing samples would
    estimate the accuracy of another set, since a noisier choice lets in more of the problems outside the bounds.

    Args:
        right: `[P]` right responses of each problem.
        n_samples: n ≥ 2, responses to each problem.
        keep: The bounds.

    Returns:
        `[P]` expected right responses among those that count, and `[P]` expected responses that count, at most 1; both
        0 where the problem is never chosen.
    """
    share, others = right / n_samples, n_samples - 1
    hits = share * keeps((right - 1) / others, keep)
    return hits, hits + (1 - share) * keeps(right / others, keep)


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
    hits, counts = leave_one_out(right, n_samples, keep)
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
