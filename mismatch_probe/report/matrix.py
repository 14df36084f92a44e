"""The rollout × trainer matrix of one metric, read from a summary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mismatch_probe.types import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

DEFAULT_METRIC = "mean_abs_logprob_diff"


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
    row = pair["metrics"].get(metric) or {}
    value = row.get("value")
    why = str(row.get("why") or ("" if value is not None else "not computed"))
    return Cell(value, row.get("ci_low"), row.get("ci_high"), null_of(pair), why)
