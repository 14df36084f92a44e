"""What runs on a CUDA device without vLLM: trainer, losses, and the RL loop around transformers."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from mismatch_probe.files import data_path
from tests.real.conftest import tiny  # noqa: F401

collect_ignore_glob = [] if find_spec("torch") and find_spec("transformers") else ["test_*.py"]


@pytest.fixture
def chain() -> Path:
    """The checkpoint that comes with the tool."""
    return data_path("rl/chain/config.json").parent


@pytest.fixture(autouse=True)
def flags_put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A trainer sets torch's flags for its process, which a test's process outlives."""
    import torch
    from transformers.integrations import sdpa_attention

    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = {name: getattr(matmul, name) for name in names}
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = convolutions
    for name, value in before.items():
        setattr(matmul, name, value)
