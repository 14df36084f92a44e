"""Which problems a sanity set keeps, and what their accuracy is worth.

The construction is that of arXiv 2510.26788: sample n responses to each problem, keep those whose accuracy lies within
bounds. Accuracy of n samples is noisy, so a problem also gets in, or stays out, by luck, and the kept ones' sampled
accuracy regresses to the mean when they are sampled again. Samples that had no part in the selection tell by how much.

Shape legend: `P` problems, `S` responses.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mismatch_probe.metrics.intervals import share_interval
from mismatch_probe.results.finding import Finding, Value
from mismatch_probe.results.sanity import ResponseLengths, SanityOutcome
from mismatch_probe.types import MetricValue

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
# From this fraction of truncated responses on, the budget may be why problems are not solved.
_TRUNCATED = 0.5


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


def outcome_of(
    right: Counts,
    n_samples: int,
    keep: tuple[float, float],
    lengths: Counts,
    truncated: NDArray[np.bool_],
    n_grader_killed: int = 0,
) -> SanityOutcome:
    """What is said of a set.

    Args:
        right: `[P]` right responses of each problem.
        n_samples: Responses to each problem.
        keep: The bounds.
        lengths: `[S]` tokens of each response.
        truncated: `[S]` whether it used up its budget.
        n_grader_killed: Responses graded 0 because their grader was stopped.
    """
    accuracy = right / n_samples
    kept = keeps(accuracy, keep)
    hits, counts = leave_one_out(right, n_samples, keep)
    limits = (share_interval(hits, counts) if counts.sum() else None) or (None, None)
    estimate = MetricValue(None, why="no problem is chosen when one of its samples is set aside")
    return SanityOutcome(
        n_problems=len(right),
        n_kept=int(kept.sum()),
        n_below=int((accuracy < keep[0]).sum()),
        n_above=int((accuracy > keep[1]).sum()),
        n_samples=n_samples,
        keep=keep,
        problems_by_right=tuple(np.bincount(right, minlength=n_samples + 1).tolist()),
        accuracy=float(accuracy.mean()),
        accuracy_of_kept_as_sampled=float(accuracy[kept].mean()) if kept.any() else None,
        accuracy_of_kept_estimate=(
            MetricValue(float(hits.sum() / counts.sum()), *limits) if counts.sum() else estimate
        ),
        response_tokens=ResponseLengths(
            mean=float(lengths.mean()),
            median=float(np.median(lengths)),
            p90=float(np.quantile(lengths, 0.9)),
            max=int(lengths.max()),
        ),
        truncated_fraction=float(truncated.mean()),
        n_grader_killed=n_grader_killed,
    )


def findings_of(outcome: SanityOutcome) -> Iterator[Finding]:
    """What was kept first, then what limits it."""
    low, high = outcome.keep
    values: dict[str, Value] = {
        "kept": outcome.n_kept,
        "tried": outcome.n_problems,
        "low": low,
        "high": high,
        "n_samples": outcome.n_samples,
    }
    if not outcome.n_kept:
        yield Finding(code="sanity-nothing-kept", severity="warn", values=values)
    else:
        yield Finding(code="sanity-kept", severity="info", values=values)
    estimate = outcome.accuracy_of_kept_estimate
    if outcome.accuracy_of_kept_as_sampled is not None and estimate.value is not None:
        accuracies: dict[str, Value] = {"as_sampled": outcome.accuracy_of_kept_as_sampled, "estimate": estimate}
        yield Finding(code="sanity-accuracy", severity="info", values=accuracies)
    if outcome.truncated_fraction >= _TRUNCATED:
        yield Finding(code="sanity-truncated", severity="note", values={"fraction": outcome.truncated_fraction})
    if outcome.n_grader_killed:
        yield Finding(code="sanity-grader-stopped", severity="note", values={"responses": outcome.n_grader_killed})
