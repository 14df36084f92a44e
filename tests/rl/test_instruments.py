"""What a step's row and table say, against arrays made by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mismatch_probe.metrics.summary import compute_metrics
from mismatch_probe.rl.instruments import METRICS, Rolled, finite
from mismatch_probe.types import PairArrays

LENGTHS = [3, 0, 1, 5, 2, 4]
PROBLEMS = ["b", "b", "a", "a", "c", "c"]


def make_rolled(seed: int = 0, lengths: list[int] = LENGTHS) -> Rolled:
    rng = np.random.default_rng(seed)
    rollout = [-rng.exponential(1.0, n) for n in lengths]
    old, current, sampled = ([row + rng.normal(0, s, len(row)) for row in rollout] for s in (0.1, 0.2, 0.05))
    return Rolled(
        step=7,
        problem_ids=PROBLEMS,
        prompts=[[1, 2]] * len(lengths),
        responses=[list(range(10, 10 + n)) for n in lengths],
        texts=[f"text {i}" for i in range(len(lengths))],
        finish_reasons=["stop"] * len(lengths),
        rewards=np.arange(len(lengths), dtype=np.float64),
        advantages=np.linspace(-1, 1, len(lengths)),
        rollout=rollout,
        old=old,
        current=current,
        sampled=sampled,
    )


def test_every_metric_is_that_of_the_tokens() -> None:
    """The mismatch is of the weights that the engine had; staleness and movement are what comes on top."""
    rolled = make_rolled()
    found = rolled.metrics()
    beside = {"staleness_mean_abs", "movement_mean_abs", "off_policy_ess_seq", "off_policy_mean_abs"}
    assert set(found) == {*METRICS, *beside}
    pair = PairArrays(
        rollout_logprob=np.concatenate(rolled.rollout),
        trainer_logprob=np.concatenate(rolled.sampled),
        sequence=np.array([0] * 3 + [2] + [3] * 5 + [4] * 2 + [5] * 4),
        position=np.array([0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3]),
        prompt=np.array([1, 1, 0, 0, 2, 2]),
        prompt_ids=("a", "b", "c"),
    )
    expected = compute_metrics(pair, keys=METRICS)
    assert {key: found[key] for key in METRICS} == {key: expected[key].value for key in METRICS}


def test_the_main_ones_by_hand() -> None:
    rolled = make_rolled()
    found = rolled.metrics()
    d = np.concatenate([s - r for s, r in zip(rolled.sampled, rolled.rollout, strict=True)])
    whole = np.array([(s - r).sum() for s, r in zip(rolled.sampled, rolled.rollout, strict=True) if len(s)])
    weights = np.exp(whole)
    expected = {
        "mean_abs_logprob_diff": np.abs(d).mean(),
        "max_abs_logprob_diff": np.abs(d).max(),
        "rms_logprob_diff": math.sqrt((d**2).mean()),
        "kl_k1": -d.mean(),
        "kl_k3": (np.exp(d) - 1 - d).mean(),
        "mean_ratio": np.exp(d).mean(),
        "ess_seq": weights.sum() ** 2 / (weights**2).sum() / len(weights),
        "staleness_mean_abs": np.abs(np.concatenate(rolled.old) - np.concatenate(rolled.sampled)).mean(),
        "movement_mean_abs": np.abs(np.concatenate(rolled.current) - np.concatenate(rolled.old)).mean(),
        "off_policy_mean_abs": np.abs(np.concatenate(rolled.old) - np.concatenate(rolled.rollout)).mean(),
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-9)


def test_equal_sides_have_no_mismatch() -> None:
    rolled = make_rolled()
    same = replace(rolled, sampled=rolled.rollout, old=rolled.rollout, current=rolled.rollout)
    found = same.metrics()
    for key in ("mean_abs_logprob_diff", "kl_k1", "kl_k3", "staleness_mean_abs", "movement_mean_abs"):
        assert found[key] == 0
    assert found["mean_ratio"] == found["ess_seq"] == found["ess_token"] == 1


def test_a_step_of_empty_responses_has_no_values() -> None:
    found = make_rolled(lengths=[0] * 6).metrics()
    assert set(found.values()) == {None}


def test_a_token_that_is_not_finite_leaves_no_mean() -> None:
    rolled = make_rolled()
    current = [row.copy() for row in rolled.current]
    current[3][2] = -np.inf
    found = replace(rolled, current=current).metrics()
    assert found["movement_mean_abs"] is None
    assert found["staleness_mean_abs"] is not None


def test_the_table_has_a_row_per_sequence(tmp_path: Path) -> None:
    rolled = make_rolled()
    pq.write_table(rolled.table(), tmp_path / "part.parquet")
    rows = pq.read_table(tmp_path / "part.parquet").to_pylist()
    assert len(rows) == len(LENGTHS)
    for i, row in enumerate(rows):
        assert row["step"] == 7
        assert row["prompt_id"] == PROBLEMS[i]
        assert row["prompt_token_ids"] == [1, 2]
        assert row["response_token_ids"] == rolled.responses[i]
        assert (row["text"], row["finish_reason"]) == (f"text {i}", "stop")
        assert (row["reward"], row["advantage"]) == (rolled.rewards[i], rolled.advantages[i])
        columns = {"rollout": rolled.rollout, "trainer": rolled.sampled, "old": rolled.old, "current": rolled.current}
        for name, values in columns.items():
            np.testing.assert_array_equal(row[f"{name}_logprobs"], values[i].astype(np.float32))


def test_tables_of_failed_and_empty_steps_have_the_same_columns() -> None:
    rolled = make_rolled()
    failed = replace(rolled, current=[np.empty(0)] * len(LENGTHS))
    assert failed.table().schema == make_rolled(lengths=[0] * 6).table().schema == rolled.table().schema


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_what_json_cannot_hold_becomes_none(value: float) -> None:
    document: dict[str, Any] = {"a": value, "b": 1.5, "c": 3, "d": "nan", "e": None, "f": np.float64(2.0)}
    assert finite(document) == {**document, "a": None}
