"""RL configurations: what every key may be, by file and by override, and what is said of what it may not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mismatch_probe.dtypes import SHORT_DTYPES
from mismatch_probe.errors import UsageError
from mismatch_probe.files import data_path
from mismatch_probe.rl.algorithms import algorithms
from mismatch_probe.rl.config import RlConfig
from mismatch_probe.runs.settings import values_from

# Every key, away from its default.
EVERYTHING: dict[str, Any] = {
    "model": "some/checkpoint",
    "revision": "v1",
    "task": "math",
    "problems": 'a "quoted" \\ file.jsonl',
    "chat": True,
    "n_problems": 64,
    "operations": 3,
    "rollout_engine": "hf",
    "rollout_dtype": "float16",
    "trainer_dtype": "float32",
    "trainer_mode": "cast",
    "remedy": "routing-replay",
    "start_from": "a run/checkpoints/step-000050",
    "algorithm": "gspo",
    "steps": 7,
    "prompts_per_step": 6,
    "samples_per_prompt": 2,
    "max_tokens": 99,
    "temperature": 0.7,
    "updates_per_rollout": 3,
    "micro_batch": 5,
    "learning_rate": 3e-6,
    "schedule": "cosine",
    "warmup_steps": 2,
    "beta1": 0.8,
    "beta2": 0.99,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "initial_loss_scale": 1024.0,
    "loss_scale_growth_interval": 10,
    "minimum_loss_scale": 0.125,
    "stress": "mantissa",
    "dose": 4.0,
    "seed": 5,
    "evaluate_every": 2,
    "evaluate_at_end": False,
    "checkpoint_every": 3,
    "pass_above": 0.9,
    "pass_window": 4,
    "collapse_window": 6,
    "check_sync": False,
    "record_rollouts": False,
    "device": "cpu",
    "kv_cache_gib": 2,
    "gpu_memory_utilization": 0.3,
}


def write_toml(folder: Path, values: dict[str, Any]) -> Path:
    """JSON's scalars are TOML's."""
    path = folder / "run.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()), encoding="utf-8")
    return path


def read_rl_config(path: Path | None, overrides: dict[str, Any]) -> RlConfig:
    return RlConfig.of({**values_from(path, RlConfig), **overrides})


def test_every_key_can_be_given_in_a_file(tmp_path: Path) -> None:
    assert set(EVERYTHING) == set(RlConfig.model_fields)
    defaults = RlConfig().model_dump()
    assert all(defaults[key] != value for key, value in EVERYTHING.items())
    assert read_rl_config(write_toml(tmp_path, EVERYTHING), {}).model_dump() == EVERYTHING


def test_a_manifest_gives_the_configuration_back() -> None:
    config = RlConfig.of({**EVERYTHING, "learning_rate": 1 / 3, "temperature": math.pi})
    assert RlConfig.of(json.loads(json.dumps(config.model_dump(), allow_nan=False))) == config


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = write_toml(tmp_path, {"steps": 3, "seed": 4})
    config = read_rl_config(path, {"steps": 9})
    assert (config.steps, config.seed) == (9, 4)
    assert read_rl_config(None, {}) == RlConfig()


@pytest.mark.parametrize("short", SHORT_DTYPES)
def test_dtypes_have_short_names(short: str) -> None:
    config = RlConfig(rollout_dtype=short, trainer_dtype=short)
    assert config.rollout_dtype == config.trainer_dtype == SHORT_DTYPES[short]


@pytest.mark.parametrize("name", algorithms())
def test_every_algorithm_is_taken(name: str) -> None:
    assert RlConfig(algorithm=name).algorithm == name


@pytest.mark.parametrize(
    "values",
    [
        {"stress": "weight-noise", "dose": 0.01},
        {"stress": "logit-noise", "dose": 1e-6},
        {"stress": "stale", "dose": 3},
        {"stress": "mantissa", "dose": 1},
        {"stress": "mantissa", "dose": 22},
        {"prompts_per_step": 128, "n_problems": 128},
        {"prompts_per_step": 4, "updates_per_rollout": 1},
        {"minimum_loss_scale": 65536.0},
        {"seed": 2**31 - 1},
        {"max_grad_norm": 0, "weight_decay": 0, "beta1": 0, "beta2": 0},
    ],
)
def test_what_lies_on_the_border_is_taken(values: dict[str, Any]) -> None:
    given = RlConfig.of(values).model_dump()
    assert {key: given[key] for key in values} == values


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"prompts_per_step": 6}, "--prompts-per-step (6) must be a multiple of --updates-per-rollout (4)"),
        ({"prompts_per_step": 132, "n_problems": 128}, "--prompts-per-step (132) exceeds --n-problems (128)"),
        ({"stress": "stale"}, "--stress and --dose need each other"),
        ({"dose": 1.0}, "--stress and --dose need each other"),
        ({"stress": "stale", "dose": 1.5}, "--dose (1.5) of stale weights must be a whole number of steps"),
        ({"stress": "mantissa", "dose": 23}, "--dose (23) of mantissa must be a number of stored bits, 1 to 22"),
        ({"stress": "mantissa", "dose": 0.5}, "of mantissa must be a number of stored bits"),
        (
            {"remedy": "zero-mismatch", "stress": "stale", "dose": 1},
            "--stress stale cannot act with --remedy zero-mismatch",
        ),
        ({"stress": "noise", "dose": 1}, "--stress does not accept 'noise'"),
        ({"task": "math"}, "--task math needs --problems"),
        ({"task": "chains"}, "--task does not accept 'chains'"),
        ({"algorithm": "ppo"}, "--algorithm does not accept 'ppo'"),
        ({"algorithm": 3}, "--algorithm must be text, not 3"),
        ({"rollout_dtype": "float64"}, "--rollout-dtype does not accept 'float64'"),
        ({"trainer_dtype": ["bf16"]}, "--trainer-dtype does not accept"),
        ({"trainer_mode": "amp"}, "--trainer-mode does not accept 'amp'"),
        ({"schedule": "step"}, "--schedule does not accept"),
        ({"device": "tpu"}, "--device does not accept"),
        (
            {"minimum_loss_scale": 4.0, "initial_loss_scale": 2.0},
            "--minimum-loss-scale (4) exceeds",
        ),
        ({"samples_per_prompt": 1}, "--samples-per-prompt must be 2 or more, not 1"),
        ({"collapse_window": 1}, "--collapse-window must be 2 or more, not 1"),
        ({"seed": 2**31}, "--seed must be below"),
        ({"steps": "many"}, "--steps must be a whole number"),
        ({"steps": 1.5}, "--steps must be a whole number"),
        ({"temperature": math.nan}, "--temperature must be a finite number"),
        ({"learning_rate": math.inf}, "--learning-rate must be a finite number"),
        ({"check_sync": "perhaps"}, "--check-sync must be true or false"),
    ],
)
def test_what_cannot_be_is_said(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        RlConfig.of(values)
    assert said in refused.value.what
    assert "  " not in refused.value.what
    assert refused.value.what.endswith(".")
    assert refused.value.fix


_POSITIVE = [
    "n_problems",
    "operations",
    "steps",
    "prompts_per_step",
    "max_tokens",
    "temperature",
    "updates_per_rollout",
    "micro_batch",
    "learning_rate",
    "initial_loss_scale",
    "loss_scale_growth_interval",
    "minimum_loss_scale",
    "checkpoint_every",
    "pass_above",
    "pass_window",
    "kv_cache_gib",
    "gpu_memory_utilization",
]
_NOT_NEGATIVE = ["warmup_steps", "beta1", "beta2", "weight_decay", "max_grad_norm", "dose", "seed", "evaluate_every"]
_BELOW_ONE = ["beta1", "beta2", "pass_above", "gpu_memory_utilization"]


@pytest.mark.parametrize(
    ("key", "value"),
    [*((key, 0) for key in _POSITIVE), *((key, -1) for key in _NOT_NEGATIVE), *((key, 1.0) for key in _BELOW_ONE)],
)
def test_a_number_outside_its_range_is_refused(key: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"^--{key.replace('_', '-')} must be (above|below|[0-9]+ or more)"):
        RlConfig.of({key: value})


def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        read_rl_config(write_toml(tmp_path, {"stepps": 3}), {})
    assert refused.value.what.endswith("run.toml has the unknown key 'stepps'.")
    assert "'steps'" in refused.value.fix


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"steps = x\n", r"is not valid TOML: Invalid value \(at line 1, column 9\)"),
        (b"steps = 1\nsteps = 2\n", "is not valid TOML"),
        (b"\xff\xfe", "cannot be read .it is not UTF-8 text"),
        (b"[run]\nsteps = 1\n", "unknown key 'run'"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=said):
        read_rl_config(path, {})


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_rl_config(tmp_path / "none.toml", {})
    with pytest.raises(UsageError, match="is not a run folder"):
        read_rl_config(tmp_path, {})


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RlConfig().steps = 3


@pytest.mark.parametrize("name", ["sanity-r1-distill-1.5b", "sanity-qwen3-1.7b"])
def test_the_shipped_files_are_the_papers_set_up(name: str) -> None:
    config = read_rl_config(data_path(f"rl/{name}.toml"), {})
    assert (config.task, config.device, config.chat) == ("math", "cuda", True)
    assert (config.learning_rate, config.beta1, config.beta2, config.weight_decay) == (1e-6, 0.9, 0.95, 0.0)
    assert (config.temperature, config.max_grad_norm, config.updates_per_rollout) == (1.0, 1.0, 4)
    assert config.rollout_dtype == config.trainer_dtype
    assert config.pass_above == 0.95
