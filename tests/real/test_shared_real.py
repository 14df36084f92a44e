"""Shared sequences on real engines: ids, replays, rows, reference. One run, seen from many sides, and one in vLLM's own
engine process.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import mismatch_probe
from mismatch_probe.results.comparison import Pair

pytestmark = pytest.mark.engine
Tiny = Callable[[str], Path]
OPTIONS: dict[str, Any] = {
    "num_prompts": 12,
    "max_tokens": 16,
    "rollout_batch": 8,
    "self_noise_tokens": 4,
    "sequences": "shared",
    "exact_kl": "all",
    "reference": "float64",
}


def pair(run: Any, rollout: str, trainer: str) -> Pair:
    return next(p for p in run.summary.pairs if (p.rollout_dtype, p.trainer_dtype) == (rollout, trainer))


@pytest.fixture(scope="session")
def shared(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = dict(model=str(tiny("qwen3")), **OPTIONS)
    return mismatch_probe.compare(**config, out=tmp_path_factory.mktemp("shared") / "run")


def table(run: Any, name: str) -> pd.DataFrame:
    return pd.read_parquet(run.path / f"{name}.parquet")


def test_every_dtype_has_the_same_tokens(shared: Any) -> None:
    tokens = table(shared, "tokens")
    sampled = tokens[tokens["pass_id"] == "vllm-bfloat16-decode"]["token_id"].tolist()
    for name in ("vllm-float16-replay", "vllm-float32-replay", "hf-float32-cast"):
        assert tokens[tokens["pass_id"] == name]["token_id"].tolist() == sampled
    assert {p.on_policy for p in shared.summary.pairs if p.rollout_dtype != "bfloat16"} == {False}


def test_a_replay_repeats_itself_bit_by_bit(shared: Any) -> None:
    noise = {found.pass_id: found.measured for found in shared.summary.self_noise}
    for name in ("vllm-float16-replay", "vllm-float32-replay"):
        assert noise[name].n_tokens > 0
        assert noise[name].max_abs_logprob_diff == 0


def test_rows_belong_to_their_tokens(shared: Any) -> None:
    """The divergence of two rows bounds what their token's log-probs can differ by on average: k3 of the very tokens
    agrees with the exact KL to sampling noise, which a row at the wrong place would not.
    """
    for dtype in ("bfloat16", "float16", "float32"):
        metrics = pair(shared, dtype, dtype).metrics
        assert metrics["kl_k3"].value == pytest.approx(metrics["kl_exact"].value, rel=0.6)


def test_precision_orders_exact_divergence(shared: Any) -> None:
    exact = {
        dtype: pair(shared, dtype, dtype).metrics["kl_exact"].value for dtype in ("bfloat16", "float16", "float32")
    }
    assert 20 < exact["bfloat16"] / exact["float16"] < 200  # 2⁶ = 64
    assert exact["float32"] < 1e-10
    assert not (shared.path / "rows").exists()


def test_errors_explain_the_gap(shared: Any) -> None:
    """The tiny checkpoint has FP32 weights, and casting them is an error that both 16-bit sides share."""
    for dtype in ("bfloat16", "float16"):
        budget = {key: value.value for key, value in pair(shared, dtype, dtype).budget.items()}
        cross = 2 * budget["error_correlation"] * budget["rollout_error_rms"] * budget["trainer_error_rms"]
        assert budget["measured_gap_rms"] ** 2 == pytest.approx(budget["predicted_gap_rms"] ** 2 - cross, rel=1e-6)
        assert budget["error_correlation"] > 0.3
        assert budget["measured_over_predicted"] < 0.9
    floor = pair(shared, "float32", "float32").budget["trainer_error_rms"].value
    assert 1e-8 < floor < 1e-5


def test_the_reference_keeps_its_digits(shared: Any) -> None:
    reference = table(shared, "reference")
    values = reference[reference["pass_id"] == "hf-float64-cast"]["logprob"].to_numpy()
    assert values.dtype == np.float64
    assert (values != values.astype(np.float32)).any()


def test_entropy_and_rank_are_those_of_the_trainers_law(shared: Any) -> None:
    tokens = table(shared, "tokens")
    scored = tokens[tokens["pass_id"] == "hf-float32-cast"]
    assert scored["entropy"].between(0, np.log(128)).all()
    likeliest = scored[scored["rank"] == 0]
    assert len(likeliest) > 0
    assert (np.exp(likeliest["logprob"]) >= np.exp(scored["logprob"]).min()).all()
    exact = table(shared, "exact").query("rollout_pass == 'vllm-float32-replay' and pass_id == 'hf-float32-cast'")
    merged = scored.merge(exact, on=["sequence_id", "position"])
    assert len(merged) == len(scored)
    np.testing.assert_allclose(merged["entropy_trainer"], merged["entropy"], atol=1e-4)


def test_vllms_own_engine_process_replays_and_keeps_rows_too(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    dtypes = {"rollout_dtypes": ("bfloat16", "float32"), "trainer_dtypes": ("float32",)}
    options = {**OPTIONS, **dtypes, "exact_kl": 30, "reference": "float32"}
    run = mismatch_probe.compare(model=str(tiny("llama")), **options, out=tmp_path / "run")
    assert run.data.manifest.passes["vllm-float32-replay"].engine["in_process"] is False
    metrics = pair(run, "float32", "float32").metrics
    assert 0 < metrics["kl_exact"].value < 1e-10
    assert len(table(run, "exact")) == 2 * 30


@pytest.mark.gpu
def test_on_a_gpu_replays_and_kept_rows_belong_to_their_tokens(tiny: Tiny, tmp_path: Path) -> None:
    options = {**OPTIONS, "num_prompts": 16, "max_tokens": 64, "exact_kl": 64, "device": "cuda", "eager": True}
    run = mismatch_probe.compare(model=str(tiny("qwen3")), **options, out=tmp_path / "run")
    tokens = table(run, "tokens")
    sampled = tokens[tokens["pass_id"] == "vllm-bfloat16-decode"]["token_id"].tolist()
    for dtype in ("float16", "float32"):
        assert tokens[tokens["pass_id"] == f"vllm-{dtype}-replay"]["token_id"].tolist() == sampled
    for dtype in ("bfloat16", "float16", "float32"):
        metrics = pair(run, dtype, dtype).metrics
        assert metrics["kl_k3"].value == pytest.approx(metrics["kl_exact"].value, rel=0.6)
