"""Unaltered models of families whose insides vLLM and transformers lay out differently: nothing may stand out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.planted_faults import Trainer, trace
from mismatch_probe.engines.attribute.inside import column_order

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("architecture", ["cohere2", "falcon", "qwen2_moe"])
def test_nothing_of_a_clean_model_stands_out(architecture: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    trace(tiny(architecture), "float32", tmp_path / "trace")
    trainer = Trainer(tiny(architecture), "float32", tmp_path / "trace")
    found = trainer.locate()
    assert found.verdict == "no single layer"
    assert found.score < 1.6
    streams = [d for d in trainer.differences(("stream", "layer")) if d.kind in ("stream", "layer")]
    of_layers = [d for d in streams if d.layer is not None and d.name.endswith(f".{d.layer}")]
    assert len(of_layers) == 2 * 3
    assert max(float(np.sqrt(d.apart.sum() / d.size.sum())) for d in of_layers) < 1e-5


def test_the_order_of_columns_is_read_from_values() -> None:
    draw = torch.Generator().manual_seed(0)
    ours = torch.randn(40, 3000, generator=draw)
    there = torch.randperm(3000, generator=draw)
    theirs = torch.empty_like(ours)
    theirs[:, there] = ours + 0.01 * torch.randn(ours.shape, generator=draw)
    found = column_order(theirs, ours)
    assert found is not None
    assert found.equal(there)
    torch.testing.assert_close(theirs[:, found], ours, atol=0.1, rtol=0)


def test_values_in_one_order_or_in_none_are_left_as_they_are() -> None:
    draw = torch.Generator().manual_seed(0)
    ours = torch.randn(40, 300, generator=draw)
    assert column_order(ours + 0.01, ours) is None
    assert column_order(-ours, ours) is None  # far, and no order makes them near
    assert column_order(torch.randn(40, 300, generator=draw), ours) is None
    assert column_order(torch.zeros_like(ours), ours) is None
