"""Pairs, their numbers, and the rollout × trainer matrix of a summary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mismatch_probe.passes import PassId
from mismatch_probe.types import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mismatch_probe.results.comparison import Comparison, MissingPair, Pair, PairName
    from mismatch_probe.types import MetricValue

DEFAULT_METRIC = "mean_abs_logprob_diff"
EXACT = "kl_exact"


@dataclass(frozen=True)
class Matrix:
    """Pairs by (rollout label, trainer label), in the order of `rows` and `columns`."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    pairs: Mapping[tuple[str, str], Pair | MissingPair]


def dtype_order(names: Iterable[str]) -> list[str]:
    """`names` without repeats, known dtypes first, from few bits to many."""
    unique = dict.fromkeys(names)
    known = [name for name in DTYPES if name in unique]
    return known + [name for name in unique if name not in known]


def trainer_modes(pairs: Iterable[PairName]) -> list[str]:
    """The trainer modes of pairs, in order of appearance."""
    return list(dict.fromkeys(pair.trainer_mode for pair in pairs))


def modes_of(summary: Comparison) -> list[str]:
    """The trainer modes of a summary's pairs, present and missing, in order of appearance."""
    return trainer_modes(_all_pairs(summary))


def trainer_label(pair: PairName, modes: Sequence[str]) -> str:
    """`float16`, or `float16 (cast)` where `modes` holds more than one."""
    return f"{pair.trainer_dtype} ({pair.trainer_mode})" if len(modes) > 1 else pair.trainer_dtype


def pair_label(pair: PairName, modes: Sequence[str]) -> str:
    """`bfloat16 → float16`, with the trainer's mode where `modes` holds more than one."""
    return f"{pair.rollout_dtype} → {trainer_label(pair, modes)}"


def diagonal_pairs(summary: Comparison) -> dict[str, Pair]:
    """The compared pairs of equal dtypes by label, few bits first. What a file recorded counts with every trainer."""
    modes = modes_of(summary)
    found: dict[str, Pair] = {}
    for pair in ordered_pairs(summary):
        if pair.rollout_dtype == pair.trainer_dtype:
            found.setdefault(trainer_label(pair, modes), pair)
        elif pair.rollout_dtype == "recorded":
            found.setdefault(pair_label(pair, modes), pair)
    return found


def ordered_pairs(summary: Comparison) -> list[Pair]:
    """The compared pairs by rollout dtype, then by trainer dtype, few bits first; otherwise in their order."""
    rollouts = dtype_order(pair.rollout_dtype for pair in summary.pairs)
    trainers = dtype_order(pair.trainer_dtype for pair in summary.pairs)
    return sorted(
        summary.pairs, key=lambda pair: (rollouts.index(pair.rollout_dtype), trainers.index(pair.trainer_dtype))
    )


def has_exact(summary: Comparison) -> bool:
    """Whether any pair has an exact KL."""
    return any(pair.metrics[EXACT].value is not None for pair in summary.pairs)


def noise_floor(summary: Comparison) -> MetricValue | None:
    """RMS error of float32 against a float64 reference, nats: what a float32 reference would blur. None without one."""
    if summary.reference is None or PassId.parse(summary.reference).dtype != "float64":
        return None
    pairs = [*diagonal_pairs(summary).values(), *ordered_pairs(summary)]
    budgets = (pair.budget for pair in pairs if pair.trainer_dtype == "float32" and pair.budget is not None)
    floors = (budget["trainer_error_rms"] for budget in budgets if "trainer_error_rms" in budget)
    return next((floor for floor in floors if floor.value is not None), None)


def matrix_of(summary: Comparison) -> Matrix:
    """Rows are rollout dtypes, columns trainer dtypes, split by mode where a run has several.

    Of two pairs with the same labels the first is shown.
    """
    everything = _all_pairs(summary)
    modes = trainer_modes(everything)
    rows = dtype_order(pair.rollout_dtype for pair in everything)
    by_dtype = dtype_order(pair.trainer_dtype for pair in everything)
    labels = {trainer_label(pair, modes): pair.trainer_dtype for pair in everything}
    columns = sorted(labels, key=lambda label: by_dtype.index(labels[label]))
    pairs: dict[tuple[str, str], Pair | MissingPair] = {}
    for pair in everything:
        pairs.setdefault((pair.rollout_dtype, trainer_label(pair, modes)), pair)
    return Matrix(tuple(rows), tuple(columns), pairs)


def _all_pairs(summary: Comparison) -> list[Pair | MissingPair]:
    return [*summary.pairs, *summary.missing]
