"""A process that goes on with the next job gives the bits of a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from mismatch_probe.engines import registry
from mismatch_probe.engines.base import Job, RolloutJob, TrainerJob
from mismatch_probe.engines.events import Rollouts, Scores
from mismatch_probe.engines.process import EngineProcess
from mismatch_probe.types import Dtype, RolloutRequest, Sampling, ScoreRequest, TrainerDtype, TrainerMode
from tests.conftest import Heard
from tests.real.tiny import VOCABULARY

pytestmark = pytest.mark.engine

# Experts are packed once more than dense weights.
ARCHITECTURE = "qwen3_moe"


def prompts() -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [draw.integers(1, VOCABULARY, 3 + i).tolist() for i in range(6)]


def rollout_job(checkpoint: Path, dtype: Dtype) -> tuple[RolloutJob, dict[str, str]]:
    settings = registry.find("vllm").rollout_settings("cpu", dtype, eager=True, in_process=True, kv_cache_gib=1)
    assert settings.reusable
    requests = [RolloutRequest(i, ids, seed=i) for i, ids in enumerate(prompts())]
    job = RolloutJob(
        "vllm", str(checkpoint), dtype, "cpu", Sampling(8), requests, 4, 4, 32, arguments=settings.arguments
    )
    return job, settings.environment


def trainer_job(checkpoint: Path, dtype: TrainerDtype, mode: TrainerMode) -> tuple[TrainerJob, dict[str, str]]:
    settings = registry.find("hf").trainer_settings("cpu", dtype)
    assert settings.reusable
    requests = [ScoreRequest(i, ids, ids) for i, ids in enumerate(prompts())]
    job = TrainerJob("hf", str(checkpoint), dtype, mode, "padded", None, "cpu", 1.0, requests, 2, 1 << 30)
    return job, settings.environment


def heard(kind: str, jobs: Sequence[tuple[Job, dict[str, str]]], log: Path) -> list[Heard]:
    """What each job of one process says."""
    process, found = EngineProcess(kind, jobs[0][1], log), [Heard() for _ in jobs]
    for (job, environment), events in zip(jobs, found, strict=True):
        assert environment == jobs[0][1]
        process.run(job, events, last=events is found[-1])
    return found


def values(events: Heard) -> list[tuple[bool, int, bytes, bytes]]:
    """Ids and log-probs to the bit."""
    sampled = [
        (event.again, r.sequence_id, np.asarray(r.response_token_ids).tobytes(), np.asarray(r.logprobs).tobytes())
        for event in events.of(Rollouts)
        for r in event.rollouts
    ]
    scored = [
        (event.again, s.sequence_id, np.asarray(s.logprobs).tobytes(), np.asarray(s.entropy).tobytes())
        for event in events.of(Scores)
        for s in event.scores
    ]
    assert sampled or scored
    return sampled + scored


def test_of_vllm(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    half, full = (rollout_job(tiny(ARCHITECTURE), dtype) for dtype in ("bfloat16", "float32"))
    first, second, again = heard("vllm", [half, full, half], tmp_path / "shared.log")
    assert values(again) == values(first) != values(second)
    (alone,) = heard("vllm", [full], tmp_path / "alone.log")
    assert values(second) == values(alone)


def test_of_a_trainer(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    kinds: list[tuple[TrainerDtype, TrainerMode]] = [
        ("bfloat16", "cast"),
        ("float64", "cast"),
        ("bfloat16", "autocast"),
        ("bfloat16", "cast"),
        ("float32", "cast"),
    ]
    jobs = [trainer_job(tiny(ARCHITECTURE), dtype, mode) for dtype, mode in kinds]
    first, *_, again, full = heard("hf", jobs, tmp_path / "shared.log")
    assert values(again) == values(first) != values(full)
    (alone,) = heard("hf", jobs[-1:], tmp_path / "alone.log")
    assert values(full) == values(alone)
