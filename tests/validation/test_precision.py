"""The precision protocol: its plan, and what is made of the tables of its blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from mismatch_probe.metrics.arms import sign_flip_p
from validation import precision

ARMS = ("BF16", "BF16, zero-mismatch", "BF16, routing-replay", "FP16", "FP32")


def test_a_block_is_every_arm_with_one_seed() -> None:
    block, other = precision.block(3), precision.block(3, precision.EXPLORATORY)
    assert {run.config.seed for run in block + other} == {3}
    assert len({run.arm for run in block}) == len(ARMS)
    # What the arms of the protocol differ in is precision and remedy alone, and those of the other plan in few more.
    settled = {"rollout_dtype": "float32", "trainer_dtype": "float32", "remedy": "none"}
    assert len({run.config.model_copy(update=settled).model_dump_json() for run in block}) == 1
    settled |= {"algorithm": "pg", "learning_rate": 1e-4, "stress": "none", "dose": 0.0}
    assert len({run.config.model_copy(update=settled).model_dump_json() for run in block + other}) == 1
    assert not {run.arm for run in block} & {run.arm for run in other}


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight blocks in which the control does better by .1 and a bit, and the others are as BF16 is."""
    monkeypatch.setattr(precision, "RESULTS", tmp_path)
    for plan, seed in [(precision.PROTOCOL, seed) for seed in range(8)] + [(precision.EXPLORATORY, 0)]:
        rows = []
        for run in precision.block(seed, plan):
            gain = 0.1 + 0.01 * seed if run.config.remedy == "zero-mismatch" else 0.001 * (-1) ** seed
            reward = 0.5 + (gain if run.config.remedy != "none" or run.config.rollout_dtype != "bfloat16" else 0.0)
            lost = run.config.rollout_dtype == "float16" and seed == 0
            row = {"run": run.name, "arm": run.arm, "seed": seed, "status": "diverged" if lost else "complete"}
            numbers = {
                "final_reward": reward,
                "clean_reward": None if lost else reward,
                "ess_seq": 0.5,
                "ess_seq_run": 0.4,
                "reward_kept": 1.0,
            }
            rows.append({**row, **numbers, "mean_abs_logprob_diff": 0.02})
        (tmp_path / plan).mkdir(exist_ok=True)
        pd.DataFrame(rows).to_parquet(tmp_path / plan / f"runs-{seed:02d}.parquet")
    return tmp_path


def test_arms_are_compared_with_bf16_in_pairs(kept: Path) -> None:
    names = precision.arm_names()
    found = {one.first: one for one in precision.comparisons(precision.tables("runs"), names, "clean_reward")}
    assert tuple(found) == ARMS[1:]
    control = found["BF16, zero-mismatch"]
    assert control.n_pairs == 8
    assert control.difference.value == pytest.approx(0.135)
    assert control.reward.p_value == sign_flip_p(pd.Series([0.1 + 0.01 * s for s in range(8)]).to_numpy())
    assert control.reward.p_holm == pytest.approx(4 * 2 / 2**8)
    assert control.reward.differs
    assert found["FP16"].n_diverged == 1
    assert not found["FP32"].reward.differs


def test_the_outcome_is_a_table(kept: Path) -> None:
    said = CliRunner().invoke(precision.main, ["outcome"])
    assert said.exit_code == 0, said.output
    assert said.output.startswith("Blocks: 8.")
    assert "| BF16, zero-mismatch | 8 | 0.135 [" in said.output
    assert "| 1 of 8 |" in said.output


def test_other_arms_are_compared_with_bf16_of_the_protocol(kept: Path) -> None:
    said = CliRunner().invoke(precision.main, ["outcome", "--plan", precision.EXPLORATORY])
    assert said.exit_code == 0, said.output
    assert said.output.startswith("Blocks: 1.")
    assert "| FP32, grpo, lr 0.0003 | 1 | 1.00e-3 |" in said.output
    assert "arm less BF16, pg-seq-is, lr 0.0003 |" in said.output


def test_what_goes_first_is_told_for_every_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "RESULTS", tmp_path)
    (tmp_path / precision.PROTOCOL).mkdir()
    rng = np.random.default_rng(0)
    for seed in range(6):
        size = rng.standard_normal(30)
        steps = {"step": range(30), "seed": seed, "entropy": rng.standard_normal(30), "grad_norm": 1.0}
        later = np.roll(size, 3) + 0.1 * rng.standard_normal(30)
        noisy = pd.DataFrame({"arm": "noisy", "mean_abs_logprob_diff": np.exp(size), "reward": later, **steps})
        exact = noisy.assign(arm="exact", mean_abs_logprob_diff=0.0)
        pd.concat([noisy, exact]).to_parquet(tmp_path / precision.PROTOCOL / f"steps-{seed:02d}.parquet")
    said = CliRunner().invoke(precision.main, ["order"])
    assert said.exit_code == 0, said.output
    assert "| noisy | reward | +3 |" in said.output
    assert "| noisy | grad_norm | A series does not change" in said.output
    assert "| exact | reward | A series has a value that is not finite" in said.output


def test_the_runs_are_drawn(kept: Path) -> None:
    for arm in precision.arm_names().values():
        steps = pd.DataFrame({"arm": arm, "step": range(3), "reward": 0.5, "mean_abs_logprob_diff": 0.01})
        steps.to_parquet(kept / precision.PROTOCOL / f"steps-{arm}.parquet")
    said = CliRunner().invoke(precision.main, ["figure", str(kept / "it.png")])
    assert said.exit_code == 0, said.output
    assert (kept / "it.png").read_bytes().startswith(b"\x89PNG")


def test_no_block_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "RESULTS", tmp_path / "none")
    said = CliRunner().invoke(precision.main, ["outcome"])
    assert said.exit_code == 1
    assert "has no block" in said.output
