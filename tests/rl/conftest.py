"""Tiny checkpoints of a real architecture; read them, never change them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.tiny import ARCHITECTURES, EXPERTS, save_model


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3 whose head is its embedding."""
    return _two_layers("qwen3", tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama with a head of its own."""
    return _two_layers("llama", tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3 with experts."""
    options = EXPERTS | {"num_hidden_layers": 2, "num_experts": 4}
    return save_model("Qwen3MoeConfig", options, tmp_path_factory.mktemp("mixture"))


def _two_layers(architecture: str, folder: Path) -> Path:
    """A layer less than elsewhere: trials of hypotheses take a forward pass for every tensor."""
    kind, options = ARCHITECTURES[architecture]
    return save_model(kind, options | {"num_hidden_layers": 2}, folder)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors are so small here that a second thread only waits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
