"""Unaltered models of families whose insides vLLM and transformers lay out differently: nothing may stand out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.planted_faults import Trainer, trace

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("architecture", ["cohere2", "falcon"])
def test_nothing_of_a_clean_model_stands_out(architecture: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    trace(tiny(architecture), "float32", tmp_path / "trace")
    trainer = Trainer(tiny(architecture), "float32", tmp_path / "trace")
    assert trainer.locate().verdict == "no single layer"
    assert trainer.locate().score < 1.3
    streams = [d for d in trainer.differences(("stream", "layer")) if d.kind in ("stream", "layer")]
    of_layers = [d for d in streams if d.layer is not None and d.name.endswith(f".{d.layer}")]
    assert len(of_layers) == 2 * 3
    assert max(float(np.sqrt(d.apart.sum() / d.size.sum())) for d in of_layers) < 1e-5
