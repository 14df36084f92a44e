"""`compare` on real vLLM and real transformers. An engine start costs seconds: few runs, seen from many sides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mismatch_probe
from mismatch_probe.engines.devices import gpu_present
from mismatch_probe.results.comparison import Pair

pytestmark = pytest.mark.engine
Tiny = Callable[[str], Path]
SMALL: dict[str, Any] = {"num_prompts": 8, "max_tokens": 24, "rollout_batch": 8, "self_noise_tokens": 4}


def pair(result: Any, rollout: str, trainer: str) -> Pair:
    return next(p for p in result.summary.pairs if (p.rollout_dtype, p.trainer_dtype) == (rollout, trainer))


def mean_abs(result: Any, rollout: str, trainer: str) -> float:
    return pair(result, rollout, trainer).metrics["mean_abs_logprob_diff"].value


@pytest.fixture(scope="session")
def qwen3(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return mismatch_probe.compare(model=str(tiny("qwen3")), **SMALL, out=tmp_path_factory.mktemp("qwen3") / "run")


def test_every_cell_is_there_and_ordered_by_precision(qwen3: Any) -> None:
    assert len(qwen3.summary.pairs) == 9
    assert not qwen3.summary.missing
    assert mean_abs(qwen3, "float32", "float32") < 1e-5
    assert 3 < mean_abs(qwen3, "bfloat16", "bfloat16") / mean_abs(qwen3, "float16", "float16") < 20
    for other in ("float16", "float32"):
        assert mean_abs(qwen3, "bfloat16", other) > 5 * mean_abs(qwen3, "float16", "float16") / 3


def test_self_noise_is_exactly_zero_in_process_on_a_cpu(qwen3: Any) -> None:
    noise = {found.pass_id: found.measured for found in qwen3.summary.self_noise}
    assert len(noise) == 6
    if qwen3.data.manifest.device == "cpu":
        assert {(found.max_abs_logprob_diff, found.n_diverged_sequences) for found in noise.values()} == {(0, 0)}


def test_the_manifest_says_what_ran(qwen3: Any) -> None:
    passes = qwen3.data.manifest.passes
    for dtype in ("bfloat16", "float16", "float32"):
        rollout = passes[f"vllm-{dtype}-decode"]
        assert rollout.engine["dtype"] == dtype
        assert rollout.engine["in_process"] is True
        assert rollout.engine["logprobs_mode"] == "raw_logprobs"
        assert rollout.engine["attention_backends"]
        assert set(rollout.timings) >= {"load", "first_step", "generate", "self_noise"}
    assert "model.safetensors" in qwen3.data.manifest.model.files


def test_the_same_command_gives_the_same_summary_to_the_byte(tiny: Tiny, tmp_path: Path) -> None:
    config = dict(model=str(tiny("qwen3")), rollout_dtypes=("bfloat16",), trainer_dtypes=("bfloat16",), **SMALL)
    first, second = (mismatch_probe.compare(**config, out=tmp_path / name).path / "summary.json" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_a_temperature_is_applied_on_both_sides(tiny: Tiny, tmp_path: Path) -> None:
    options = {**SMALL, "rollout_dtypes": ("float32",), "trainer_dtypes": ("float32",), "temperature": 0.6}
    result = mismatch_probe.compare(model=str(tiny("llama")), **options, out=tmp_path / "run")
    assert mean_abs(result, "float32", "float32") < 1e-5
    assert result.data.manifest.passes["vllm-float32-decode"].engine["logprobs_mode"] == "processed_logprobs"


@pytest.mark.parametrize("architecture", ["gpt_neox", "qwen3_moe"])
def test_other_architectures_agree_in_fp32(tiny: Tiny, tmp_path: Path, architecture: str) -> None:
    options = {**SMALL, "rollout_dtypes": ("float32",), "trainer_dtypes": ("float32",)}
    result = mismatch_probe.compare(model=str(tiny(architecture)), **options, out=tmp_path / "run")
    assert mean_abs(result, "float32", "float32") < 1e-5


def test_an_architecture_that_needs_the_engine_process_gets_it(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some CPUs run OLMo2 in-process and on others it dies there; asking for the process makes all of them run it so.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    options = {**SMALL, "rollout_dtypes": ("float32",), "trainer_dtypes": ("float32",)}
    result = mismatch_probe.compare(model=str(tiny("olmo2")), **options, out=tmp_path / "run")
    rollout = result.data.manifest.passes["vllm-float32-decode"]
    assert mean_abs(result, "float32", "float32") < 1e-5
    assert rollout.engine["in_process"] is False
    assert rollout.engine["attention_backends"]
    assert rollout.deterministic.promised is False


def test_a_dtype_that_vllm_refuses_leaves_its_cells_empty_with_the_reason(tiny: Tiny, tmp_path: Path) -> None:
    options = {**SMALL, "rollout_dtypes": ("float16", "float32"), "trainer_dtypes": ("float32",)}
    result = mismatch_probe.compare(model=str(tiny("gemma2")), **options, out=tmp_path / "run")
    (missing,) = result.summary.missing
    assert missing.rollout_dtype == "float16"
    assert "does not support float16 for model type gemma2" in missing.why
    assert result.complete
    assert mean_abs(result, "float32", "float32") < 1e-5


@pytest.mark.slow
def test_the_built_in_model_shows_the_papers_gap(tmp_path: Path) -> None:
    dtypes: Any = {"rollout_dtypes": ("bfloat16", "float16"), "trainer_dtypes": ("bfloat16", "float16")}
    config = dict(num_prompts=12, max_tokens=8, rollout_batch=12, self_noise_tokens=0, **dtypes)
    result = mismatch_probe.compare(**config, out=tmp_path / "run")
    assert 1e-2 < mean_abs(result, "bfloat16", "bfloat16") < 1e-1
    assert 1e-3 < mean_abs(result, "float16", "float16") < 1.5e-2


@pytest.mark.gpu
def test_on_a_gpu_the_matrix_is_complete_and_fp32_is_fp32(tiny: Tiny, tmp_path: Path) -> None:
    assert gpu_present()
    config = {
        "model": str(tiny("llama")),
        "device": "cuda",
        "num_prompts": 16,
        "samples_per_prompt": 1,
        "max_tokens": 64,
    }
    result = mismatch_probe.compare(**config, out=tmp_path / "run")
    assert len(result.summary.pairs) == 9
    assert mean_abs(result, "float32", "float32") < 1e-5
    assert 3 < mean_abs(result, "bfloat16", "bfloat16") / mean_abs(result, "float16", "float16") < 20


@pytest.mark.gpu
def test_on_a_gpu_an_engine_leaves_the_card_free(tiny: Tiny, tmp_path: Path) -> None:
    import torch

    config = {
        "model": str(tiny("llama")),
        "device": "cuda",
        "num_prompts": 4,
        "max_tokens": 8,
        "rollout_dtypes": ("bfloat16",),
        "trainer_dtypes": ("bfloat16",),
    }
    free_before, _ = torch.cuda.mem_get_info()
    mismatch_probe.compare(**config, out=tmp_path / "run")
    free_after, total = torch.cuda.mem_get_info()
    assert free_before - free_after < 0.02 * total
