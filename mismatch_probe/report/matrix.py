"""Pairs, their numbers, and the rollout × trainer matrix of one metric, read from a summary."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mismatch_probe.types import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

DEFAULT_METRIC = "mean_abs_logprob_diff"
EXACT = "kl_exact"


@dataclass(frozen=True)
class Cell:
    """One pair's metric with its 95 % interval.

    Attributes:
        value: The estimate, None when there is none (then `why`).
        ci_low: Lower limit or None.
        ci_high: Upper limit or None.
        null: Mean |d| of an engine against itself, the larger of the two sides; None when not measured.
        why: Why there is no value, or what limits it.
    """

    value: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    null: float | None = None
    why: str = ""


@dataclass(frozen=True)
class Matrix:
    """Cells by (rollout label, trainer label), in the order of `rows` and `columns`."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]

    def cell(self, row: str, column: str) -> Cell:
        return self.cells.get((row, column), Cell(why="not run"))


def dtype_order(names: Iterable[str]) -> list[str]:
    """`names` without repeats, known dtypes first, from few bits to many."""
    unique = dict.fromkeys(names)
    known = [name for name in DTYPES if name in unique]
    return known + [name for name in unique if name not in known]


def trainer_modes(summary: Mapping[str, Any]) -> list[str]:
    """The trainer modes of a summary's pairs, present and missing, in order of appearance."""
    modes = (str(pair.get("trainer_mode") or "") for pair in _all_pairs(summary))
    return [mode for mode in dict.fromkeys(modes) if mode]


def trainer_label(pair: Mapping[str, Any], modes: list[str]) -> str:
    """`float16`, or `float16 (cast)` where `modes` holds more than one."""
    dtype = str(pair.get("trainer_dtype") or "?")
    mode = str(pair.get("trainer_mode") or "")
    return f"{dtype} ({mode})" if mode and len(modes) > 1 else dtype


def pair_label(pair: Mapping[str, Any], modes: list[str]) -> str:
    """`bfloat16 → float16`, with the trainer's mode where `modes` holds more than one."""
    return f"{pair.get('rollout_dtype') or '?'} → {trainer_label(pair, modes)}"


def diagonal_pairs(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The compared pairs of equal dtypes by label, few bits first. What a file recorded counts with every trainer."""
    modes = trainer_modes(summary)
    found: dict[str, Mapping[str, Any]] = {}
    for pair in ordered_pairs(summary):
        rollout, trainer = pair.get("rollout_dtype"), pair.get("trainer_dtype")
        if rollout == trainer:
            found.setdefault(trainer_label(pair, modes), pair)
        elif rollout == "recorded":
            found.setdefault(pair_label(pair, modes), pair)
    return found


def ordered_pairs(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The compared pairs by rollout dtype, then by trainer dtype, few bits first; otherwise in their order."""
    pairs: list[Mapping[str, Any]] = list(summary.get("pairs") or [])
    rollouts = dtype_order(str(pair.get("rollout_dtype")) for pair in pairs)
    trainers = dtype_order(str(pair.get("trainer_dtype")) for pair in pairs)
    return sorted(
        pairs,
        key=lambda pair: (
            rollouts.index(str(pair.get("rollout_dtype"))),
            trainers.index(str(pair.get("trainer_dtype"))),
        ),
    )


def reading(table: Mapping[str, Any] | None, key: str) -> Cell:
    """`key` of a pair's `metrics` or `budget`; without a value where the pair or the table lacks it."""
    row = (table or {}).get(key) or {}
    return Cell(row.get("value"), row.get("ci_low"), row.get("ci_high"), why=str(row.get("why") or ""))


def has_exact(summary: Mapping[str, Any]) -> bool:
    """Whether any pair has an exact KL."""
    return any(reading(pair.get("metrics"), EXACT).value is not None for pair in summary.get("pairs") or [])


def noise_floor(summary: Mapping[str, Any]) -> Cell | None:
    """RMS error of float32 against a float64 reference, nats: what a float32 reference would blur. None without one."""
    if "float64" not in str(summary.get("reference") or "").split("-"):
        return None
    pairs = [*diagonal_pairs(summary).values(), *ordered_pairs(summary)]
    float32 = (pair for pair in pairs if pair.get("trainer_dtype") == "float32")
    floors = (reading(pair.get("budget"), "trainer_error_rms") for pair in float32)
    return next((floor for floor in floors if floor.value is not None), None)


def null_of(pair: Mapping[str, Any]) -> float | None:
    """Mean |d| of an engine against itself, the larger of rollout and trainer; None when neither was measured."""
    sides = (pair.get("null") or {}).values()
    measured = [side.get("mean_abs_logprob_diff") for side in sides if side]
    return max((value for value in measured if value is not None), default=None)


def metric_matrix(summary: Mapping[str, Any], metric: str = DEFAULT_METRIC) -> Matrix:
    """The matrix of `metric`: rows are rollout dtypes, columns trainer dtypes, split by mode where a run has several.

    Of two pairs with the same labels the first is shown.
    """
    modes = trainer_modes(summary)
    everything = _all_pairs(summary)
    rows = dtype_order(str(pair.get("rollout_dtype") or "?") for pair in everything)
    by_dtype = dtype_order(str(pair.get("trainer_dtype") or "?") for pair in everything)
    labels = {trainer_label(pair, modes): str(pair.get("trainer_dtype") or "?") for pair in everything}
    columns = sorted(labels, key=lambda label: by_dtype.index(labels[label]))
    cells: dict[tuple[str, str], Cell] = {}
    for pair in everything:
        key = (str(pair.get("rollout_dtype") or "?"), trainer_label(pair, modes))
        cells.setdefault(key, _cell(pair, metric))
    return Matrix(tuple(rows), tuple(columns), cells)


def _all_pairs(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*(summary.get("pairs") or []), *(summary.get("missing") or [])]


def _cell(pair: Mapping[str, Any], metric: str) -> Cell:
    if "metrics" not in pair:
        return Cell(why=str(pair.get("why") or "missing"))
    found = reading(pair["metrics"], metric)
    why = found.why or ("" if found.value is not None else "not computed")
    return replace(found, null=null_of(pair), why=why)
