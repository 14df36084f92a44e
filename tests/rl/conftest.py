"""Tiny checkpoints of a real architecture; read them, never change them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.tiny import save_tiny


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
    return save_tiny("qwen3_moe", tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors are so small here that a second thread only waits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
