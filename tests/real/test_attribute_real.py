"""An attribution from the engines to the files, on tiny models in real vLLM and real transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import escape

import mismatch_probe
from mismatch_probe.metrics.ladder import Change
from mismatch_probe.probes.attribute.passes import NOT_MEASURED
from mismatch_probe.probes.attribute.session import AttributeResult
from mismatch_probe.report.attribution import attribution_answer
from mismatch_probe.results.attribution import Attribution, SettingResult
from mismatch_probe.runs.comparison import RunDirectory
from mismatch_probe.runs.measurements import Measurement
from tests.conftest import Recorder

pytestmark = pytest.mark.engine
Tiny = Callable[[str], Path]
SMALL: dict[str, Any] = {"num_prompts": 12, "max_tokens": 16, "self_noise_tokens": 0}
SETTINGS = ("batch-1", "prefix-cache", "chunked-prefill", "kv-fp8", "fp32-head", "layout-packed", "attention-sdpa")


@pytest.fixture(scope="module")
def experts(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> AttributeResult:
    """A mixture of experts in BF16 with everything that an attribution has, but few settings."""
    return mismatch_probe.attribute(
        model=str(tiny("qwen3_moe")),
        **SMALL,
        out=tmp_path_factory.mktemp("attribute") / "run",
        settings=(*SETTINGS, "trainer:fp32-rope"),
        layer_dtypes=("bfloat16", "float32"),
    )


def setting_of(result: AttributeResult, name: str) -> SettingResult:
    return next(row for row in result.attribution.settings if row.name == name)


def effect_of(result: AttributeResult, name: str) -> Change:
    effect = setting_of(result, name).effect
    assert effect is not None
    return effect


def logprobs(result: AttributeResult, name: str) -> Any:
    with np.load(result.path / "attribute" / "passes" / f"{name}.npz") as found:
        return found["logprobs"].astype(np.float64)


def test_rungs_add_up(experts: AttributeResult) -> None:
    rows = experts.attribution.ladder.rungs
    assert [row.key for row in rows] == ["prefill", "engine", "layout"]
    assert sum(row.contribution.value or 0.0 for row in rows) == pytest.approx(1, abs=1e-9)
    run = RunDirectory.open(experts.path)
    sampled = run.tokens("vllm-bfloat16-decode")["logprob"].to_numpy().astype(np.float64)
    trained = run.tokens("hf-bfloat16-cast")["logprob"].to_numpy().astype(np.float64)
    prefill, batched = logprobs(experts, "rollout-prefill"), logprobs(experts, "trainer-at-rollout-batching")
    d = trained - sampled
    for row, step in zip(rows, (prefill - sampled, batched - prefill, trained - batched), strict=True):
        assert row.contribution.value == pytest.approx(np.sum(step * d) / np.sum(d**2), abs=1e-9)
    assert [found.error_rms is None for found in experts.attribution.ladder.passes] == [False] * 4


def test_the_same_engine_decodes_the_same_bits_again(experts: AttributeResult) -> None:
    """Which is what every setting is compared with: without a change there must be no change."""
    sampled = RunDirectory.open(experts.path).tokens("vllm-bfloat16-decode")["logprob"].to_numpy()
    assert np.array_equal(sampled, logprobs(experts, "rollout-replay").astype(np.float32))
    trained = RunDirectory.open(experts.path).tokens("hf-bfloat16-cast")["logprob"].to_numpy()
    assert np.array_equal(trained, logprobs(experts, "trainer").astype(np.float32))
    assert effect_of(experts, "rollout-prefix-cache").shift.value == 0


def test_settings_are_measured_or_say_why_not(experts: AttributeResult) -> None:
    states = {row.name: (row.status, row.why) for row in experts.attribution.settings}
    for name in ("rollout-batch-1", "rollout-kv-fp8", "rollout-chunked-prefill", "trainer-kv-fp8", "trainer-fp32-head"):
        assert states[name] == ("measured", ""), name
    assert states["trainer-attention-sdpa"] == ("unsupported", "it is set already")
    assert states["trainer-attention-eager"][0] == "skipped"
    assert states["rollout-tensor-parallel"][1].startswith("it needs two GPUs")
    assert all(why for status, why in states.values() if status != "measured")
    assert (effect_of(experts, "rollout-kv-fp8").rms_ratio.value or 0.0) > 1
    fp8 = setting_of(experts, "rollout-kv-fp8")
    assert (fp8.time_ratio or 0.0) > 0
    assert (fp8.peak_gib or 0.0) > 0


def test_a_setting_of_both_sides_has_four_variants(experts: AttributeResult) -> None:
    rows = {row.key: row for row in experts.attribution.both_sides}
    assert set(rows["fp32-head"].variants) == {"neither", "rollout", "trainer", "both"}
    assert "neither" in rows["kv-fp8"].variants
    assert rows["float16"].variants == {}
    assert rows["float16"].why


def test_the_inside_of_clean_engines(experts: AttributeResult) -> None:
    found = experts.attribution.layers.dtypes["bfloat16"]
    assert len(found.layers) == 3
    assert all((row.lens_kl or 0.0) > 0 and (row.relative_error or 0.0) > 0 for row in found.layers)
    names = {tensor.name for tensor in found.tensors}
    assert {"model.layers.0.self_attn.q_proj", "model.layers.2.mlp.gate", "model.layers.1.mlp.experts"} <= names
    assert not list(experts.path.glob("attribute/trace-*"))


def test_fp32_leaves_nothing_of_a_sound_gap(experts: AttributeResult) -> None:
    """Of the same tokens, read by the engine in FP32 as its layers are: so that rounding may be named."""
    left, findings = experts.attribution.left_in_fp32, {one.code: one for one in experts.attribution.findings}
    run = RunDirectory.open(experts.path)
    wide = run.tokens("hf-float32-cast")["logprob"].to_numpy().astype(np.float64)
    rms = np.sqrt(np.mean((wide - logprobs(experts, "rollout-float32-prefill")) ** 2))
    assert left.rms.value == pytest.approx(rms, rel=1e-6)
    assert rms < 1e-5
    assert (left.fraction.value or 1.0) < 1e-5
    assert "float32" in findings["nothing-stands-out"].names("dtypes")
    assert findings["rounding-explains"].metric("left") == left.fraction


def test_the_engines_routes_close_the_gap(experts: AttributeResult) -> None:
    found = experts.attribution.experts
    assert found is not None
    assert [row.layer for row in found.layers] == [0, 1, 2]
    assert all(0.5 < row.agreement <= 1 for row in found.layers)
    part = load_all(experts, "trainer-routes")
    assert np.array_equal(np.asarray(part["own"], np.float32), logprobs(experts, "trainer").astype(np.float32))
    assert found.engine_routes is not None
    assert found.contribution is not None
    if found.flipped_tokens:
        assert (found.engine_routes.rms_ratio.value or 0.0) < 1
        assert (found.contribution.value or 0.0) > found.flipped_tokens


def load_all(result: AttributeResult, name: str) -> dict[str, Any]:
    with np.load(result.path / "attribute" / "passes" / f"{name}.npz") as found:
        return {key: found[key] for key in found.files if key != "about"}


def test_the_document_reads_back_and_the_comparison_quotes_its_answer(experts: AttributeResult) -> None:
    assert Attribution.read(experts.path / "attribute" / "attribution.json") == experts.attribution
    assert experts.page.is_file()
    page = (experts.path / "report.html").read_text(encoding="utf-8")
    assert all(escape(text) in page for text in attribution_answer(experts.attribution))


def test_a_second_call_runs_nothing_and_a_lost_reading_is_made_again(experts: AttributeResult) -> None:
    again = Recorder()
    assert mismatch_probe.Run.open(experts.path).attribute(progress=again).attribution == experts.attribution
    assert again.begun == []
    assert mismatch_probe.Run.open(experts.path).attribute(engines=False).attribution == experts.attribution
    lost = experts.path / "attribute" / "passes" / "trainer-layout-packed.npz"
    before = logprobs(experts, "trainer-layout-packed")
    lost.write_bytes(b"cut off")
    row = setting_of(mismatch_probe.Run.open(experts.path).attribute(engines=False), "trainer-layout-packed")
    assert (row.status, row.why) == ("skipped", NOT_MEASURED)
    mismatch_probe.Run.open(experts.path).attribute(progress=again)
    assert again.begun == ["trainer, one change at a time"]
    assert np.array_equal(before, logprobs(experts, "trainer-layout-packed"))
    assert Measurement(lost, "another key").load() is None
