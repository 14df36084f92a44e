"""The RL loop: what resumes, what stops it, and what it leaves behind."""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from mismatch_probe.engines.events import Event, Found, StepDone, Total
from mismatch_probe.engines.hf.rollout import HfRollout
from mismatch_probe.errors import DiskFull, EngineError, UsageError
from mismatch_probe.results.finding import Finding
from mismatch_probe.rl import policy as checkpoint_files
from mismatch_probe.rl.config import RlConfig
from mismatch_probe.rl.loop import Training
from mismatch_probe.rl.run import check_start
from mismatch_probe.rl.sync import SyncError
from mismatch_probe.types import Rollout
from tests.conftest import Heard
from tests.rl.loops import JOB, SMALL, SignalTask, pieces, train

VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"trainer_dtype": "fp16", "loss_scale_growth_interval": 3, "initial_loss_scale": 1024.0},
    "bf16-cast": {"trainer_dtype": "bf16", "trainer_mode": "cast", "schedule": "cosine", "warmup_steps": 2},
    "stale": {"stress": "stale", "dose": 2},
    "noise": {"stress": "weight-noise", "dose": 0.05, "weight_decay": 0.1},
    "zero-mismatch": {"remedy": "zero-mismatch", "trainer_dtype": "bf16"},
}


@pytest.fixture(scope="module")
def engine() -> HfRollout:
    return HfRollout(JOB)


class _Killed(BaseException):
    """What a process that is killed never gets to say."""


def _die_after(step: int) -> Any:
    def tell(event: Event) -> None:
        if isinstance(event, StepDone) and event.row["step"] == step:
            raise _Killed

    return tell


def _without_times(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (path / "steps.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds_")} for row in rows]


def _weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((path / "checkpoints").iterdir())[-1] / "masters.st")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, engine: HfRollout, variant: str) -> None:
    changes = VARIANTS[variant]
    whole = train(tmp_path / "whole", engine, **changes)
    with pytest.raises(_Killed):
        # Step 2 lies beyond the checkpoint: it has to be forgotten and done again.
        Training(pieces(tmp_path / "cut", engine, tell=_die_after(2), **changes)).run()
    assert len(_without_times(tmp_path / "cut")) == 3
    resumed = train(tmp_path / "cut", engine)
    assert resumed == whole
    assert _without_times(tmp_path / "cut") == _without_times(tmp_path / "whole")
    ours, theirs = _weights(tmp_path / "cut"), _weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(
        not torch.equal(ours[n], t) for n, t in HfRollout(JOB).run_on_model(lambda model: model.state_dict()).items()
    )


def test_a_run_goes_on_from_another_ones_checkpoint(tmp_path: Path, engine: HfRollout) -> None:
    train(tmp_path / "whole", engine)
    train(tmp_path / "first", engine, steps=2)
    start = {"start_from": str(tmp_path / "first" / "checkpoints" / "step-000002")}
    train(tmp_path / "same", engine, **start)
    assert _without_times(tmp_path / "same") == _without_times(tmp_path / "whole")[2:]
    # Fresh samples, and what a checkpoint of another precision lacks.
    changes = {"seed": 1, "trainer_dtype": "fp16", "initial_loss_scale": 1024.0}
    train(tmp_path / "other", engine, **start, **changes)
    rows = _without_times(tmp_path / "other")
    assert [row["step"] for row in rows] == [2, 3]
    assert [row["loss_scale"] for row in rows] == [1024.0, 1024.0]
    assert rows[0]["entropy"] != _without_times(tmp_path / "whole")[2]["entropy"]
    # It is resumed from its own checkpoint, which is as far as it got.
    assert train(tmp_path / "other", engine).steps == 4


def test_a_start_that_cannot_be_is_refused(tmp_path: Path, engine: HfRollout) -> None:
    train(tmp_path / "first", engine, steps=2)
    start = tmp_path / "first" / "checkpoints" / "step-000002"
    check_start(RlConfig.of({"start_from": str(start), "steps": 3}))
    with pytest.raises(UsageError, match="step-000002 has 2 steps, and --steps is 2"):
        check_start(RlConfig.of({"start_from": str(start), "steps": 2}))
    with pytest.raises(UsageError, match="first is no checkpoint"):
        check_start(RlConfig.of({"start_from": str(tmp_path / "first")}))


def test_a_finished_run_leaves_tables(tmp_path: Path, engine: HfRollout) -> None:
    told = Heard()
    parts = pieces(tmp_path / "run", engine, tell=told, evaluate_every=2)
    parts.directory.finish(Training(parts).run())
    steps = pd.read_parquet(tmp_path / "run" / "steps.parquet")
    assert list(steps["step"]) == list(range(4))
    assert steps["clean_reward"].notna().tolist() == [False, True, False, True]
    rollouts = pq.read_table(tmp_path / "run" / "rollouts.parquet").to_pandas()
    assert len(rollouts) == 4 * 16
    # The same forward pass on both sides: what is left is the rounding of other batch shapes.
    assert (steps["mean_abs_logprob_diff"] < 1e-5).all()
    assert (steps["staleness_mean_abs"] == 0).all()
    assert (steps["movement_mean_abs"] > 1e-5).all()
    for row in rollouts.itertuples():
        assert len(row.response_token_ids) == len(row.rollout_logprobs) == len(row.trainer_logprobs)
    assert [type(event) for event in told] == [Total, StepDone, StepDone, StepDone, StepDone]


def test_every_problem_is_seen_once_an_epoch(tmp_path: Path, engine: HfRollout) -> None:
    train(tmp_path / "run", engine)
    rollouts = pq.read_table(tmp_path / "run" / "rollouts.parquet").to_pandas()
    for epoch in (rollouts[rollouts["step"] < 2], rollouts[rollouts["step"] >= 2]):
        assert (epoch["prompt_id"].value_counts() == 4).all()
        assert epoch["prompt_id"].nunique() == 8


def test_staleness_and_mismatch_are_kept_apart(tmp_path: Path, engine: HfRollout) -> None:
    train(tmp_path / "run", engine, stress="stale", dose=2, learning_rate=1e-3)
    steps = pd.read_parquet(tmp_path / "run" / "steps.parquet")
    assert steps["staleness_mean_abs"].iloc[0] == 0
    assert (steps["staleness_mean_abs"].iloc[1:] > 1e-4).all()
    assert (steps["mean_abs_logprob_diff"] < 1e-5).all()
    # Together they are the dose that a sweep places the run by.
    np.testing.assert_allclose(steps["off_policy_mean_abs"], steps["staleness_mean_abs"], atol=1e-5)
    assert (steps["off_policy_ess_seq"].iloc[1:] < steps["ess_seq"].iloc[1:]).all()


class _Meddling(HfRollout):
    """Changes what it has sampled, from a step on."""

    def __init__(self, meddle: Any, at: int) -> None:
        super().__init__(JOB)
        self.meddle, self.at, self.calls = meddle, at, 0

    def generate(self, *args: Any) -> list[Rollout]:
        found = super().generate(*args)
        self.calls += 1
        return [self.meddle(rollout) for rollout in found] if self.calls > self.at else found


def _writing(value: float) -> Any:
    def meddle(rollout: Rollout) -> Rollout:
        logprobs = rollout.logprobs.copy()
        if rollout.sequence_id == 3:
            logprobs[1] = value
        return Rollout(rollout.sequence_id, rollout.response_token_ids, logprobs, rollout.finish_reason, rollout.text)

    return meddle


@pytest.mark.parametrize(("value", "kept"), [(np.nan, None), (-9999.0, -9999.0), (0.125, 0.125)])
def test_a_log_prob_that_no_token_has_ends_the_run_and_keeps_its_batch(
    tmp_path: Path, value: float, kept: float | None
) -> None:
    result = train(tmp_path / "run", _Meddling(_writing(value), at=2))
    assert result.status == "diverged"
    assert result.cause == Finding(
        code="rl-impossible-logprob",
        severity="fail",
        values={"step": 2, "side": "rollout", "sequence": 3, "position": 1, "tensor": None, "value": kept},
    )
    assert result.last_healthy_checkpoint == "step-000002"
    batch = pq.read_table(tmp_path / "run" / "failure" / "batch.parquet")
    assert batch.num_rows == 16
    assert Finding(**json.loads((tmp_path / "run" / "failure" / "failure.json").read_text())) == result.cause


def test_a_weight_that_is_no_number_is_named(tmp_path: Path, engine: HfRollout, monkeypatch: Any) -> None:
    training = Training(pieces(tmp_path / "run", engine))
    own = training._sample
    victim = "model.layers.1.mlp.up_proj.weight"

    def sample(chosen: Sequence[int], step: int) -> list[Rollout]:
        found = own(chosen, step)
        if step == 1:  # after the sync, whose check would stop the run before
            with torch.no_grad():
                training._policy.model.get_parameter(victim)[0, 0] = torch.nan
        return found

    monkeypatch.setattr(training, "_sample", sample)
    result = training.run()
    assert result.status == "diverged"
    assert result.cause is not None
    found = [result.cause.values[name] for name in ("step", "side", "sequence", "position", "tensor")]
    assert found == [1, "trainer", 0, 0, victim]


def test_gradients_that_overflow_without_a_loss_scale_end_the_run(tmp_path: Path, engine: HfRollout) -> None:
    parts = pieces(tmp_path / "run", engine)
    training = Training(parts)
    weight = training._policy.model.get_parameter("model.layers.0.mlp.down_proj.weight")
    weight.register_hook(lambda gradient: gradient * torch.inf)
    result = training.run()
    assert result.status == "diverged"
    assert result.cause is not None
    assert result.cause.values == {"step": 0, "what": "gradient of model.layers.0.mlp.down_proj.weight"}
    assert (tmp_path / "run" / "failure" / "batch.parquet").exists()


def test_a_loss_scale_that_only_falls_ends_the_run(tmp_path: Path, engine: HfRollout) -> None:
    changes = {"trainer_dtype": "fp16", "initial_loss_scale": 4.0, "minimum_loss_scale": 1.0}
    training = Training(pieces(tmp_path / "run", engine, **changes))
    weight = training._policy.model.get_parameter("model.layers.0.mlp.down_proj.weight")
    weight.register_hook(lambda gradient: gradient * torch.inf)
    result = training.run()
    assert result.status == "diverged"
    assert result.cause is not None
    assert (result.cause.code, result.cause.number("loss_scale")) == ("rl-loss-scale-lost", 0.25)
    rows = _without_times(tmp_path / "run")
    assert [row["n_skipped"] for row in rows] == [2] * len(rows)


def test_equal_rewards_are_said_once(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(SignalTask, "rewards", lambda self, problems, responses: [0.0] * len(responses))
    monkeypatch.setattr("mismatch_probe.rl.summary._SILENT_STEPS", 2)
    told = Heard()
    result = Training(pieces(tmp_path / "run", HfRollout(JOB), tell=told)).run()
    assert [event.finding.code for event in told.of(Found)] == ["rl-no-signal"]
    assert result.status == "complete"


def _emptied(rollout: Rollout) -> Rollout:
    return Rollout(rollout.sequence_id, np.empty(0, np.int32), np.empty(0, np.float32), "stop", "")


def test_empty_responses_are_counted_and_harm_nothing(tmp_path: Path) -> None:
    result = train(tmp_path / "run", _Meddling(_emptied, at=1), steps=2)
    assert result.status == "complete"
    steps = pd.read_parquet(tmp_path / "run" / "steps.parquet")
    assert steps["n_empty"].tolist() == [0, 16]
    assert pd.isna(steps["mean_abs_logprob_diff"].iloc[1])


def test_a_run_that_collapses_says_so_and_keeps_its_healthy_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    rewards = iter([1.0] * 8 + [0.75, 0.5, 0.25])
    monkeypatch.setattr(SignalTask, "rewards", lambda self, problems, responses: [next(rewards, 0.0)] * len(responses))
    result = train(tmp_path / "run", HfRollout(JOB), steps=16, collapse_window=4, checkpoint_every=2)
    assert (result.status, result.steps) == ("collapsed", 13)
    assert result.cause is not None
    assert result.cause.values == {"step": 12, "best": 1.0, "best_step": 7, "present": 0.1875, "window": 4}
    assert result.last_healthy_checkpoint == "step-000008"
    assert (tmp_path / "run" / "checkpoints" / "step-000008" / "model.safetensors").exists()


def test_a_full_disk_at_a_checkpoint_loses_nothing_before_it(
    tmp_path: Path, engine: HfRollout, monkeypatch: Any
) -> None:
    whole = train(tmp_path / "whole", engine)
    own = checkpoint_files.save_file

    def full(tensors: Any, path: Path) -> None:
        if path.name == "optimizer.st" and "step-000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        own(tensors, path)

    monkeypatch.setattr(checkpoint_files, "save_file", full)
    with pytest.raises(DiskFull, match="checkpoint step-000004"):
        train(tmp_path / "run", engine)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.undo()
    assert train(tmp_path / "run", engine) == whole
    assert _without_times(tmp_path / "run") == _without_times(tmp_path / "whole")


def test_an_engine_that_fails_leaves_the_steps_before(tmp_path: Path) -> None:
    def fail(rollout: Rollout) -> Rollout:
        raise EngineError("gone")

    with pytest.raises(EngineError):
        train(tmp_path / "run", _Meddling(fail, at=3))
    assert len(_without_times(tmp_path / "run")) == 3


def test_the_sanity_test_is_passed_where_the_lower_limit_is(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(SignalTask, "rewards", lambda self, problems, responses: [1.0] * len(responses))
    passed = train(tmp_path / "run", HfRollout(JOB), steps=3, pass_window=2, pass_above=0.5)
    assert (passed.passed, passed.first_above_step) == (True, 1)
    never = train(tmp_path / "never", HfRollout(JOB), steps=3, pass_window=2, pass_above=0.99)
    assert (never.passed, never.first_above_step) == (False, None)


def test_gradient_accumulation_changes_nothing_but_rounding(tmp_path: Path, engine: HfRollout) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    train(small, engine, steps=1, micro_batch=2, updates_per_rollout=1)
    train(large, engine, steps=1, micro_batch=16, updates_per_rollout=1)
    ours, theirs = _without_times(small)[0], _without_times(large)[0]
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_the_small_configuration_is_one_of_several_updates() -> None:
    assert SMALL["updates_per_rollout"] > 1
    assert SMALL["prompts_per_step"] * SMALL["samples_per_prompt"] > SMALL["micro_batch"]


def test_each_round_has_every_problem_once(tmp_path: Path, engine: HfRollout) -> None:
    """What the collapse rule rests on: late steps have the problems of early ones."""
    training = Training(pieces(tmp_path / "run", engine, n_problems=8, prompts_per_step=4))
    rounds = [training._chosen(step) + training._chosen(step + 1) for step in range(0, 20, 2)]
    assert all(sorted(chosen) == list(range(8)) for chosen in rounds)
    assert len({tuple(chosen) for chosen in rounds}) == len(rounds)


def test_a_fresh_engine_is_tried_without_a_trace(tmp_path: Path) -> None:
    """It gets other weights before the first step, and samples with the right ones."""
    rows = []
    for fresh in (False, True):
        parts = replace(pieces(tmp_path / str(fresh), HfRollout(JOB), steps=2), fresh=fresh)
        Training(parts).run()
        rows.append(parts.directory.steps().filter(regex="^(?!seconds_)"))
    pd.testing.assert_frame_equal(*rows)


@pytest.mark.parametrize(("max_tokens", "longest"), [(64, 72), (8, 28)])
def test_what_checks_a_sync_does_not_begin_alike_and_fits_the_engine(
    tmp_path: Path, engine: HfRollout, max_tokens: int, longest: int
) -> None:
    """Prompts that are all the same 20 tokens: each sequence begins a token later."""
    parts = pieces(tmp_path / "run", engine, max_tokens=max_tokens)
    prompt = list(range(3, 23))
    probes = Training(replace(parts, prompts=[prompt] * 8))._probes()
    assert [probe[:3] for probe in probes] == [prompt[i : i + 3] for i in range(8)]
    assert all(i + len(probe) <= longest for i, probe in enumerate(probes))
    assert probes == Training(replace(parts, prompts=[prompt] * 8))._probes()
    assert Training(replace(parts, prompts=[[*prompt, *prompt, *prompt, *prompt]]))._probes() == [4 * prompt]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_engine_that_is_wrong_from_the_start_trains_nothing(tmp_path: Path, dtype: str) -> None:
    engine = HfRollout(JOB)
    with torch.no_grad():
        engine.run_on_model(lambda model: model.model.layers[1].mlp.down_proj.weight.zero_())
    parts = replace(pieces(tmp_path / "run", engine, rollout_dtype=dtype), fresh=True)
    with pytest.raises(SyncError, match="After loading the checkpoint"):
        Training(parts)
    assert not (tmp_path / "run" / "steps.jsonl").exists()
