"""The RL loop and its weight sync on a CUDA device, around the rollout engine of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mismatch_probe.engines.events import InRun, RunEnded
from mismatch_probe.results.rl_run import Ending
from mismatch_probe.rl.config import RlConfig
from mismatch_probe.rl.policy import Policy
from mismatch_probe.rl.records import RlDirectory
from mismatch_probe.rl.sync import SyncError, WeightSync
from mismatch_probe.rl.worker import RlJob
from mismatch_probe.runs.folder import RL_RUN
from tests.conftest import Heard
from tests.factories.rl_run import PROVENANCE
from tests.real.rl_jobs import Tampering, engine_job

pytestmark = [pytest.mark.gpu, pytest.mark.engine]
DTYPES = ["float32", "bfloat16", "float16"]
SMALL: dict[str, Any] = {
    "rollout_engine": "hf",
    "steps": 2,
    "n_problems": 8,
    "prompts_per_step": 4,
    "samples_per_prompt": 4,
    "updates_per_rollout": 1,
    "checkpoint_every": 1,
}


def run(folder: Path, source: Path, **options: Any) -> tuple[Ending, Any]:
    """A run from the start, or from the newest checkpoint; how it ended, and its steps."""
    if not RL_RUN.held_by(folder):
        RlDirectory.create(folder, RlConfig.of({**SMALL, **options}), PROVENANCE)
    channel = Heard()
    RlJob([str(folder)], str(source), "cuda").run(channel)
    (ending,) = (event.event for event in channel.of(InRun) if isinstance(event.event, RunEnded))
    return ending.ending, RlDirectory.open(folder).steps()


@pytest.mark.parametrize(
    ("dtype", "mode"),
    [("float32", "cast"), ("bfloat16", "autocast"), ("float16", "autocast"), ("bfloat16", "cast"), ("float16", "cast")],
)
def test_a_run_ends_and_its_first_update_scores_as_the_pass_before_it(
    chain: Path, tmp_path: Path, dtype: str, mode: str
) -> None:
    options = {"trainer_dtype": dtype, "rollout_dtype": dtype, "trainer_mode": mode, "initial_loss_scale": 256.0}
    ending, steps = run(tmp_path / "run", chain, **options)
    assert ending.status == "complete"
    assert ending.clean_reward is not None
    assert 0 <= ending.clean_reward <= 1
    assert (steps["movement_mean_abs"] == 0).all()
    limit = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1}[dtype]
    assert (steps["mean_abs_logprob_diff"] < limit).all()
    assert (steps["sync_gap"] < limit).all()
    assert (steps["n_skipped"] == 0).all()
    assert (steps["grad_norm"] > 0).any()


@pytest.mark.parametrize("stress", [{"stress": "stale", "dose": 2}, {"stress": "mantissa", "dose": 7}])
def test_a_run_resumes_from_its_checkpoint(chain: Path, tmp_path: Path, stress: dict[str, Any]) -> None:
    exact = {"trainer_dtype": "float32", "rollout_dtype": "float32", "steps": 3, **stress}
    whole = run(tmp_path / "whole", chain, **exact)[1]
    part = tmp_path / "part"
    run(part, chain, **{**exact, "steps": 2})
    document = RlDirectory.open(part).document
    more = {"config": document.config | {"steps": 3}, "ending": None}
    document.model_copy(update=more).write(part / "run.json")
    resumed = run(part, chain)[1]
    assert resumed["step"].tolist() == whole["step"].tolist()
    assert resumed["reward"].tolist() == pytest.approx(whole["reward"].tolist())
    assert resumed["grad_norm"].tolist() == pytest.approx(whole["grad_norm"].tolist(), rel=1e-3)


@pytest.mark.parametrize(("dtype", "step_size"), [("float32", 1e-3), ("bfloat16", 6e-3), ("float16", 1e-3)])
def test_sync_faults_are_named(chain: Path, dtype: Any, step_size: float) -> None:
    engine = Tampering(engine_job(str(chain), dtype, "cuda", "hf").started())
    policy = Policy(str(chain), RlConfig(trainer_dtype="float32"), torch.device("cuda"))
    draw = torch.Generator().manual_seed(1)
    probes = torch.randint(3, 20, (8, 24), generator=draw).tolist()
    sync = WeightSync(engine, policy, dtype, probes, check=True, fresh=True, scan_every=1)

    def move() -> None:
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter.add_(step_size * torch.randn(parameter.shape, generator=draw).to(parameter))

    move()
    gap = sync.send(policy.weights()).gap
    assert gap is not None
    assert gap < {"float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-1}[dtype]
    move()
    engine.tamper = lambda weights: {}
    with pytest.raises(SyncError, match="stale"):
        sync.send(policy.weights())
    victim = "model.layers.1.mlp.down_proj.weight"
    engine.tamper = lambda weights: weights
    sync.resend(policy.weights())
    move()
    engine.tamper = lambda weights: {k: v for k, v in weights.items() if k != victim}
    with pytest.raises(SyncError, match=f"{victim} did not arrive"):
        sync.send(policy.weights())
