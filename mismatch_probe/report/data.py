"""What reports and figures show: of a comparison, of an RL run, and of a sweep."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from mismatch_probe.metrics.curves import BinnedDiff, Ccdf, LengthCurve, PolicyDensity
    from mismatch_probe.metrics.length_prediction import LengthForecast
    from mismatch_probe.report.model import TokenSequence
    from mismatch_probe.results.attribution import Attribution
    from mismatch_probe.results.comparison import Comparison
    from mismatch_probe.results.manifest import Manifest
    from mismatch_probe.results.rl_run import RlRun
    from mismatch_probe.results.sweep import RlSweep, SweepSummary


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


STRESS_NOTE = "injected stress, not precision"


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
