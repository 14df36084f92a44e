"""Routes of a second family of experts: kept in real vLLM, its core a process of its own, followed by the trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mismatch_probe.engines.attribute.rollout import ROUTES, RolloutVariants, Routers
from mismatch_probe.engines.attribute.trainer import TrainerVariants
from mismatch_probe.engines.attribute.variants import TrainerVariant
from mismatch_probe.engines.base import RolloutJob, TrainerJob
from mismatch_probe.engines.process import EngineProcess
from mismatch_probe.engines.vllm.settings import rollout_settings
from mismatch_probe.runs.measurements import Measurement
from mismatch_probe.types import RolloutRequest, Sampling, ScoreRequest
from tests.conftest import Heard

pytestmark = pytest.mark.engine


def test_the_trainer_follows_mixtrals_routes(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint, draw = str(tiny("mixtral")), np.random.default_rng(0)
    sequences = [
        ScoreRequest(i, draw.integers(3, 128, 6).tolist(), draw.integers(3, 128, 12 + i).tolist()) for i in range(12)
    ]
    requests = [RolloutRequest(s.sequence_id, s.prompt_token_ids, 0, s.response_token_ids) for s in sequences]
    settings = rollout_settings("cpu", "bfloat16", eager=True, in_process=False, kv_cache_gib=1)
    job = RolloutJob(
        "vllm",
        checkpoint,
        "bfloat16",
        "cpu",
        Sampling(24),
        requests,
        12,
        0,
        64,
        in_process=False,
        arguments=settings.arguments,
    )
    files = {name: Measurement(tmp_path / f"{name}.npz", "key") for name in ("prefill", ROUTES, "followed")}
    engine = RolloutVariants(job, {"prefill": "prefill"}, files, [], routers=Routers(3, 8, 2, 4096))
    EngineProcess("vllm", settings.environment, tmp_path / "vllm.log").run(engine, lambda *_: None)
    trainer = TrainerJob("hf", checkpoint, "bfloat16", "cast", "padded", None, "cpu", 1.0, (), 0, 1 << 30)
    variant = TrainerVariant("followed", layout="padded", routes=True)
    TrainerVariants(trainer, [variant], files, sequences, 4096, 12, routes=files[ROUTES]).run(Heard())

    found = {name: file.load() for name, file in files.items()}
    facts, routes = found[ROUTES]  # type: ignore[misc]
    assert facts["layers"] == [0, 1, 2]
    theirs = np.sort(routes["routes"], 2)
    assert theirs.shape == (3, sum(s.length for s in sequences), 2)
    followed = found["followed"][1]  # type: ignore[index]
    ours = np.sort(followed["routes"], 2)
    agreement = (theirs == ours).all(2).mean(1)
    assert (agreement > 0.8).all()
    prefill = found["prefill"][1]["logprobs"].astype(np.float64)  # type: ignore[index]
    apart = [np.sqrt(np.mean((followed[key] - prefill) ** 2)) for key in ("own", "logprobs")]
    assert apart[1] < apart[0] or (agreement == 1).all()
