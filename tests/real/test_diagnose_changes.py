"""Changes of a forward pass that experiments try: each does what it says, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mismatch_probe.engines.attribute.variants import NotThereError
from mismatch_probe.engines.base import TrainerJob
from mismatch_probe.engines.diagnose.changes import KINDS, ForwardChange, applied
from mismatch_probe.engines.diagnose.weights import KINDS as MOVED
from mismatch_probe.engines.diagnose.weights import rounded_to
from mismatch_probe.engines.hf.engine import HfTrainer
from mismatch_probe.types import ScoreRequest
from tests.real.tiny import VOCABULARY

pytestmark = pytest.mark.engine
Tiny = Callable[[str], Path]
_VALUES = {"rope-base": 500.0, "logit-cap": 0.5, "dropout": 0.2, "mantissa": 2.0}
_DRAW = np.random.default_rng(0)
REQUESTS = [
    ScoreRequest(i, _DRAW.integers(4, VOCABULARY, 250).tolist(), _DRAW.integers(4, VOCABULARY, 12).tolist())
    for i in range(2)
]


def trainer(path: Path) -> HfTrainer:
    return HfTrainer(TrainerJob("hf", str(path), "float32", "cast", "padded", None, "cpu", 1.0, (), 0, 1 << 30))


def column(engine: HfTrainer, change: ForwardChange | None = None, donor: Path | None = None) -> NDArray[np.float32]:
    with applied(engine, change or ForwardChange("plain"), None if donor is None else str(donor)):
        return np.concatenate([score.logprobs for score in engine.score(REQUESTS, 1.0)])


def weights(engine: HfTrainer) -> dict[str, torch.Tensor]:
    return engine.run_on_model(lambda model: {name: p.clone() for name, p in model.named_parameters()})


@pytest.fixture(scope="module")
def llama(tiny: Tiny) -> HfTrainer:
    return trainer(tiny("llama"))


@pytest.mark.parametrize("kind", [*KINDS, "swapped", "keys-values", "int8", "int4", "int4-row", "fp8"])
def test_each_changes_log_probs_and_is_taken_back(llama: HfTrainer, kind: str) -> None:
    plain, before = column(llama), weights(llama)
    layers = (0, 2) if kind == "swapped" else (0, 1)
    changed = column(llama, ForwardChange(kind, kind=kind, value=_VALUES.get(kind, 4.0), layers=layers))
    assert np.isfinite(changed).all()
    assert not np.array_equal(changed, plain)
    assert np.array_equal(column(llama), plain)
    assert all(torch.equal(before[name], p) for name, p in weights(llama).items())


@pytest.mark.parametrize("kind", ["window", "positions-clipped", "positions-halved"])
def test_a_reach_beyond_the_sequence_changes_nothing(llama: HfTrainer, kind: str) -> None:
    assert np.allclose(column(llama, ForwardChange(kind, kind=kind, value=4096.0)), column(llama), atol=1e-5)


def test_a_sink_of_no_weight_is_plain_attention(llama: HfTrainer) -> None:
    assert np.allclose(column(llama, ForwardChange("sink", kind="sink", value=-1e4)), column(llama), atol=1e-5)


def test_donated_and_blended_layers(llama: HfTrainer, tiny: Tiny, tmp_path: Path) -> None:
    own = weights(llama)

    def other(model: Any) -> None:
        for p in model.parameters():
            p.data.mul_(1.5)
        model.save_pretrained(tmp_path)
        for p in model.parameters():
            p.data.div_(1.5)

    llama.run_on_model(other)
    with applied(llama, ForwardChange("d", kind="donated", layers=(1, 2)), str(tmp_path)):
        for name, p in weights(llama).items():
            assert torch.allclose(p, own[name] * (1.5 if ".1." in name else 1.0), rtol=1e-5), name
    with applied(llama, ForwardChange("b", kind="blended", value=3.0), str(tmp_path)):
        for name, p in weights(llama).items():
            assert torch.allclose(p, own[name] * (1.5 - 3 * 0.5), atol=1e-5), name


def test_experts_by_one_place_on(tiny: Tiny) -> None:
    engine = trainer(tiny("qwen3_moe"))
    own = weights(engine)
    with applied(engine, ForwardChange("e", kind="experts", layers=(0, 1)), None):
        now = weights(engine)
    moved = [name for name in own if not torch.equal(own[name], now[name])]
    assert moved
    assert all(".0." in name and "experts" in name for name in moved)
    assert all(torch.equal(now[name][0], own[name][1]) for name in moved)


def test_a_model_without_experts_says_so(llama: HfTrainer) -> None:
    assert "experts" in MOVED
    with pytest.raises(NotThereError):
        column(llama, ForwardChange("e", kind="experts", layers=(0, 1)))


@pytest.mark.parametrize(("kind", "steps"), [("int8", 127), ("int4", 7), ("int4-row", 7), ("fp8", 8)])
def test_rounding_moves_a_weight_by_half_a_step_at_most(kind: str, steps: int) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    moved = (rounded_to(weight, kind) - weight).abs().amax(1)
    assert (moved <= 0.51 / steps * weight.abs().amax(1)).all()
    assert (moved > 0).all()
