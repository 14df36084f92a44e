"""Plans of sweeps: what unfolds into which runs, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mismatch_probe.errors import UsageError
from mismatch_probe.files import data_path
from mismatch_probe.rl.plan import labels, make_runs, read_plan

PLAN = """
[base]
steps = 60

[[grid]]
precision = ["bf16/fp32", "fp16"]
algorithm = ["dr-grpo", "dr-grpo-seq-mis"]
learning_rate = [1e-4, 2e-4]
seeds = 3

[[grid]]
precision = ["fp32"]
stress = ["weight-noise:0.2", "stale:4"]
seeds = [5, 7]
"""


def test_a_plan_is_every_combination_of_each_grid(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(PLAN)
    runs = read_plan(tmp_path / "plan.toml")
    assert len(runs) == 2 * 2 * 2 * 3 + 2 * 2
    assert len({run.name for run in runs}) == len(runs)
    assert len({run.arm for run in runs}) == 8 + 2
    assert all(run.config.steps == 60 for run in runs)
    # Whole sets of arms come first.
    assert [run.config.seed for run in runs] == sorted(run.config.seed for run in runs)
    mixed = next(run.config for run in runs if run.config.rollout_dtype == "bfloat16")
    assert mixed.trainer_dtype == "float32"
    stale = [run.config for run in runs if run.config.stress == "stale"]
    assert [(c.dose, c.seed) for c in stale] == [(4.0, 5), (4.0, 7)]


def test_an_arm_is_a_cell_without_its_seed() -> None:
    runs = make_runs({}, [{"precision": ["bf16", "fp32"], "seeds": 2}])
    assert [run.name for run in runs] == [f"{run.arm}_s{run.config.seed}" for run in runs]
    assert {run.arm for run in runs} == {"bf16-bf16-autocast_dr-grpo_lr0.0001", "fp32-fp32_dr-grpo_lr0.0001"}


def test_labels_say_what_tells_arms_apart() -> None:
    configs = [run.config for run in make_runs({}, [{"precision": ["bf16", "fp16/fp32"], "stress": ["none"]}])]
    assert labels(configs) == ["BF16", "FP16/FP32"]
    configs = [c.config for c in make_runs({}, [{"algorithm": ["grpo", "gspo"], "stress": ["mantissa:3"]}])]
    assert labels(configs) == ["BF16, grpo, mantissa 3", "BF16, gspo, mantissa 3"]


@pytest.mark.parametrize(
    ("base", "grids", "said"),
    [
        ({"seed": 1}, [{}], "'seed' of a sweep's base is decided by its grids"),
        ({"stress": "stale"}, [{}], "'stress' of a sweep's base is decided by its grids"),
        ({"stepz": 1}, [{}], "no setting 'stepz'"),
        ({}, [{"dtype": ["bf16"]}], "no setting 'dtype'"),
        ({}, [{"precision": []}], "precision"),
        ({}, [{"precision": ["fp8"]}], "--rollout-dtype"),
        ({}, [{"seeds": 0}], "seeds"),
        ({}, [{"stress": ["weight-noise"]}], "'weight-noise' has no dose"),
        ({}, [{"stress": ["weight-noise:much"]}], "'much' is no number"),
        ({}, [{"stress": ["mantissa:2.5"]}], "number of stored bits"),
        ({}, [{"algorithm": ["ppo"]}], "'ppo'"),
        ({}, [{"seeds": 2}, {"seeds": [1]}], "more than once"),
    ],
)
def test_what_cannot_be_is_refused(base: dict[str, Any], grids: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        make_runs(base, grids)
    assert refused.value.fix


@pytest.mark.parametrize(
    ("text", "said"),
    [("x = ", "not valid TOML"), ("[bass]\n", "unknown table 'bass'"), ("[grid]\nseeds = 2\n", "no list of tables")],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(UsageError, match=said):
        read_plan(tmp_path / "plan.toml")
    with pytest.raises(UsageError, match="cannot be read"):
        read_plan(tmp_path / "none.toml")


def test_the_demo_is_three_precisions_and_bf16_without_mismatch() -> None:
    runs = read_plan(data_path("rl/demo.toml"), 3)
    assert labels([run.config for run in runs]) == 3 * ["BF16", "BF16, zero-mismatch", "FP16", "FP32"]
    assert [run.config.seed for run in runs] == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize(
    ("name", "n_arms"),
    [("demo", 4), ("doses", 7), ("structures", 4), ("precision", 5), ("precision-exploratory", 12)],
)
def test_plans_that_come_with_the_tool_can_be_read(name: str, n_arms: int) -> None:
    assert len({run.arm for run in read_plan(data_path(f"rl/{name}.toml"))}) == n_arms
