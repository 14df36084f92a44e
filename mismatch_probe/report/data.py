"""What reports and figures show: of a comparison with its rollout × trainer matrix, of an RL run, and of a sweep."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mismatch_probe.passes import PassId
from mismatch_probe.types import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pandas as pd

    from mismatch_probe.metrics.curves import BinnedDiff, Ccdf, LengthCurve, PolicyDensity
    from mismatch_probe.metrics.groups import GroupResult
    from mismatch_probe.metrics.length_prediction import LengthForecast
    from mismatch_probe.report.model import TokenSequence
    from mismatch_probe.results.attribution import Attribution
    from mismatch_probe.results.comparison import Comparison, MissingPair, Pair, PairName
    from mismatch_probe.results.manifest import Manifest
    from mismatch_probe.results.rl_run import RlRun
    from mismatch_probe.results.sweep import RlSweep, SweepSummary
    from mismatch_probe.types import MetricValue

STRESS_NOTE = "injected stress, not precision"
DEFAULT_METRIC = "mean_abs_logprob_diff"
EXACT = "kl_exact"


@dataclass(frozen=True)
class Curves:
    """Curves of the diagonal pairs (rollout and trainer in the same dtype), each by dtype name, e.g. `"bfloat16"`.

    Attributes:
        density: μ(token) against π(token), counts on a grid.
        length: Sequence log ratio against response length, with its fit.
        ccdf: Share of tokens with |d| of at least so much.
        by_probability: Mean |d| by rollout probability μ(token).
        by_position: Mean |d| by position in the response.
        forecast: What longer responses would do to the sequence weights; on-policy pairs only.
    """

    density: dict[str, PolicyDensity] = field(default_factory=dict)
    length: dict[str, LengthCurve] = field(default_factory=dict)
    ccdf: dict[str, Ccdf] = field(default_factory=dict)
    by_probability: dict[str, BinnedDiff] = field(default_factory=dict)
    by_position: dict[str, BinnedDiff] = field(default_factory=dict)
    forecast: dict[str, LengthForecast] = field(default_factory=dict)


@dataclass(frozen=True)
class WorstToken:
    """One of the tokens with the largest |d| of a pair. Its text is raw model output; each renderer escapes it.

    Attributes:
        pair: What was compared, e.g. `"bfloat16"` or `"bfloat16 → float16"`.
        sequence_id: Sequence of the run's tables.
        prompt_id: Prompt that it answers.
        position: Index in the response, from 0.
        token_id: The token's id.
        token_text: The token, decoded by itself.
        context: Decoded text before the token, without the token.
        rollout_logprob: b, nats.
        trainer_logprob: a, nats.
        log_ratio: d = a − b, nats.
        contribution: This token's part of the pair's Σ d².
    """

    pair: str
    sequence_id: int
    prompt_id: str
    position: int
    token_id: int
    token_text: str
    context: str
    rollout_logprob: float
    trainer_logprob: float
    log_ratio: float
    contribution: float = 0.0


@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows.

    Attributes:
        summary: What the comparison found.
        manifest: Of the run.
        curves: Curves of the diagonal pairs.
        worst_tokens: Worst first within each pair.
        attribution: Where the gap of one pair arises; None where it has not been taken apart.
        tokens: Sequences for the token view.
        folder: The run's folder, for the commands that a report names.
    """

    summary: Comparison
    manifest: Manifest
    curves: Curves
    worst_tokens: list[WorstToken]
    attribution: Attribution | None = None
    tokens: tuple[TokenSequence, ...] = ()
    folder: Path = Path()


@dataclass(frozen=True)
class RlRunData:
    """What report and figure of an RL run show.

    Attributes:
        folder: Of the run, as commands name it.
        model: Name of the initial model.
        run: Its document, with a summary.
        steps: A row per step.
        precision: `BF16`, or `BF16/FP32` where rollout and trainer differ.
        algorithm, task, seed, learning_rate: As configured.
        planned: Steps that the run was asked for.
        exact: FP32 on both sides.
        stressed: Stress is injected.
        recorded: Whether `rollouts.parquet` exists.
    """

    folder: str
    model: str
    run: RlRun
    steps: pd.DataFrame
    precision: str
    algorithm: str
    task: str
    seed: int
    learning_rate: float
    planned: int
    exact: bool
    stressed: bool
    recorded: bool


@dataclass(frozen=True)
class SweepData:
    """What report and figures of a sweep show.

    Attributes:
        folder: Of the sweep, as commands name it.
        model: Name of the initial model.
        sweep: Its document.
        summary: The summary in it.
        task: Of all runs.
        runs: A row per planned run.
        steps: A row per step of every run.
    """

    folder: str
    model: str
    sweep: RlSweep
    summary: SweepSummary
    task: str
    runs: pd.DataFrame
    steps: pd.DataFrame


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


def steps_of(pair: Pair) -> list[GroupResult]:
    """The pair's training steps, in their order."""
    return [group for group in pair.groups if group.key == "step"]


def has_exact(summary: Comparison) -> bool:
    """Whether any pair has an exact KL."""
    return any(pair.metrics[EXACT].value is not None for pair in summary.pairs)


def noise_floor(summary: Comparison) -> MetricValue | None:
    """RMS error of float32 against a float64 reference, nats: what a float32 reference would blur. None without one."""
    # Whatever its engine; the text of a document that nobody made is no pass.
    if summary.reference is None or not summary.reference.endswith(str(PassId.trainer("", "float64"))):
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
