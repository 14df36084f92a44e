"""An attribution from the engines to the files, on tiny models in real vLLM and real transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mismatch_probe
from mismatch_probe.arrays import load_arrays
from mismatch_probe.config import CompareConfig
from mismatch_probe.probes.attribute.session import AttributeResult
from mismatch_probe.runs import RunDirectory
from tests.conftest import Recorder

pytestmark = pytest.mark.engine
Tiny = Callable[[str], Path]
SMALL: dict[str, Any] = {"num_prompts": 12, "max_tokens": 16, "self_noise_tokens": 0}
KNOBS = ("batch-1", "prefix-cache", "chunked-prefill", "kv-fp8", "fp32-head", "layout-packed", "attention-sdpa")


@pytest.fixture(scope="module")
def experts(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> AttributeResult:
    """A mixture of experts in BF16 with everything that an attribution has, but few knobs."""
    return mismatch_probe.attribute(
        CompareConfig(model=str(tiny("qwen3_moe")), **SMALL),
        out=tmp_path_factory.mktemp("attribute") / "run",
        knobs=(*KNOBS, "trainer:fp32-rope"),
        layer_dtypes=("bfloat16", "float32"),
    )


def knob_of(result: AttributeResult, name: str) -> dict[str, Any]:
    return next(row for row in result.document["knobs"] if row["name"] == name)


def reading(result: AttributeResult, name: str) -> Any:
    with np.load(result.path / "attribute" / "readings" / f"{name}.npz") as found:
        return found["logprobs"].astype(np.float64)


def test_rungs_add_up(experts: AttributeResult) -> None:
    rows = experts.document["ladder"]["rungs"]
    assert [row["change"].split()[0] for row in rows] == ["decode", "vLLM", "batched"]
    assert sum(row["share"]["value"] for row in rows) == pytest.approx(1, abs=1e-9)
    run = RunDirectory.open(experts.path)
    sampled = run.tokens("vllm-bfloat16-decode")["logprob"].to_numpy().astype(np.float64)
    trained = run.tokens("hf-bfloat16-cast")["logprob"].to_numpy().astype(np.float64)
    prefill, batched = reading(experts, "rollout-prefill"), reading(experts, "trainer-at-rollout-batching")
    d = trained - sampled
    for row, step in zip(rows, (prefill - sampled, batched - prefill, trained - batched), strict=True):
        assert row["share"]["value"] == pytest.approx(np.sum(step * d) / np.sum(d**2), abs=1e-9)
    assert len(experts.document["ladder"]["anchor"]) == 4


def test_the_same_engine_decodes_the_same_bits_again(experts: AttributeResult) -> None:
    """Which is what every knob is compared with: without a change there must be no change."""
    sampled = RunDirectory.open(experts.path).tokens("vllm-bfloat16-decode")["logprob"].to_numpy()
    assert np.array_equal(sampled, reading(experts, "rollout-replay").astype(np.float32))
    trained = RunDirectory.open(experts.path).tokens("hf-bfloat16-cast")["logprob"].to_numpy()
    assert np.array_equal(trained, reading(experts, "trainer").astype(np.float32))
    assert knob_of(experts, "rollout-prefix-cache")["shift"]["value"] == 0


def test_knobs_are_measured_or_say_why_not(experts: AttributeResult) -> None:
    states = {row["name"]: (row["status"], row["why"]) for row in experts.document["knobs"]}
    for name in ("rollout-batch-1", "rollout-kv-fp8", "rollout-chunked-prefill", "trainer-kv-fp8", "trainer-fp32-head"):
        assert states[name] == ("measured", ""), name
    assert states["trainer-attention-sdpa"] == ("unavailable", "it is the baseline's")
    assert states["trainer-attention-eager"][0] == "not asked"
    assert states["rollout-tensor-parallel"][1].startswith("it needs two GPUs")
    assert all(why for status, why in states.values() if status != "measured")
    assert knob_of(experts, "rollout-kv-fp8")["rms_ratio"]["value"] > 1
    fp8 = knob_of(experts, "rollout-kv-fp8")
    assert fp8["time_ratio"] > 0
    assert fp8["peak_gib"] > 0


def test_a_change_on_both_sides_has_four_cells(experts: AttributeResult) -> None:
    rows = {row["name"]: row for row in experts.document["two_sided"]}
    assert set(rows["FP32 head"]["cells"]) == {"neither", "rollout", "trainer", "both"}
    assert "neither" in rows["FP8 keys and values"]["cells"]
    assert rows["FP16"]["cells"] == {}
    assert rows["FP16"]["why"]


def test_the_inside_of_clean_engines(experts: AttributeResult) -> None:
    found = experts.document["layers"]["dtypes"]["bfloat16"]
    assert len(found["layers"]) == 3
    assert all(row["lens_kl"] > 0 and row["relative_error"] > 0 for row in found["layers"])
    names = {row["name"] for row in found["modules"]}
    assert {"model.layers.0.self_attn.q_proj", "model.layers.2.mlp.gate", "model.layers.1.mlp.experts"} <= names
    assert not list(experts.path.glob("attribute/trace-*"))


def test_fp32_leaves_nothing_of_a_sound_gap(experts: AttributeResult) -> None:
    """Of the same tokens, read by the engine in FP32 as its layers are: so that rounding may be named."""
    left, concluded = experts.document["left_in_fp32"], experts.document["conclusions"]
    run = RunDirectory.open(experts.path)
    wide = run.tokens("hf-float32-cast")["logprob"].to_numpy().astype(np.float64)
    rms = np.sqrt(np.mean((wide - reading(experts, "rollout-float32-prefill")) ** 2))
    assert left["rms"]["value"] == pytest.approx(rms, rel=1e-6)
    assert left["rms"]["value"] < 1e-5
    assert left["share"]["value"] < 1e-5
    assert concluded["dtypes"]["float32"]["code"] == "quiet"
    assert concluded["rounding"] == {"code": "cause", "left": left["share"]["value"], "elsewhere": False}


def test_the_engines_routes_close_the_gap(experts: AttributeResult) -> None:
    found = experts.document["experts"]
    assert [row["layer"] for row in found["layers"]] == [0, 1, 2]
    assert all(0.5 < row["agreement"] <= 1 for row in found["layers"])
    part = load_all(experts, "trainer-routes")
    assert np.array_equal(np.asarray(part["own"], np.float32), reading(experts, "trainer").astype(np.float32))
    if found["flipped_tokens"] > 0:
        assert found["engine_routes"]["rms_ratio"]["value"] < 1
        assert found["share_of_squares"]["value"] > found["flipped_tokens"]


def load_all(result: AttributeResult, name: str) -> dict[str, Any]:
    with np.load(result.path / "attribute" / "readings" / f"{name}.npz") as found:
        return {key: found[key] for key in found.files if key != "about"}


def test_causes_are_ranked_with_their_actions(experts: AttributeResult) -> None:
    causes = experts.document["causes"]
    assert [cause["rank"] for cause in causes] == list(range(1, len(causes) + 1))
    assert all(cause["action"].endswith((".", ")")) for cause in causes)
    assert json.loads((experts.path / "attribute" / "attribution.json").read_text()) == experts.document
    assert "Where it comes from" in (experts.path / "report.html").read_text(encoding="utf-8")


def test_a_second_call_runs_nothing_and_a_lost_reading_is_made_again(experts: AttributeResult) -> None:
    again = Recorder()
    assert mismatch_probe.attribute_resume(experts.path, progress=again).document == experts.document
    assert again.begun == []
    assert mismatch_probe.attribute_run(experts.path).document == experts.document
    lost = experts.path / "attribute" / "readings" / "trainer-layout-packed.npz"
    before = reading(experts, "trainer-layout-packed")
    lost.write_bytes(b"cut off")
    row = next(k for k in mismatch_probe.attribute_run(experts.path).document["knobs"] if "packed" in k["name"])
    assert row["status"] == "not measured"
    mismatch_probe.attribute_resume(experts.path, progress=again)
    assert again.begun == ["trainer, one change at a time"]
    assert np.array_equal(before, reading(experts, "trainer-layout-packed"))
    assert load_arrays(lost, "another key") is None
