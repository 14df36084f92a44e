"""What an audit takes of a model, against plain transformers: hidden states, eager attention, whole gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mismatch_probe.engines.audit.backward import Exponents, GradientTracker
from mismatch_probe.engines.audit.forward import ForwardTracker
from mismatch_probe.engines.audit.places import Network
from mismatch_probe.engines.audit.weights import LagCase, LagScorer, rounded, ulp, weight_rows
from mismatch_probe.engines.logprobs import Batch, token_logprobs
from mismatch_probe.metrics.floats import FORMATS
from mismatch_probe.types import ScoreRequest
from tests.conftest import network
from tests.real.test_hf_trainer import trainer

pytestmark = pytest.mark.engine
Tiny = Callable[[str], Path]
ARCHITECTURES = ("llama", "qwen3", "gptj", "gpt_neox", "opt", "olmo2", "gemma2", "granite", "qwen3_moe")
IDS = torch.tensor([[5, 9, 70, 33, 8, 90, 14, 27, 60, 61, 12, 99]])


def load(checkpoint: Path, attention: str | None = None) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, **({"attn_implementation": attention} if attention else {})
    ).eval()


@torch.inference_mode()
def peaks_of(model: Any) -> tuple[ForwardTracker, dict[str, np.ndarray]]:
    tracker = ForwardTracker(model)
    with tracker.watching():
        found = tracker.sequence(IDS.shape[1], lambda: model(input_ids=IDS, use_cache=False))
    return tracker, found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peaks_are_those_of_the_models_own_hidden_states_and_of_plain_hooks(tiny: Tiny, architecture: str) -> None:
    model = load(tiny(architecture))
    tracker, peaks = peaks_of(model)
    kinds = {place.name: place.kind for place in tracker.places}
    with torch.inference_mode():
        output = model(input_ids=IDS, output_hidden_states=True, use_cache=False)
    layers = tracker.layers
    assert len(layers) == 3
    # transformers gives the last state behind the final norm.
    for name, state in zip(layers[:-1], output.hidden_states[1:-1], strict=True):
        np.testing.assert_array_equal(peaks[name], state[0].abs().amax(-1).numpy())
        assert kinds[name] == "residual"

    whole: dict[str, float] = {}
    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: whole.update({name: float(first(out).abs().max())}))
        for name, module in model.named_modules()
        if name
    ]
    with torch.inference_mode():
        model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    shown = {name: float(values.max()) for name, values in peaks.items() if "(" not in name}
    for name, peak in shown.items():
        assert peak == whole[name], name
    # A module that is not shown hands on what its last child, or the module before it, made.
    for name in set(whole) - set(shown):
        assert whole[name] in shown.values(), name
    assert {"residual", "logits", "softmax input", "mlp product"} <= set(kinds.values()), kinds
    assert ("router logits" in kinds.values()) == (architecture == "qwen3_moe")


def first(output: Any) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output
    return next(o for o in values if isinstance(o, torch.Tensor))


def test_scores_of_fused_attention_are_those_of_eager_attention(tiny: Tiny) -> None:
    fused, eager = (peaks_of(load(tiny("llama"), attention))[1] for attention in ("sdpa", "eager"))
    names = [name for name in fused if name.endswith("(scores)")]
    assert len(names) == 3
    for name in names:
        # The last token sees every other one; before it, eager attention has masked what fused attention never makes.
        assert fused[name][-1] == pytest.approx(eager[name][-1], rel=1e-5)
        assert (eager[name] <= fused[name] * (1 + 1e-5)).all()
        np.testing.assert_allclose(fused[name.replace("scores", "q·k")], fused[name] * 32**0.5, rtol=1e-5)


def test_a_product_is_the_input_of_the_projection_behind_it(tiny: Tiny) -> None:
    model = load(tiny("llama"))
    _, peaks = peaks_of(model)
    seen: list[torch.Tensor] = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        model(input_ids=IDS, use_cache=False)
    handle.remove()
    np.testing.assert_array_equal(peaks["model.layers.1.mlp.down_proj (input)"], seen[0][0].abs().amax(-1).numpy())


def test_watching_changes_no_bit_and_leaves_nothing_behind(tiny: Tiny) -> None:
    model = load(tiny("qwen3_moe"))
    softmax, attention = nn.functional.softmax, nn.functional.scaled_dot_product_attention
    with torch.inference_mode():
        before = model(input_ids=IDS, use_cache=False).logits
        tracker, logits = ForwardTracker(model), []
        with tracker.watching():
            tracker.sequence(IDS.shape[1], lambda: logits.append(model(input_ids=IDS, use_cache=False).logits))
    assert torch.equal(before, logits[0])
    assert nn.functional.softmax is softmax
    assert nn.functional.scaled_dot_product_attention is attention
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_error_inside_leaves_nothing_behind(tiny: Tiny) -> None:
    model = load(tiny("llama"))
    softmax = nn.functional.softmax
    tracker = ForwardTracker(model)
    with pytest.raises(IndexError), tracker.watching():
        tracker.sequence(3, lambda: model(input_ids=torch.tensor([[100_000, 1, 2]])))
    assert nn.functional.softmax is softmax
    assert not any(m._forward_hooks for m in model.modules())


def loss_of(model: Any, batch: Batch) -> torch.Tensor:
    logprobs, _ = token_logprobs(model, batch, 1.0)
    return -logprobs[batch.mask].sum() / 50


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "gptj"])
def test_histograms_hold_every_gradient_of_a_backward_pass_in_float64(tiny: Tiny, architecture: str) -> None:
    model = load(tiny(architecture)).requires_grad_(True)
    batch = Batch.of([IDS[0, :4].tolist()], [IDS[0, 4:].tolist()], torch.device("cpu"))
    tracker = GradientTracker(model)
    with tracker.watching():
        loss_of(model, batch).backward()
        tracker.weights()
    largest, found = tracker.largest(), tracker.histograms()
    mine = {name: p.grad.double().abs() for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in mine.items():
        h = found[name]
        assert h.counts.sum() == gradient.numel()
        assert h.mass.sum() == pytest.approx(float(gradient.sum()), rel=1e-9)
        assert h.largest == float(gradient.max())
        scaled = gradient.float() * 2.0**12
        expected = float(gradient[scaled.half() == 0].sum() / gradient.sum())
        assert h.flushed_share(12) == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert largest == max(h.largest for h in found.values())

    # The stream's gradient, by autograd itself.
    layer = Network.of(model).layers[1]
    kept: list[torch.Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _, __, out: kept.append(first(out)))
    loss = loss_of(model, batch)
    handle.remove()
    (gradient,) = torch.autograd.grad(loss, kept[0])
    of_stream = [h for name, h in found.items() if name in (f"{layer} (activation)", f"{layer}.mlp (activation)")]
    assert any(h.largest == pytest.approx(float(gradient.abs().max()), rel=1e-5) for h in of_stream)


def test_a_histogram_counts_zeros_and_what_is_not_finite() -> None:
    exponents = Exponents(torch.device("cpu"))
    top = exponents.add(torch.tensor([0.0, 1.0, -3.0, float("inf"), float("nan"), 2.0**-130]))
    h = exponents.histogram()
    assert float(top) == h.largest == 3.0
    assert (h.counts[0], h.counts[127], h.counts[128], h.n_nonfinite) == (2, 1, 1, 2)
    assert h.mass[127] == 1.0
    assert h.mass[128] == 3.0


def test_conversion_is_torchs_and_ulp_is_numpys(tiny: Tiny) -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 7e4, 1e-9], [1e-5, -2.0, 0.1]]))
    fp16, bf16 = weight_rows(model)
    assert (fp16["n_overflow"], fp16["n_flushed"], fp16["n_subnormal"], fp16["largest"]) == (1, 1, 2, 7e4)
    assert (bf16["n_overflow"], bf16["n_flushed"]) == (0, 0)
    w = model[0].weight.detach().double()
    kept = w.float().half().double()
    error = torch.where(torch.isinf(kept), 0.0, kept - w).norm() / w.norm()
    assert fp16["error"] == pytest.approx(float(error), rel=1e-6)
    values = torch.tensor([1.0, 1.5, 0.1, 3e-7, 40000.0])
    assert ulp(values, FORMATS["float16"]).tolist() == FORMATS["float16"].ulp(values.double().numpy()).tolist()


def test_masters_lag_by_no_more_than_half_a_unit_and_scores_are_the_models(tiny: Tiny) -> None:
    engine = trainer(tiny("llama"))
    start = {name: p.detach().clone() for name, p in network(engine).named_parameters()}
    requests = [ScoreRequest(0, IDS[0, :4].tolist(), IDS[0, 4:].tolist())]
    gradients = {name: torch.ones_like(p) for name, p in start.items()}
    scorer = LagScorer(engine, network(engine), gradients)
    rate = 1e-3
    masters, copy, changed = scorer.gaps(LagCase("bfloat16", rate), requests, 1.0)
    expected = {name: rounded(w, "bfloat16") - rate / (1 + 1e-8) for name, w in start.items()}
    sides = []
    for weights in (expected, {name: rounded(w, "bfloat16") for name, w in expected.items()}):
        with torch.no_grad():
            for name, p in network(engine).named_parameters():
                p.copy_(weights[name])
        sides.append(engine.score(requests, 1.0)[0].logprobs)
    np.testing.assert_allclose(masters, sides[0], atol=2e-5)
    np.testing.assert_allclose(copy, sides[1], atol=2e-5)
    assert 0 < changed < 1

    steady, engine_side, _ = scorer.gaps(LagCase("bfloat16", None), requests, 1.0)
    for name, p in network(engine).named_parameters():
        grid = rounded(start[name], "bfloat16")
        assert ((p.detach() - grid).abs() <= ulp(grid, FORMATS["bfloat16"])).all()
    assert np.abs(steady - engine_side).max() > 0


def test_a_step_of_nothing_leaves_no_lag(tiny: Tiny) -> None:
    engine = trainer(tiny("llama"))
    requests = [ScoreRequest(0, IDS[0, :4].tolist(), IDS[0, 4:].tolist())]
    masters, copy, changed = LagScorer(engine, network(engine), {}).gaps(LagCase("float16", 1e-3), requests, 1.0)
    np.testing.assert_array_equal(masters, copy)
    assert changed == 0
