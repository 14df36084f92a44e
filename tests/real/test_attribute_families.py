"""Unaltered models of families whose insides vLLM and transformers lay out differently: nothing may stand out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mismatch_probe.engines.attribute.inside import column_order, flipped
from validation.planted_faults import Trainer, trace

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("architecture", ["cohere2", "falcon", "qwen2_moe"])
def test_nothing_of_a_clean_model_stands_out(architecture: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    trace(tiny(architecture), "float32", tmp_path / "trace")
    trainer = Trainer(tiny(architecture), "float32", tmp_path / "trace")
    assert trainer.locate().verdict == "no single layer"
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


def test_twins_dead_columns_and_large_biases_do_not_hide_an_order() -> None:
    draw = torch.Generator().manual_seed(0)
    ours = torch.randn(16, 600, generator=draw) + 100 * torch.randn(600, generator=draw)
    ours[:, 200:230] = 0  # dead
    ours[:, 300:320] = ours[:, 320:340]  # twins
    theirs = ours[:, torch.randperm(600, generator=draw)]
    found = column_order(theirs, ours)
    assert found is not None
    assert theirs[:, found].equal(ours)
    # A few columns that are elsewhere are an order, too.
    there = torch.arange(600)
    there[:30] = there[:30].flip(0)
    found = column_order(ours[:, there], ours)
    assert found is not None
    assert ours[:, there][:, found].equal(ours)


def test_values_in_one_order_or_in_none_are_left_as_they_are() -> None:
    draw = torch.Generator().manual_seed(0)
    ours = torch.randn(40, 300, generator=draw)
    assert column_order(ours + 0.01, ours) is None
    assert column_order(-ours, ours) is None  # far, and no order makes them near
    assert column_order(torch.randn(40, 300, generator=draw), ours) is None
    assert column_order(torch.zeros_like(ours), ours) is None


def test_tokens_of_other_experts_are_told_where_the_largest_logits_choose() -> None:
    ours = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0], [1.0, 0.0, 3.0, 2.0]])
    theirs = ours.clone()
    theirs[1, 1] = 2.5
    chosen = torch.tensor([[0, 1], [3, 2], [3, 2]])
    found = flipped(theirs, ours, chosen)
    assert found is not None
    assert found.tolist() == [False, True, False]
    assert flipped(theirs, ours, torch.tensor([[0, 2], [3, 2], [3, 2]])) is None  # groups, or a correction
