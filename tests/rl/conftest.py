"""Tiny checkpoints of a real architecture; read them, never change them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.tiny import EXPERTS, save_model, save_tiny


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3 whose head is its embedding."""
    return save_tiny("qwen3", tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama with a head of its own."""
    return save_tiny("llama", tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3 with experts."""
    options = EXPERTS | {"num_hidden_layers": 2, "num_experts": 4}
    return save_model("Qwen3MoeConfig", options, tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors are so small here that a second thread only waits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
