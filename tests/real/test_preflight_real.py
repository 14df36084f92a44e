"""Preflight on what transformers saves, and what real engines do with what it lets through or would have stopped."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import mismatch_probe
from mismatch_probe.engines.builtin import BUILTINS, builtin_path
from mismatch_probe.engines.models import resolve
from mismatch_probe.errors import ProbeError
from mismatch_probe.files import data_path
from mismatch_probe.probes.preflight.run import preflight
from tests.real.tiny import ARCHITECTURES, save_tiny
from validation.preflight_families import USE, families, findings_of, save_family

# True of these families, see `engines.declarations` and `engines.vllm.refusals`.
KNOWN = {
    "cohere2": {("declaration-shifted", "sliding_window")},
    "gemma2": {("declaration-ignored", "attn_logit_softcapping"), ("dtype-unsupported", "float16")},
}
ONE_PAIR: dict[str, Any] = {
    "rollout_dtypes": ("float32",),
    "trainer_dtypes": ("float32",),
    "num_prompts": 2,
    "max_tokens": 4,
    "self_noise_tokens": 0,
}


def above_info(folder: Path) -> set[tuple[str, str]]:
    document = preflight(resolve(str(folder)), USE)
    assert not [run for run in document.checks if run.skipped_for]
    return {(finding.code, finding.where) for finding in document.findings if finding.severity != "info"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_false_alarm_of_a_family(architecture: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert above_info(save_tiny(architecture, tmp_path)) == KNOWN.get(architecture, set())


@pytest.mark.slow
def test_no_false_alarm_of_any_family_that_both_engines_know(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    read, alarms = 0, {}
    for kind in sorted(families()):
        folder = tmp_path / kind
        try:
            save_family(kind, folder)
        except Exception:  # sizes of a few are not known
            continue
        read += 1
        found = {(finding.code, finding.where) for finding in findings_of(folder)}
        alarms[kind] = found - KNOWN.get(kind, set()) - {("dtype-unsupported", "float16")}
        shutil.rmtree(folder)
    assert {kind: found for kind, found in alarms.items() if found} == {}
    assert read >= 70


def test_no_false_alarm_of_the_models_of_this_tool() -> None:
    assert above_info(data_path("rl/chain/config.json").parent) == set()
    path = builtin_path(BUILTINS["smollm2-135m"])
    if path.is_dir():
        assert above_info(path) == set()


@pytest.mark.engine
@pytest.mark.slow
def test_pickled_weights_reach_both_engines(tmp_path: Path) -> None:
    torch, safetensors = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    pytest.importorskip("vllm")
    model = save_tiny("llama", tmp_path / "m")
    weights = model / "model.safetensors"
    torch.save(safetensors.load_file(weights), model / "pytorch_model.bin")
    weights.unlink()
    result = mismatch_probe.compare(model=str(model), device="cpu", **ONE_PAIR, out=tmp_path / "run")
    gap = result.summary.pairs[0].metrics["mean_abs_logprob_diff"].value
    assert gap is not None
    assert gap < 1e-4  # random weights on either side would be nats apart


@pytest.mark.engine
@pytest.mark.slow
def test_a_truncated_shard_is_named_without_preflight_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setattr("mismatch_probe.probes.planning.guard", lambda *_: None)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # vLLM's own process fails, and the parent gets a wrapper
    model = save_tiny("llama", tmp_path / "m")
    os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size - 100_000)
    with pytest.raises(ProbeError, match="file not fully covered"):
        mismatch_probe.compare(model=str(model), device="cpu", **ONE_PAIR, out=tmp_path / "run")
