"""An audit of tiny models with planted outliers names the right module, and says the right thing of it, every time.

Real transformers; the log-probs of the rollout engine are made up, since nothing here depends on them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import mismatch_probe
from mismatch_probe.results.audit import AuditedPair, Check
from mismatch_probe.runs.comparison import RunDirectory
from tests.conftest import Heard
from tests.real.gradient_runs import plant_run
from tests.real.planted_range import (
    LAYER,
    plant_broken,
    plant_large_scores,
    plant_outlier,
    plant_steep_backward,
    plant_subnormal,
)

pytestmark = pytest.mark.engine
Tiny = Callable[[str], Path]
# The 8 prompts of the planted runs exclude no rate that a real audit asks for, and nobody sampled their tokens.
PROFILE = """
extends = "default"
skip = ["one_sided"]
[checks.nonfinite_logprobs]
event = "fail"
rate_below = 0.5
[checks.confident_disagreement_rate]
event = "warn"
rate_below = 0.5
[checks.fp16_headroom]
warn_below = 4.0
fail_below = 1.0
rate_below = 0.5
[checks.fp16_overflow_rate]
event = "fail"
rate_below = 0.5
[checks.fp16_attention_headroom]
warn_below = 1.0
rate_below = 0.5
[checks.fp16_loss_scale]
warn_below = 2.0
fail_below = 0.0
rate_below = 0.5
[checks.fp16_loss_scale_start]
warn_below = 0.0
rate_below = 0.5
"""
STEP_TOKENS = 64


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own costs seconds each time; the whole way is gone in `test_audit_real.py`."""
    monkeypatch.setattr("mismatch_probe.probes.audit.measure.run_pass", lambda _, job, *__: job.run(Heard()))
    monkeypatch.setattr("mismatch_probe.report.figures.draw", lambda data, folder: {})


@pytest.fixture(scope="module")
def sequences(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """Those of every planted run: they depend on its seed alone."""
    run = plant_run(tmp_path_factory.mktemp("plain") / "run", tiny("llama"), {"float32": 0.0})
    rows = run.sequences("vllm-float32-decode").to_pylist()
    return [row["prompt_token_ids"] + row["response_token_ids"] for row in rows if row["response_token_ids"]]


def audit(checkpoint: Path, folder: Path, attention: str | None = None) -> tuple[AuditedPair, dict[str, Check]]:
    """The FP16 pair of the audit, and its checks by name."""
    folder.mkdir(exist_ok=True)
    run: RunDirectory = plant_run(folder / "run", checkpoint, {"float16": 1e-3, "float32": 1e-7})
    run.manifest.config = run.manifest.config.replace(trainer_attn=attention)
    run.save()
    (folder / "profile.toml").write_text(PROFILE)
    result = mismatch_probe.Run.open(run.path).audit(profile=str(folder / "profile.toml"), step_tokens=STEP_TOKENS)
    pair = next(pair for pair in result.audit.pairs if pair.dtypes == ("float16", "float16"))
    return pair, {check.name: check for check in pair.checks}


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "gptj", "gemma2"])
def test_a_healthy_model_is_ok(tiny: Tiny, tmp_path: Path, architecture: str) -> None:
    pair, checks = audit(tiny(architecture), tmp_path)
    verdicts = {name: check.verdict for name, check in checks.items() if name.startswith("fp16")}
    assert set(verdicts.values()) == {"ok"}, verdicts
    assert pair.verdict != "fail"


def test_a_peak_of_40000_warns_where_it_is(tiny: Tiny, tmp_path: Path, sequences: list[list[int]]) -> None:
    pair, checks = audit(plant_outlier(tiny("llama"), tmp_path / "model", sequences, 40_000), tmp_path)
    assert pair.verdict == "warn"
    found = checks["fp16_headroom"]
    assert (found.verdict, found.finding.where) == ("warn", f"{LAYER}.mlp.down_proj")
    assert found.value.value == pytest.approx(65504 / 40_000, rel=1e-3)
    assert checks["fp16_overflow_rate"].verdict == "ok"
    assert checks["fp16_pass"].verdict == "ok"


def test_a_peak_of_70000_fails_where_it_is(tiny: Tiny, tmp_path: Path, sequences: list[list[int]]) -> None:
    pair, checks = audit(plant_outlier(tiny("llama"), tmp_path / "model", sequences, 70_000), tmp_path)
    assert pair.verdict == "fail"
    for name in ("fp16_headroom", "fp16_overflow_rate", "fp16_pass"):
        assert (checks[name].verdict, checks[name].finding.where) == ("fail", f"{LAYER}.mlp.down_proj"), name
    assert checks["fp16_pass"].finding.text("way") == "forward"


def test_a_backward_overflow_alone_warns_with_the_scale_that_serves(tiny: Tiny, tmp_path: Path) -> None:
    pair, checks = audit(plant_steep_backward(tiny("llama"), tmp_path / "model"), tmp_path)
    assert pair.verdict == "warn"
    assert [checks[n].verdict for n in ("fp16_headroom", "fp16_weights", "fp16_loss_scale")] == ["ok"] * 3
    start = checks["fp16_loss_scale_start"]
    assert (start.verdict, start.finding.where) == ("warn", f"{LAYER}.mlp.down_proj (input) (activation)")
    assert checks["fp16_pass"].verdict == "ok"
    assert checks["fp16_pass"].finding.number("exponent") < 16


def test_gradients_too_far_apart_for_any_scale_fail(tiny: Tiny, tmp_path: Path) -> None:
    pair, checks = audit(plant_steep_backward(tiny("llama"), tmp_path / "model", flat=True), tmp_path)
    assert pair.verdict == "fail"
    assert (checks["fp16_headroom"].verdict, checks["fp16_weights"].verdict) == ("ok", "ok")
    found = checks["fp16_loss_scale"]
    assert (found.verdict, found.finding.where) == ("fail", f"{LAYER}.mlp.up_proj.weight")
    assert found.finding.code == "audit-no-loss-scale"
    assert found.finding.text("low_by").startswith("model.layers.2.self_attn")


def test_subnormal_weights_fail_where_they_are(tiny: Tiny, tmp_path: Path) -> None:
    pair, checks = audit(plant_subnormal(tiny("llama"), tmp_path / "model"), tmp_path)
    assert pair.verdict == "fail"
    assert (checks["fp16_weights"].verdict, checks["fp16_weights"].finding.where) == (
        "fail",
        f"{LAYER}.self_attn.v_proj.weight",
    )
    assert checks["fp16_headroom"].verdict == "ok"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_model_that_is_not_finite_fails_where_it_is_and_leaves_a_strict_document(
    tiny: Tiny, tmp_path: Path, value: float
) -> None:
    pair, checks = audit(plant_broken(tiny("llama"), tmp_path / "model", value), tmp_path)
    assert pair.verdict == "fail"
    for name in ("fp16_headroom", "fp16_overflow_rate", "fp16_loss_scale", "fp16_pass"):
        assert checks[name].verdict == "fail", name
    assert checks["fp16_headroom"].finding.where == f"{LAYER}.mlp.down_proj"
    assert checks["fp16_headroom"].finding.text("nonfinite_at") == f"{LAYER}.mlp.down_proj"
    assert (checks["fp16_weights"].verdict, checks["fp16_weights"].finding.where) == (
        "fail",
        f"{LAYER}.mlp.down_proj.weight",
    )


def test_products_of_attention_count_where_attention_is_eager(tiny: Tiny, tmp_path: Path) -> None:
    model = plant_large_scores(tiny("llama"), tmp_path / "model")
    _, eager = audit(model, tmp_path / "eager", "eager")
    assert eager["fp16_attention_headroom"].verdict == "warn"
    assert (eager["fp16_headroom"].verdict, eager["fp16_headroom"].finding.where) == (
        "fail",
        f"{LAYER}.self_attn (q·k)",
    )
    assert eager["fp16_pass"].verdict == "fail"
    _, fused = audit(model, tmp_path / "fused", "sdpa")
    assert fused["fp16_attention_headroom"].value.value == pytest.approx(
        eager["fp16_attention_headroom"].value.value, rel=1e-4
    )
    assert fused["fp16_headroom"].verdict == "ok"
    assert fused["fp16_attention_headroom"].finding.values["fused"]
