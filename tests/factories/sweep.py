"""Sweeps made by hand: arms, comparisons and the data of a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from mismatch_probe.metrics.arms import Arm, ArmComparison, Run, compare_sweep
from mismatch_probe.metrics.dose import DosedArm, DoseResponse, dose_response
from mismatch_probe.report.data import SweepData
from mismatch_probe.results.sweep import ArmResult, Place, RlSweep, SweepRun, SweepSummary
from mismatch_probe.rl.plan import make_runs
from mismatch_probe.rl.sweep_summary import sweep_findings
from mismatch_probe.types import MetricValue
from tests.factories.rl_run import PROVENANCE, noisy, steps

CLEAR = (0.1, 0.11, 0.12, 0.09, 0.1, 0.13, 0.08, 0.1, 0.12, 0.1)
NOISE = (0.1, -0.1, 0.12, -0.09, 0.1, -0.13, 0.08, -0.1)
PLANNED = make_runs(
    {"steps": 20, "collapse_window": 10},
    [{"precision": ["bf16", "fp32"], "stress": ["none", "weight-noise:0.2"], "seeds": 2}],
)


def value(x: float | None, half: float = 0.05) -> MetricValue:
    return MetricValue(None, why="no runs") if x is None else MetricValue(x, x - half, x + half)


def arm(
    name: str = "a",
    *,
    precision: str = "float32",
    structure: str = "none",
    dose: float = 0.0,
    remedy: str = "none",
    ess: float | None = 0.5,
    gap: float = 0.01,
    reward: float | None = 0.8,
    n_runs: int = 4,
    collapsed: int = 0,
    diverged: int = 0,
) -> ArmResult:
    """An arm; its label is its name in capitals."""
    return ArmResult(
        arm=name,
        label=name.upper(),
        family="FAMILY",
        precision=precision if structure == "none" else "",
        structure=structure,
        dose=dose,
        remedy=remedy,
        n_runs=n_runs,
        n_collapsed=collapsed,
        n_diverged=diverged,
        ess_seq=value(ess),
        mean_abs_logprob_diff=MetricValue(gap),
        reward=value(reward),
        clean_reward=value(0.9),
        reward_kept=value(0.95),
    )


ARMS = (
    arm("bf16", precision="bfloat16", ess=0.9),
    arm("noise2", structure="weight-noise", dose=0.2, ess=0.3, reward=0.4, collapsed=2),
    arm("noise1", structure="weight-noise", dose=0.1, ess=0.6, reward=0.7),
    arm("mantissa", structure="mantissa", dose=3, ess=0.61, reward=0.75),
    arm("nowhere", ess=None),
)
PLACE = Place(
    label="mine, BF16, 2,048 tokens",
    dtype="bfloat16",
    predicted_ess=MetricValue(0.3),
    ess_seq=MetricValue(0.42, 0.3, 0.5),
    mean_abs_logprob_diff=MetricValue(0.04),
)


def runs(name: str, rewards: Sequence[float], collapsed: int = 0) -> Arm:
    """Runs of consecutive seeds, the first of them collapsed."""
    return Arm(name, tuple(Run(seed, reward, seed < collapsed) for seed, reward in enumerate(rewards)))


def comparison(name: str, differences: Sequence[float], collapsed: int = 0) -> tuple[Arm, Arm]:
    """Arms with these differences of final reward, to be compared."""
    base = [0.5 + 0.01 * i for i in range(len(differences))]
    first = runs(name, [b + d for b, d in zip(base, differences, strict=True)], collapsed)
    return first, runs("REFERENCE", base)


def compared(*pairs: tuple[Arm, Arm]) -> tuple[ArmComparison, ...]:
    return tuple(compare_sweep(pairs))


def matched() -> DoseResponse:
    """Two pairs of arms of equal ESS, tested."""
    arms = [("BF16", "precision", 0.9, 0.8), ("NOISE", "weight-noise", 0.9, 0.6), ("MANTISSA", "mantissa", 0.5, 0.6)]
    arms += [("LOGITS", "logit-noise", 0.5, 0.61), ("FP32", "precision", 1.0, 0.9)]
    dosed = [
        DosedArm(runs(name, noisy(reward, each=8, seed=seed)), kind, (ess,) * 8, (1 - ess + 0.01,) * 8)
        for seed, (name, kind, ess, reward) in enumerate(arms)
    ]
    return dose_response(dosed, replicates=100)


def summary(**changes: Any) -> SweepSummary:
    arms = changes.get("arms", ARMS)
    ended = sum(one.n_runs for one in arms)
    values: dict[str, Any] = {
        "window": 10,
        "n_sequences": 64,
        "max_tokens": 64,
        "n_planned": ended,
        "n_ended": ended,
        "failures": {},
        "arms": arms,
        "comparisons": (),
        "dose_response": None,
        "places": (),
    }
    return SweepSummary(**(values | changes))


def sweep_data(shown: SweepSummary, rows: pd.DataFrame | None = None) -> SweepData:
    """What a report shows of this summary; tables are of `PLANNED`."""
    planned = tuple(SweepRun(name=run.name, arm=run.arm, config=run.config.model_dump()) for run in PLANNED)
    document = RlSweep(
        **RlSweep.stamp(),
        runs=planned,
        provenance=PROVENANCE,
        summary=shown,
        findings=sweep_findings(shown),
    )
    table = pd.DataFrame(
        {
            "run": run.name,
            "arm": run.arm,
            "stress": run.config.stress,
            "status": "collapsed" if run.config.seed and run.config.dose else "complete",
            "why": "",
            "steps": 20,
            "final_reward": 0.5,
        }
        for run in PLANNED
    )
    return SweepData(
        folder="runs/rl-sweep",
        model="chain",
        sweep=document.model_copy(update={"tool_version": "1.0"}),
        summary=shown,
        task="chain",
        runs=table,
        steps=steps(noisy(0.3, 0.6)).assign(arm="bf16", seed=0) if rows is None else rows,
    )
