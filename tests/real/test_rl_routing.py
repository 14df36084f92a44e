"""Routes of tokens that real vLLM samples: those of its prefill, compared with the trainer's, and followed by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import mismatch_probe
from mismatch_probe.engines.process import EngineProcess
from mismatch_probe.engines.vllm.settings import rollout_settings
from mismatch_probe.types import Dtype
from tests.conftest import Heard
from tests.real.rl_jobs import RoutesJob, RoutesSaid

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("architecture", "dtype", "mode"),
    [
        ("qwen3_moe", "float32", "cast"),
        ("qwen3_moe", "bfloat16", "cast"),
        ("mixtral", "bfloat16", "autocast"),
    ],
)
def test_the_trainer_follows_the_routes_of_decoding(
    tiny: Callable[[str], Path], tmp_path: Path, architecture: str, dtype: Dtype, mode: str
) -> None:
    settings = rollout_settings("cpu", dtype, eager=True, in_process=True, kv_cache_gib=1)
    process, heard = EngineProcess("vllm", settings.environment, tmp_path / "vllm.log"), Heard()
    process.run(RoutesJob(str(tiny(architecture)), dtype, mode), heard)
    (said,) = heard.of(RoutesSaid)
    assert said.same_bits
    # With rows of other tokens it would be near 1 in 28; a prefill may round differently.
    assert said.decode > 0.98
    assert said.applied == 1
    agreement, flipped = (said.columns["none"][name] for name in ("router_agreement", "router_flipped_tokens"))
    assert agreement is not None
    assert flipped is not None
    if dtype == "float32":
        assert (agreement, flipped, said.known, said.decode) == (1, 0, 1, 1)
        assert said.rms["routing-replay"] == said.rms["none"] < 1e-4
    else:
        assert 0.5 < agreement < 1
        assert 0 < flipped < 0.5
        assert said.known > 0.95
        assert said.rms["routing-replay"] < 0.7 * said.rms["none"]


def test_a_run_on_a_mixture_replays_routes(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    settings = {
        "model": str(tiny("qwen3_moe")),
        "operations": 3,
        "max_tokens": 32,
        "steps": 2,
        "n_problems": 8,
        "prompts_per_step": 4,
        "samples_per_prompt": 4,
        "updates_per_rollout": 2,
    }
    steps = {
        remedy: mismatch_probe.rl_run(**settings, remedy=remedy, out=tmp_path / remedy).steps()
        for remedy in ("none", "routing-replay")
    }
    for rows in steps.values():
        assert rows["router_agreement"].between(0.5, 1).all()
        assert rows["router_flipped_tokens"].between(0, 0.5).all()
    # The first step samples the same tokens.
    apart = {remedy: rows["rms_logprob_diff"].iloc[0] for remedy, rows in steps.items()}
    assert apart["routing-replay"] < apart["none"]
