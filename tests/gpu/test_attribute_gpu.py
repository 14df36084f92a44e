"""An attribution on a GPU: what a CPU cannot show. Written without one, and never run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import mismatch_probe
from mismatch_probe.probes.attribute.session import AttributeResult

pytestmark = [pytest.mark.gpu, pytest.mark.engine]
Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def result(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> AttributeResult:
    config = {
        "model": str(tiny("qwen3_moe")),
        "device": "cuda",
        "num_prompts": 16,
        "samples_per_prompt": 1,
        "max_tokens": 48,
    }
    return mismatch_probe.attribute(**config, out=tmp_path_factory.mktemp("gpu") / "run", settings=("all",))


def test_rungs_add_up(result: AttributeResult) -> None:
    rungs = result.attribution.ladder.rungs
    assert sum(rung.contribution.value or 0.0 for rung in rungs) == pytest.approx(1, abs=1e-9)


def test_nothing_failed(result: AttributeResult) -> None:
    assert result.failed == []


def test_eager_mode_is_measured_beside_the_layers(result: AttributeResult) -> None:
    layers = result.attribution.layers
    assert layers.rollout_eager is False
    assert layers.eager_vs_compiled_shift is not None


def test_clean_engines_have_no_single_layer_at_fault(result: AttributeResult) -> None:
    for dtype, found in result.attribution.layers.dtypes.items():
        assert found.why == "", dtype
        assert found.located is not None
        assert found.located.verdict == "no single layer", dtype


def test_settings_of_a_gpu_are_measured(result: AttributeResult) -> None:
    measured = {row.name for row in result.attribution.settings if row.status == "measured"}
    assert measured >= {"rollout-eager", "rollout-attention-triton_attn", "rollout-batch-invariant"}


def test_routes_are_kept_by_the_other_model_runner(result: AttributeResult) -> None:
    found = result.attribution.experts
    assert found is not None
    assert found.why == ""
    assert all(0.5 < row.agreement <= 1 for row in found.layers)
