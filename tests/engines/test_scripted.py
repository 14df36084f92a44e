"""The scripted engine has every method of both protocols, and its network decides what they give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mismatch_probe.engines.base import RolloutEngine, TrainerEngine
from mismatch_probe.errors import EngineError
from mismatch_probe.types import RolloutRequest, Sampling, ScoreRequest
from tests.conftest import MakeModel
from tests.engines.test_process import rollout_job, trainer_job

IDS, MORE = [65, 66], [67, 68, 69]


@pytest.fixture
def model(scripted_model: MakeModel) -> Path:
    return scripted_model(vocab_size=128)


def sampled(engine: RolloutEngine) -> list[float]:
    (found,) = engine.replay([RolloutRequest(0, IDS, 0, MORE)], Sampling(8), lambda _: None)
    assert found.response_token_ids == MORE
    return list(found.logprobs)


def test_a_replay_and_a_prefill_give_the_same(model: Path) -> None:
    with rollout_job(model).started() as engine:
        assert engine.score([IDS + MORE])[0][1:].tolist() == pytest.approx(sampled(engine), rel=1e-6)


def test_weights_change_what_both_sides_give_as_much(model: Path) -> None:
    bias = np.zeros(128, np.float32)
    bias[MORE] = -1
    with rollout_job(model).started() as engine, trainer_job(model).started() as trainer:
        request = ScoreRequest(0, IDS, MORE)
        before = sampled(engine), trainer.score([request], 1.0)[0].logprobs
        for side in (engine, trainer):
            side.load_weights([("bias", bias)])  # type: ignore[list-item]
            assert side.run_on_model(lambda network: network.weights["bias"].sum()) == -3
        after = sampled(engine), trainer.score([request], 1.0)[0].logprobs
    assert np.array(after) - np.array(before) == pytest.approx(-1, abs=0.02)  # noise is a share of small log-probs


@pytest.mark.parametrize("weights", [[], [("head", np.zeros(128))], [("bias", np.zeros(3))]])
def test_weights_that_are_not_its_own_are_an_error(model: Path, weights: list[tuple[str, np.ndarray]]) -> None:
    with rollout_job(model).started() as engine, pytest.raises(EngineError):
        engine.load_weights(weights)  # type: ignore[arg-type]


def test_a_trainer_batches_as_a_rollout_does(model: Path) -> None:
    requests = [ScoreRequest(i, IDS, MORE) for i in range(5)]
    trainer: TrainerEngine
    with trainer_job(model).started() as trainer, trainer.changed(layout="packed"), trainer.precision():
        assert [len(batch) for batch in trainer.plan_as_rollout(requests, 100, 2)] == [2, 2, 1]
        assert trainer.head_logits(np.array([65, 66])).shape == (2, 128)  # type: ignore[arg-type]
