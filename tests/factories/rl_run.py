"""RL runs made by hand: steps, endings and the data of a report."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mismatch_probe.report.data import RlRunData
from mismatch_probe.results.finding import Finding
from mismatch_probe.results.manifest import Environment, Machine
from mismatch_probe.results.rl_run import Ending, Provenance, RlRun, TrainedModel
from mismatch_probe.rl.config import RlConfig, precision_label
from mismatch_probe.rl.summary import PHASES, run_findings, summarise

PROVENANCE = Provenance(
    created="2026-01-01T12:00:00+0000",
    device="cpu",
    model=TrainedModel(name="chain", revision=None, files={"model.safetensors": "0" * 64}),
    environment=Environment(
        versions={"torch": "2.11"},
        machine=Machine(cpu="a processor", cores=2, bf16_instructions=True, gpus=(), platform="Linux"),
        variables={},
    ),
)
CAUSES = {
    "rl-collapsed": {"step": 19, "best": 0.8, "best_step": 9, "present": 0.1, "window": 10},
    "rl-not-finite": {"step": 19, "what": "gradient of model.layers.0.weight"},
    "rl-impossible-logprob": {
        "step": 19,
        "side": "rollout",
        "sequence": 3,
        "position": 1,
        "value": 0.125,
        "tensor": None,
    },
    "rl-loss-scale-lost": {"step": 19, "loss_scale": 0.5, "minimum": 1.0},
}


def step(number: int, *, reward: float = 0.5, gap: float = 1e-3, ess: float = 0.99, **more: Any) -> dict[str, Any]:
    """A row of `steps.jsonl`."""
    return {
        "step": number,
        "reward": reward,
        "entropy": 0.4,
        "response_length": 12.0,
        "n_responses": 16,
        "n_truncated": 1,
        "n_grader_killed": 0,
        "n_empty": 0,
        "grad_norm": 0.2,
        "n_skipped": 0,
        "clip_fraction": 0.01,
        "mask_fraction": 0.0,
        "truncated_fraction": 0.0,
        "sync_gap": 5e-4,
        "weights_changed": 0.6,
        "mean_abs_logprob_diff": gap,
        "rms_logprob_diff": 2 * gap,
        "kl_k3": gap**2,
        "ess_token": ess,
        "ess_seq": ess,
        "off_policy_ess_seq": ess,
        "off_policy_mean_abs": gap,
        "staleness_mean_abs": 0.0,
        "movement_mean_abs": 2e-3,
        "clean_reward": None,
        **{f"seconds_{phase}": 1.0 for phase in PHASES},
        **more,
    }


def steps(rewards: Any, **more: Any) -> pd.DataFrame:
    """A row per step with these rewards."""
    return pd.DataFrame([step(i, reward=float(reward), **more) for i, reward in enumerate(rewards)])


def noisy(*levels: float, each: int = 10, spread: float = 0.03, seed: int = 0) -> list[float]:
    """`each` rewards around every level."""
    rng = np.random.default_rng(seed)
    return [float(level + spread * rng.standard_normal()) for level in levels for _ in range(each)]


def ending(cause: str = "", *, steps: int = 20, **more: Any) -> Ending:
    """An ending by the code of its cause; complete without one."""
    values: dict[str, Any] = {
        "status": "collapsed" if cause == "rl-collapsed" else "diverged" if cause else "complete",
        "cause": Finding(code=cause, severity="fail", values=CAUSES[cause]) if cause else None,
        "steps": steps,
        "last_healthy_checkpoint": "step-000010",
        "passed": False,
        "first_above_step": None,
        "clean_reward": None if cause else 0.6,
    }
    return Ending(**(values | more))


def run_data(rows: pd.DataFrame, ended: Ending | None, **settings: Any) -> RlRunData:
    """What a report shows of these steps."""
    config = RlConfig.of(settings)
    summary = summarise(rows, config)
    run = RlRun(
        **RlRun.stamp(),
        config=config.model_dump(),
        provenance=PROVENANCE,
        ending=ended,
        summary=summary,
        findings=run_findings(config, ended, summary),
    )
    return RlRunData(
        folder="runs/rl-chain",
        model="chain",
        run=run.model_copy(update={"tool_version": "1.0"}),
        steps=rows,
        precision=precision_label(config),
        algorithm=config.algorithm,
        task=config.task,
        seed=config.seed,
        learning_rate=config.learning_rate,
        planned=config.steps,
        exact=config.rollout_dtype == config.trainer_dtype == "float32",
        stressed=config.stress != "none",
        recorded=config.record_rollouts,
    )
