"""A sanity set of the shipped checkpoint, sampled by vLLM."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import mismatch_probe
from mismatch_probe.rl.tasks import Problem, Response, make_task, read_problems
from tests.conftest import children

pytestmark = pytest.mark.engine


def test_a_set_of_the_shipped_checkpoint(tmp_path: Path) -> None:
    before = children(os.getpid())
    # 128 prompts at once are more tokens than a step of vLLM takes on a CPU.
    found = mismatch_probe.rl_sanity_set(out=tmp_path / "set", n_problems=4, n_samples=32, rollout_dtype="float32")
    assert children(os.getpid()) == before
    outcome = found.document.outcome
    assert outcome is not None
    assert (outcome.n_problems, outcome.n_grader_killed) == (4, 0)
    assert 0.3 < outcome.accuracy < 0.95
    assert found.document.engines[0]["dtype"] == "float32"
    rows = pq.read_table(found.path / "samples.parquet").to_pylist()
    assert len(rows) == 128
    task = make_task("chain", n_problems=4, seed=0)
    problems = {p.problem_id: p for p in task.problems()}
    owners: list[Problem] = [problems[row["prompt_id"]] for row in rows]
    answers = [Response(row["text"], row["finish_reason"]) for row in rows]
    assert task.rewards(owners, answers) == [row["reward"] for row in rows]
    for row in rows:
        assert len(row["response_token_ids"]) == len(row["rollout_logprobs"]) == row["n_tokens"]
        assert max(row["rollout_logprobs"]) <= 0
        assert (row["finish_reason"] == "stop") == (row["response_token_ids"][-1] == 2)
    assert len({tuple(row["response_token_ids"]) for row in rows if row["prompt_id"] == "chain-0000"}) > 1
    kept = [p.problem_id for p in read_problems(found.problems)] if outcome.n_kept else []
    means = {name: np.mean([r["reward"] for r in rows if r["prompt_id"] == name]) for name in problems}
    assert kept == [name for name, mean in means.items() if 0.2 <= mean <= 0.8]
