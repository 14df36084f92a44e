"""The trainer engine on a CUDA device, against transformers in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mismatch_probe.engines.hf.engine import HfTrainer
from mismatch_probe.engines.hf.settings import trainer_settings
from mismatch_probe.types import ScoreRequest
from tests.real.test_hf_trainer import plain, requests, scores, trainer
from tests.real.tiny import ARCHITECTURES, VOCABULARY

pytestmark = [pytest.mark.gpu, pytest.mark.engine]
Tiny = Callable[[str], Path]


def on_cuda(path: Path, **options: Any) -> HfTrainer:
    """The engine with the flags that its process gets."""
    dtype = options.get("dtype", "float32")
    flags = {**trainer_settings("cuda", dtype).arguments, **options.pop("flags", {})}
    return trainer(path, device="cuda", flags=flags, **options)


def error(path: Path, wanted: list[ScoreRequest], **options: Any) -> float:
    """Mean |d| from float64."""
    found = scores(on_cuda(path, **options), wanted)
    return float(np.mean([np.abs(found[r.sequence_id] - plain(path, r)).mean() for r in wanted]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fp32_scores_are_those_of_float64(tiny: Tiny, architecture: str) -> None:
    path, wanted = tiny(architecture), requests(3)
    found = scores(on_cuda(path), wanted)
    for request in wanted:
        np.testing.assert_allclose(found[request.sequence_id], plain(path, request), atol=2e-5)


def test_float64_scores_are_those_of_the_cpu(tiny: Tiny) -> None:
    path, wanted = tiny("qwen3"), requests(3)
    found, expected = (scores(t, wanted) for t in (on_cuda(path, dtype="float64"), trainer(path, dtype="float64")))
    for request in wanted:
        np.testing.assert_allclose(found[request.sequence_id], expected[request.sequence_id], rtol=0, atol=1e-11)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_tf32_is_off_and_would_show(tiny: Tiny, attention: str) -> None:
    path, wanted = tiny("qwen3"), requests(6)
    strict = error(path, wanted, attention=attention)
    loose = error(path, wanted, attention=attention, flags={"float32_matmul_precision": "high"})
    assert strict < 2e-6
    assert loose > 20 * strict


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["cast", "autocast"])
def test_rounding_grows_with_fewer_bits(tiny: Tiny, mode: str, attention: str) -> None:
    path, wanted = tiny("qwen3"), requests(12)
    coarse, fine = (
        error(path, wanted, dtype=dtype, mode=mode, attention=attention) for dtype in ("bfloat16", "float16")
    )
    assert 3 < coarse / fine < 20
    assert fine > 1e-5


def test_layouts_agree_in_fp32(tiny: Tiny) -> None:
    wanted = requests()
    single = scores(on_cuda(tiny("llama"), layout="single"), wanted)
    for layout in ("padded", "packed"):
        other = scores(on_cuda(tiny("llama"), layout=layout), wanted)
        for request in wanted:
            np.testing.assert_allclose(other[request.sequence_id], single[request.sequence_id], atol=1e-5)


def test_fp32_attention_of_grouped_heads_holds_no_scores(tiny: Tiny) -> None:
    # One sequence without a mask: with grouped heads left to torch its math kernel would hold 4 × 4096² scores twice.
    ids = np.random.default_rng(0).integers(3, VOCABULARY, 4096).tolist()
    engine = on_cuda(tiny("llama"), layout="single")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    engine.score([ScoreRequest(0, ids[:10], ids[10:])], 1.0)
    assert torch.cuda.max_memory_allocated() - before < 4 * 4096**2 * 4


def test_a_16_bit_pass_keeps_the_flags_that_the_users_trainer_has(tiny: Tiny) -> None:
    on_cuda(tiny("llama"), dtype="bfloat16")
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    on_cuda(tiny("llama"), dtype="float32")
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_tf32
