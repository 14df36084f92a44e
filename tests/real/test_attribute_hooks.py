"""What hooks keep of models that hand on their residual stream in the ways that vLLM's do: the stream itself."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mismatch_probe.engines.attribute.trace import OUTSIDE, TraceFiles, TraceRequest
from mismatch_probe.engines.vllm import hooks

pytestmark = pytest.mark.engine
LAYERS, WIDTH, VOCABULARY = 3, 8, 16
IDS = (3, 1, 4, 1, 5)
# What else is in the step, before them.
OTHERS = (9, 9)


class Norm(nn.Module):
    """As vLLM's: with a residual it adds, in place, and returns the sum; or it does neither."""

    def __init__(self, adds: bool) -> None:
        super().__init__()
        self.adds, self.weight = adds, nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            return self.scaled(hidden)
        if not self.adds:
            return self.scaled(hidden), residual
        residual += hidden
        hidden.copy_(self.scaled(residual))
        return hidden, residual

    def scaled(self, hidden: Tensor) -> Tensor:
        return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class GatedNorm(nn.Module):
    def forward(self, hidden: Tensor, gate: Tensor) -> Tensor:
        return hidden * torch.sigmoid(gate)


class Experts(nn.Module):
    """As vLLM's with shared experts, which it adds to its own."""

    def __init__(self) -> None:
        super().__init__()
        self.shared_experts = nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.shared_experts(hidden)


class Layer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.norm, self.mlp = kind, Norm(kind == "adds"), nn.Linear(WIDTH, WIDTH)
        self.gated_norm, self.experts = GatedNorm(), Experts()

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None = None) -> object:
        if self.kind == "adds":  # llama
            if residual is None:
                residual = hidden.clone()
                hidden = self.norm(hidden)
            else:
                hidden, residual = self.norm(hidden, residual)
            return self.mlp(hidden), residual
        if self.kind == "unread":  # commandr
            hidden, residual = self.norm(hidden, hidden)
            return residual + self.mlp(hidden), residual
        whole = hidden + self.mlp(self.norm(hidden))
        if residual is not None:  # zamba2, and norms as of granitemoehybrid's mixer
            self.experts(self.gated_norm(hidden, residual))
        return (whole, 2 * hidden) if self.kind == "not taken" else whole  # stablelm, gpt2


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(kind) for _ in range(LAYERS))
        self.norm = Norm(kind == "adds")

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        hidden, residual = self.embed(input_ids), None
        for layer in self.layers:
            given = {"not taken": (), "whole": (), "beside": (self.embed(input_ids),)}.get(layer.kind, (residual,))
            made = layer(positions, hidden, *given)
            hidden, residual = made if isinstance(made, tuple) else (made, None)
        found = self.norm(hidden, residual) if self.layers[0].kind in ("adds", "unread") else self.norm(hidden)
        return found[0] if isinstance(found, tuple) else found

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.embed.weight.T

    def streams(self, ids: Tensor) -> list[Tensor]:
        """Before the first layer, and after each: all kinds compute the same."""
        found = [self.embed(ids)]
        for layer in self.layers:
            found.append(found[-1] + layer.mlp(layer.norm.scaled(found[-1])))
        return found


@pytest.mark.parametrize("kind", ["adds", "unread", "not taken", "whole", "beside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stream_is_kept_however_it_is_handed_on(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = Model(kind).to(dtype)
    with torch.inference_mode():
        streams = [stream[len(OTHERS) :] for stream in model.streams(torch.tensor((*OTHERS, *IDS)))]
        records = traced(model, tmp_path)
    for index, (before, after) in enumerate(pairwise(streams)):
        layer = records(f"layer-{index}")
        assert layer[".in"].equal(before)
        assert layer[".out"].equal(after)
        assert layer["norm.in"].equal(before)
        assert layer["norm.out"].equal(layer["mlp.in"])
        assert not any(name.endswith("+") for name in layer)
        if kind == "beside":
            assert layer["gated_norm.in"].equal(before)
            assert layer["experts.in"].equal(layer["gated_norm.out"])
            assert "experts.out" not in layer
    outside = records(OUTSIDE)
    assert outside["norm.in"].equal(streams[-1])
    assert outside["final.out"].equal(model.norm.scaled(streams[-1]))
    torch.testing.assert_close(outside["logits"], model.compute_logits(outside["final.out"][[0, 4]]))


def test_an_addend_of_zero_is_no_sign(tmp_path: Path) -> None:
    """Layers that add nothing: the sum is the residual, and still a sum."""
    model, ids = Model("adds"), torch.tensor(IDS)
    with torch.inference_mode():
        for layer in model.layers:
            layer.mlp.weight.zero_()
            layer.mlp.bias.zero_()
        records = traced(model, tmp_path)
        for index in range(LAYERS):
            assert records(f"layer-{index}")[".out"].equal(model.embed(ids))
        assert records(OUTSIDE)["norm.in"].equal(model.embed(ids))


def traced(model: Model, folder: Path) -> Callable[[str], dict[str, Tensor]]:
    """Reads the records of the model's pass over the ids, with another sequence beside them."""
    hooks.start_trace(TraceRequest(str(folder), (IDS,), LAYERS, (0, 4)), model)
    model(torch.tensor((*OTHERS, *IDS)), torch.tensor((*range(len(OTHERS)), *range(len(IDS)))))
    hooks.finish_trace(model)
    files = TraceFiles(folder)
    return lambda part: files.read(part)
