"""RL runs with the real engine: a killed worker, bit-for-bit resume, the control, and a sweep of two precisions."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import mismatch_probe
from mismatch_probe.errors import EngineError
from mismatch_probe.probes.progress import Progress
from mismatch_probe.rl.config import RlConfig
from mismatch_probe.rl.plan import make_runs
from mismatch_probe.rl.records import RlDirectory
from tests.conftest import children

pytestmark = pytest.mark.engine

SMALL: dict[str, Any] = {
    "steps": 3,
    "n_problems": 16,
    "prompts_per_step": 4,
    "samples_per_prompt": 4,
    "updates_per_rollout": 2,
    "checkpoint_every": 1,
    "rollout_dtype": "float32",
    "trainer_dtype": "float32",
}


# A mixture whose text is so uncertain that rounding refuses drafts.
CONTROL: dict[str, Any] = {
    "model": "lines",
    "task": "lines",
    "n_problems": 15,
    "max_tokens": 64,
    "evaluate_at_end": False,
    "rollout_dtype": "bfloat16",
    "trainer_dtype": "bfloat16",
    "remedy": "zero-mismatch",
}


class _Kill(Progress):
    """Kills the worker once a step has ended."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, pass_id: str, tokens: int) -> None:
        self.left -= 1
        if not self.left:
            for pid in children(os.getpid()):
                os.kill(pid, signal.SIGKILL)


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (path / "steps.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds_")} for row in rows]


@pytest.mark.parametrize(("changes", "sync_limit"), [({}, 1e-5), (CONTROL, 0.1)], ids=["chain", "control"])
def test_a_worker_that_is_killed_costs_one_step_and_no_bit(
    tmp_path: Path, changes: dict[str, Any], sync_limit: float
) -> None:
    whole = mismatch_probe.rl_run(**SMALL | changes, out=tmp_path / "whole")
    assert whole.exit_code == 0
    assert all(row["sync_gap"] < sync_limit for row in _rows(whole.path))
    assert all(row["mean_abs_logprob_diff"] < 1e-5 for row in _rows(whole.path))
    assert (whole.path / "figures" / "run.png").exists()
    with pytest.raises(EngineError, match=r"killed \(signal 9\)"):
        mismatch_probe.rl_run(**SMALL | changes, out=tmp_path / "cut", progress=_Kill(after=2))
    assert RlDirectory.open(tmp_path / "cut").document.ending is None
    resumed = mismatch_probe.rl_resume(tmp_path / "cut")
    assert resumed.document.ending == whole.document.ending
    assert _rows(tmp_path / "cut") == _rows(whole.path)
    ours, theirs = (
        load_file(path / "checkpoints" / "step-000003" / "masters.st") for path in (tmp_path / "cut", whole.path)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_control_has_no_mismatch_at_all(tmp_path: Path) -> None:
    # Hot, so that rounding does refuse some drafts.
    rounded = {"rollout_dtype": "bfloat16", "trainer_dtype": "bfloat16", "steps": 2, "temperature": 2.0}
    result = mismatch_probe.rl_run(**SMALL | rounded, remedy="zero-mismatch", out=tmp_path / "run")
    assert result.exit_code == 0
    rows = pq.read_table(result.path / "rollouts.parquet").to_pandas()
    for row in rows.itertuples():
        assert row.rollout_logprobs.tobytes() == row.old_logprobs.tobytes()
    assert len(rows) == 2 * 16
    assert all(row["max_abs_logprob_diff"] == 0 for row in _rows(result.path))
    # vLLM draws with the given noise, so no more than rounding refuses its drafts.
    assert all(row["draft_accepted"] > 0.98 for row in _rows(result.path))


def test_a_sweep_runs_two_precisions_beside_each_other(tmp_path: Path) -> None:
    base = {name: value for name, value in SMALL.items() if "dtype" not in name} | {
        "steps": 2,
        "pass_window": 2,
        "collapse_window": 2,
    }
    runs = make_runs(base, [{"precision": ["bf16", "fp32"]}, {"precision": ["fp32"], "stress": ["logit-noise:0.5"]}])
    result = mismatch_probe.rl_sweep(runs, out=tmp_path / "sweep", workers=len(os.sched_getaffinity(0)))
    assert result.exit_code == 0
    table = result.runs().set_index("arm")
    exact, rounded, noisy = (
        float(table.filter(like=arm, axis=0)["mean_abs_logprob_diff"].iloc[0])
        for arm in ("fp32-fp32_dr-grpo_lr0.0001", "bf16", "logit-noise")
    )
    assert exact < 1e-5 < rounded < 1e-2 < noisy
    assert (result.path / "report.html").stat().st_size > 50_000


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "limit", "stress"),
    [
        ("float32", 1e-5, {}),
        ("bfloat16", 2e-3, {}),
        ("float16", 1e-3, {}),
        # Processors of the other interface than a GPU's model runner takes would end the run at its start. The engine
        # reports the law that it sampled from, noise included.
        ("float16", 0.1, {"stress": "logit-noise", "dose": 0.1}),
    ],
)
def test_on_a_gpu_a_run_ends_and_differs_by_rounding(
    tmp_path: Path, dtype: str, limit: float, stress: dict[str, Any]
) -> None:
    options = {**SMALL, "rollout_dtype": dtype, "trainer_dtype": dtype, "device": "cuda", "initial_loss_scale": 256.0}
    result = mismatch_probe.rl_run(**dict(RlConfig.of({**options, **stress})), out=tmp_path / "run")
    assert result.document.ending is not None
    assert result.document.ending.status == "complete"
    gaps = [row["mean_abs_logprob_diff"] for row in _rows(result.path)]
    assert all(gap < limit for gap in gaps), gaps
    assert not stress or all(gap > 1e-3 for gap in gaps), gaps
