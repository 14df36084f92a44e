"""A float64 forward pass is float64 in every operation, which loading a model in float64 alone does not make it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mismatch_probe.engines.float64 import keep_float64
from tests.conftest import network
from tests.real.test_hf_trainer import plain, requests, scores, trainer
from tests.real.tiny import ARCHITECTURES

pytestmark = pytest.mark.engine
Tiny = Callable[[str], Path]


class _Narrow(TorchDispatchMode):
    """Collects operations that make a tensor of fewer than 64 bits, but for those that only move parameters about."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            narrow = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
            if narrow and value.numel() > 0:
                self.found.add(str(func))
        return result


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_operation_is_narrower(tiny: Tiny, architecture: str) -> None:
    engine, wanted = trainer(tiny(architecture), dtype="float64"), requests(3)
    watched = _Narrow()
    with watched:
        found = scores(engine, wanted)
    moved = {"aten.slice.Tensor", "aten.unsqueeze.default", "aten.expand.default", "aten.view.default"}
    moved |= {"aten.alias.default", "aten.detach.default", "aten._unsafe_view.default", "aten.select.int"}
    moved |= {"aten.gather.default", "aten.repeat.default"}  # GPT-J keeps its angles in a table
    assert watched.found <= moved, watched.found - moved
    assert all(values.dtype == np.float64 for values in found.values())


def test_the_check_sees_a_pass_that_is_not(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = trainer(tiny("llama"), dtype="float64")
    monkeypatch.setattr("mismatch_probe.engines.hf.engine.keep_float64", lambda model: torch.no_grad())
    watched = _Narrow()
    with watched:
        scores(engine, requests(1))
    assert any("pow" in name or "mul" in name or "mean" in name for name in watched.found)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_its_own_rounding_is_that_of_float64(tiny: Tiny, architecture: str) -> None:
    """Layouts sum in another order; what that changes is the pass's noise."""
    wanted = requests(4)
    single = scores(trainer(tiny(architecture), dtype="float64", layout="single"), wanted)
    padded = scores(trainer(tiny(architecture), dtype="float64"), wanted)
    for request in wanted:
        np.testing.assert_allclose(padded[request.sequence_id], single[request.sequence_id], atol=1e-12)
        # Plain transformers in float64 rounds norms and angles to float32 on the way.
        difference = np.abs(single[request.sequence_id] - plain(tiny(architecture), request)).max()
        assert 1e-9 < difference < 1e-4


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_experts_are_those_of_an_own_computation(tiny: Tiny, architecture: str) -> None:
    """Token by token in numpy: softmax over the router's logits, the two largest renormalised, their gated MLPs."""
    engine = trainer(tiny(architecture), dtype="float64")
    block = network(engine).model.layers[1].mlp
    states = torch.randn(1, 5, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), engine.precision():
        out = block(states)
    found = (out[0] if isinstance(out, tuple) else out).numpy()[0]
    router, joined, down = (w.numpy() for w in (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj))
    for x, y in zip(states.numpy()[0], found, strict=True):
        weights = np.exp(router @ x)
        chosen = np.argsort(weights)[-2:]
        expected = np.zeros_like(x)
        for k in chosen:
            gate, up = np.split(joined[k] @ x, 2)
            expected += weights[k] / weights[chosen].sum() * (down[k] @ (gate / (1 + np.exp(-gate)) * up))
        np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_what_was_before_comes_back(tiny: Tiny, architecture: str) -> None:
    model = network(trainer(tiny(architecture), dtype="float32"))
    before = model.config._experts_implementation
    with keep_float64(model):
        assert torch.zeros(1).dtype == torch.float64
        assert model.config._experts_implementation == "eager"
    assert torch.zeros(1).dtype == torch.float32
    assert torch.zeros(1, dtype=torch.float64).float().dtype == torch.float32
    assert model.config._experts_implementation == before
