"""What an attribution changes of a trainer's model: that it does what it says, to nothing else, and is undone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mismatch_probe.engines.attribute.changes import Routing, attention_changed, attention_of, in_fp32, kv_through_fp8
from mismatch_probe.engines.attribute.variants import FP32_CLASSES, NotThereError
from mismatch_probe.engines.base import TrainerJob
from mismatch_probe.engines.hf.engine import HfTrainer
from mismatch_probe.types import ScoreRequest
from tests.conftest import network

ARCHITECTURES = ("llama", "qwen3", "olmo2", "gemma2", "gpt_neox", "qwen3_moe", "opt")
# What transformers or torch's kernels compute in FP32 anyway: norms with their weights, rotation, one lone product.
WIDE_ALREADY = {
    ("olmo2", "norms"),
    ("gemma2", "norms"),
    ("gpt_neox", "norms"),
    ("opt", "norms"),
    ("olmo2", "rope"),
    ("opt", "mlp"),
}


def sequences(count: int = 6, vocabulary: int = 128) -> list[ScoreRequest]:
    draw = np.random.default_rng(0)
    lengths = draw.integers(5, 20, count).tolist()
    return [
        ScoreRequest(i, draw.integers(3, vocabulary, 4).tolist(), draw.integers(3, vocabulary, n).tolist())
        for i, n in enumerate(lengths)
    ]


def trainer(checkpoint: Path, dtype: Any = "bfloat16", mode: Any = "cast", layout: Any = "padded") -> HfTrainer:
    return HfTrainer(TrainerJob("hf", str(checkpoint), dtype, mode, layout, None, "cpu", 1.0, (), 0, 1 << 30))


def logprobs(engine: HfTrainer, requests: Sequence[ScoreRequest]) -> Any:
    scores = {s.sequence_id: s.logprobs for batch in engine.plan(requests) for s in engine.score(batch, 1.0)}
    return np.concatenate([np.asarray(scores[r.sequence_id], np.float64) for r in requests])


@pytest.mark.parametrize("name", FP32_CLASSES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_class_of_modules_in_fp32_is_undone(tiny: Callable[[str], Path], architecture: str, name: str) -> None:
    engine, requests = trainer(tiny(architecture)), sequences()
    before = logprobs(engine, requests)
    weights = {n: p.detach().clone() for n, p in network(engine).named_parameters()}
    there = True
    changed = before
    try:
        with in_fp32(network(engine), [name], torch.bfloat16):
            changed = logprobs(engine, requests)
    except NotThereError:
        there = False
    assert there == ((architecture, name) != ("opt", "rope"))  # it has learned positions
    moved = np.sqrt(np.mean((changed - before) ** 2))
    if there:
        assert moved == 0 if (architecture, name) in WIDE_ALREADY else 0 < moved < 0.3
    assert all(p.dtype == torch.bfloat16 and p.equal(weights[n]) for n, p in network(engine).named_parameters())
    assert np.array_equal(before, logprobs(engine, requests))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_neox"])
def test_everything_but_the_projections_in_fp32_is_closer_to_fp32(
    tiny: Callable[[str], Path], architecture: str
) -> None:
    """With the MLP, and all between modules, in FP32 only the attention's projections round."""
    requests = sequences(24)
    exact = logprobs(trainer(tiny(architecture), "float32"), requests)
    engine = trainer(tiny(architecture))
    # The checkpoint is FP32, so the trainer's weights are rounded copies: compare with their own forward in FP32.
    plain = logprobs(engine, requests)
    with in_fp32(network(engine), FP32_CLASSES, torch.bfloat16):
        most = logprobs(engine, requests)
    network(engine).float()
    own = logprobs(engine, requests)
    assert np.abs(own - exact).mean() > 1e-3
    assert np.sqrt(np.mean((most - own) ** 2)) < 0.9 * np.sqrt(np.mean((plain - own) ** 2))


def test_one_class_does_not_undo_another(tiny: Callable[[str], Path]) -> None:
    engine, requests = trainer(tiny("llama")), sequences()
    found = []
    for names in (["residual"], ["residual", "rope"], ["rope", "residual"], ["residual", "attention"]):
        with in_fp32(network(engine), names, torch.bfloat16):
            found.append(logprobs(engine, requests))
    alone, both, turned, attention = found
    assert not np.array_equal(alone, both)
    assert not np.array_equal(alone, attention)
    assert np.array_equal(both, turned)


def test_an_fp32_head_is_the_product_in_fp32(tiny: Callable[[str], Path]) -> None:
    engine = trainer(tiny("qwen3"))  # tied: the embedding must stay as it is
    states = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    head = network(engine).get_output_embeddings()
    with in_fp32(network(engine), ["head"], torch.bfloat16), torch.inference_mode():
        found = head(states)
    assert found.dtype == torch.float32
    exact = states.double() @ head.weight.double().T
    assert torch.allclose(found.double(), exact, atol=1e-5)
    assert network(engine).get_input_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["norms", "mlp"])
def test_modules_in_fp32_round_once(tiny: Callable[[str], Path], name: str) -> None:
    """Against the same module in float64: what they hand back is the correctly rounded result, nearly always."""
    model = network(trainer(tiny("llama")))
    module = model.model.layers[0].mlp if name == "mlp" else model.model.layers[0].input_layernorm
    states = torch.randn(2, 40, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.inference_mode():
        plain = module(states)
        with in_fp32(model, [name], torch.bfloat16):
            found = module(states)
        module.double()
        if name == "norms":  # its own forward goes through FP32
            variance = states.double().pow(2).mean(-1, keepdim=True)
            exact = module.weight * states.double() * torch.rsqrt(variance + module.variance_epsilon)
        else:
            exact = module(states.double())
    right = exact.bfloat16()
    assert (found == right).float().mean() > 0.999
    assert (plain == right).float().mean() < 0.99


def test_autocast_takes_the_same_changes(tiny: Callable[[str], Path]) -> None:
    engine, requests = trainer(tiny("llama"), mode="autocast"), sequences()
    before = logprobs(engine, requests)
    for name in FP32_CLASSES:
        with in_fp32(network(engine), [name], torch.bfloat16):
            assert np.isfinite(logprobs(engine, requests)).all(), name
    assert np.array_equal(before, logprobs(engine, requests))
    assert network(engine).dtype == torch.float32


def test_keys_and_values_go_through_fp8(tiny: Callable[[str], Path]) -> None:
    engine, requests = trainer(tiny("llama"), "float32"), sequences()
    seen = []

    def spy(function: Any) -> Any:
        def call(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            seen.extend([key, value])
            return function(module, query, key, value, *args, **kwargs)

        return call

    before = logprobs(engine, requests)
    with attention_changed(network(engine), spy), kv_through_fp8(network(engine)):
        changed = logprobs(engine, requests)
    assert all(t.to(torch.float8_e4m3fn).to(t.dtype).equal(t) for t in seen)
    assert np.abs(changed - before).mean() > 1e-3
    assert np.array_equal(before, logprobs(engine, requests))


def test_an_attention_that_nobody_calls_is_told(tiny: Callable[[str], Path]) -> None:
    engine = trainer(tiny("gptj"))
    with pytest.raises(NotThereError, match="its own eager attention"), kv_through_fp8(network(engine)):
        logprobs(engine, sequences())


def test_another_attention_is_used_for_the_while(tiny: Callable[[str], Path]) -> None:
    engine, requests = trainer(tiny("llama"), "float32"), sequences()
    before = logprobs(engine, requests)
    with attention_of(network(engine), "eager"):
        assert engine.identity()["attention"] == "eager"
        assert np.allclose(before, logprobs(engine, requests), atol=1e-4)
    assert engine.identity()["attention"] == "sdpa"
    with pytest.raises(NotThereError), attention_of(network(engine), "flash_attention_2"):
        pass


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt_neox"])
def test_padding_on_the_left_changes_nothing_but_rounding(tiny: Callable[[str], Path], architecture: str) -> None:
    engine, requests = trainer(tiny(architecture), "float32"), sequences()
    right = logprobs(engine, requests)
    with engine.changed(layout="left-padded"):
        assert np.abs(right - logprobs(engine, requests)).max() < 2e-4


def test_batches_as_the_rollout_makes_them(tiny: Callable[[str], Path]) -> None:
    engine, requests = trainer(tiny("llama"), "float32"), sequences(10)
    batches = engine.plan_as_rollout(requests, most_tokens=60, most_rows=3)
    assert [r.sequence_id for batch in batches for r in batch] == list(range(10))
    assert all(len(batch) <= 3 for batch in batches)
    assert all(sum(r.length for r in batch) <= 60 or len(batch) == 1 for batch in batches)


def test_a_log_softmax_in_16_bit_rounds_log_probs(tiny: Callable[[str], Path]) -> None:
    engine, requests = trainer(tiny("llama")), sequences()
    with engine.changed(softmax_in_dtype=True):
        found = logprobs(engine, requests)
    assert np.array_equal(found, torch.tensor(found).bfloat16().double().numpy())


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_own_routes_give_the_same_bits_and_others_do_not(tiny: Callable[[str], Path], architecture: str) -> None:
    engine, requests = trainer(tiny(architecture), "float32"), sequences()
    (batch,) = engine.plan(requests)
    plain = [s.logprobs for s in engine.score(batch, 1.0)]
    routing = Routing(network(engine), 2)
    with routing.watching():
        engine.score(batch, 1.0)
        own = {layer: routes.clone() for layer, routes in routing.seen.items()}
        assert sorted(own) == [0, 1, 2]
        routing.choose(own)
        same = [s.logprobs for s in engine.score(batch, 1.0)]
        routing.choose({layer: (routes + 1) % 8 for layer, routes in own.items()})
        other = [s.logprobs for s in engine.score(batch, 1.0)]
        routing.choose({layer: torch.full_like(routes, -1) for layer, routes in own.items()})
        kept = [s.logprobs for s in engine.score(batch, 1.0)]
    for a, b, c, d in zip(plain, same, other, kept, strict=True):
        assert np.allclose(a, b, atol=1e-5)
        assert np.array_equal(a, d) or np.allclose(a, d, atol=1e-5)
        assert np.abs(np.asarray(a) - np.asarray(c)).max() > 0.01


def test_a_dense_model_has_no_routes(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(NotThereError, match="no routers"):
        Routing(network(trainer(tiny("llama"))), 2)
