"""An attribution of a finished run of the scripted engine, with readings that are planted: its document and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import mismatch_probe
from mismatch_probe.arrays import save_arrays
from mismatch_probe.config import CompareConfig
from mismatch_probe.engines.attribute.trace import MOST_BYTES, MOST_ROWS, choose_sequences, row_bytes
from mismatch_probe.errors import EngineError, TableError, UsageError
from mismatch_probe.probes.attribute.availability import Context
from mismatch_probe.probes.attribute.baseline import Baseline, open_baseline
from mismatch_probe.probes.attribute.effects import TWO_SIDED, alters, judge
from mismatch_probe.probes.attribute.knobs import choose, knobs_of
from mismatch_probe.probes.attribute.measure import Readings
from mismatch_probe.probes.attribute.names import AT_ROLLOUT, PREFILL, REPLAY, TRAINER, WIDE_PREFILL
from mismatch_probe.probes.attribute.options import AttributeOptions
from mismatch_probe.runs import RunDirectory
from tests.conftest import MakeModel

pytestmark = pytest.mark.usefixtures("no_figures")
CPU = Context("cpu", 0, "bfloat16", "bfloat16", "cast", "padded", {"num_hidden_layers": 2}, attention="sdpa")
NOISE = 0.01


class Planted:
    """Readings of a run as an engine would leave them."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.options = AttributeOptions(layers=False, **options)
        self.base: Baseline = open_baseline(RunDirectory.open(path), self.options)
        self.readings = Readings(self.base, self.options)
        self._draw = np.random.default_rng(0)

    def put(self, name: str, logprobs: NDArray[np.float64], seconds: float = 1.0, **facts: Any) -> None:
        about = {"seconds": seconds, "peak_bytes": 2**30, "identity": {}, **facts}
        self._save(name, about, logprobs, np.arange(len(self.base.sequences)))

    def fail(self, name: str, **facts: Any) -> None:
        self._save(name, facts, np.empty(0), np.empty(0, np.int64))

    def noisy(self, logprobs: NDArray[np.float64], scale: float = NOISE) -> NDArray[np.float64]:
        return logprobs + scale * self._draw.standard_normal(len(logprobs))

    def ladder(self) -> None:
        """What every attribution has."""
        self.put(REPLAY, self.base.rollout_logprobs)
        self.put(PREFILL, self.noisy(self.base.rollout_logprobs))
        self.put(AT_ROLLOUT, self.noisy(self.base.trainer_logprobs))
        self.put(TRAINER, self.base.trainer_logprobs)

    def _save(self, name: str, facts: Any, logprobs: NDArray[Any], index: NDArray[Any]) -> None:
        arrays = {"logprobs": logprobs.astype(np.float32), "index": index}
        save_arrays(self.readings.file(name), self.readings.key(name), facts, arrays)


@pytest.fixture
def plant(run_copy: Path) -> Callable[..., Planted]:
    """Readings of the finished run, its ladder there."""

    def make(**options: Any) -> Planted:
        planted = Planted(run_copy, **options)
        planted.ladder()
        return planted

    return make


def document_of(planted: Planted) -> dict[str, Any]:
    options = {"knobs": planted.options.knobs, "pair": planted.options.pair, "layers": False}
    return mismatch_probe.attribute_run(planted.base.run.path, **options).document


def knob_of(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in document["knobs"] if row["name"] == name)


def test_without_readings_everything_says_what_makes_it(run_copy: Path) -> None:
    document = mismatch_probe.attribute_run(run_copy).document
    assert document["ladder"]["rungs"] == []
    assert "attribute --resume" in document["ladder"]["why"]
    assert knob_of(document, "rollout-kv-fp8")["status"] == "not measured"
    assert document["layers"]["why"].startswith("the checkpoint's config.json does not say how many layers")
    assert document["gap"]["rms"]["value"] > 0
    assert document["experts"] is None
    assert document["causes"] == []


def test_a_ladder_of_planted_readings(plant: Callable[..., Planted]) -> None:
    planted = plant(knobs=("none",))
    document = document_of(planted)
    rows = document["ladder"]["rungs"]
    assert sum(row["share"]["value"] for row in rows) == pytest.approx(1, abs=1e-9)
    assert rows[0]["rms"]["value"] == pytest.approx(NOISE, rel=0.2)
    assert rows[2]["rms"]["value"] == pytest.approx(NOISE, rel=0.2)
    assert next(level["level"] for level in document["ladder"]["anchor"]) == "the engine as it sampled"
    assert {row["status"] for row in document["knobs"]} <= {"not asked", "unavailable"}
    kinds = [cause["kind"] for cause in document["causes"]]
    assert kinds == ["rung"] * len(kinds)
    assert json.loads((planted.base.run.path / "attribute" / "attribution.json").read_text()) == document


def test_autocast_has_a_rung_of_its_own(scripted_model: MakeModel, tmp_path: Path) -> None:
    config = CompareConfig(
        model=str(scripted_model()),
        num_prompts=6,
        max_tokens=4,
        rollout_dtypes=("bfloat16",),
        trainer_dtypes=("bfloat16", "float32"),
        trainer_modes=("autocast",),
    )
    planted = Planted(mismatch_probe.compare(config, out=tmp_path / "run").path, knobs=("none",))
    planted.ladder()
    planted.put("trainer-cast-as-laid-out", planted.base.trainer_logprobs)
    rows = document_of(planted)["ladder"]["rungs"]
    assert [row["change"] for row in rows][-1] == "cast → autocast"
    assert rows[-1]["share"]["value"] == pytest.approx(0, abs=1e-6)
    assert sum(row["share"]["value"] for row in rows) == pytest.approx(1, abs=1e-9)


def test_a_knob_that_halves_the_gap(plant: Callable[..., Planted]) -> None:
    planted = plant(knobs=("rollout:fp32-head", "trainer:fp32-head"))
    base = planted.base
    middle = (base.rollout_logprobs + base.trainer_logprobs) / 2
    planted.put("rollout-fp32-head", middle, 2.0, identity={"attention_backends": ["OTHER"]})
    planted.put("trainer-fp32-head", middle, 1.5)
    document = document_of(planted)
    row = knob_of(document, "rollout-fp32-head")
    assert row["rms_ratio"]["value"] == pytest.approx(0.5, rel=1e-4)
    assert (row["time_ratio"], row["peak_gib"], row["memory_ratio"]) == (2.0, 1.0, 1.0)
    assert row["note"] == "attention changed with it: none → OTHER"
    assert knob_of(document, "trainer-fp32-head")["rms_ratio"]["value"] == pytest.approx(0.5, rel=1e-4)
    cells = next(row for row in document["two_sided"] if row["name"] == "FP32 head")
    assert cells["best"] == "both"
    assert cells["cells"]["both"]["rms"]["value"] == pytest.approx(0, abs=1e-6)
    causes = [cause for cause in document["causes"] if cause["kind"] == "change"]
    assert causes[0]["share"] >= 0.74
    assert document["fixes"]["why"]


def test_what_both_sides_share_hurts_where_one_side_alone_loses_it(plant: Callable[..., Planted]) -> None:
    planted = plant(knobs=("rollout:fp32-head", "trainer:fp32-head"))
    base = planted.base
    largest = float(np.abs(base.trainer_logprobs - base.rollout_logprobs).max())
    shared = np.abs(planted.noisy(np.zeros(len(base.rollout_logprobs)), 10 * largest))
    planted.put("rollout-fp32-head", base.rollout_logprobs - shared)
    planted.put("trainer-fp32-head", base.trainer_logprobs - shared)
    document = document_of(planted)
    row = next(row for row in document["two_sided"] if row["name"] == "FP32 head")
    assert row["hurts"] == ["rollout", "trainer"]
    assert row["cells"]["neither"]["rms_ratio"]["value"] == 1
    assert row["cells"]["rollout"]["rms"] == knob_of(document, "rollout-fp32-head")["rms"]
    assert row["cells"]["both"]["rms"]["value"] == pytest.approx(document["gap"]["rms"]["value"], rel=1e-3)
    assert not any(cause["kind"] == "change" for cause in document["causes"])


def test_a_setting_that_leaves_no_gap_is_a_cause(plant: Callable[..., Planted]) -> None:
    planted = plant(knobs=("rollout:fp32-head",))
    planted.put("rollout-fp32-head", planted.base.trainer_logprobs)
    document = document_of(planted)
    row = knob_of(document, "rollout-fp32-head")
    assert (row["rms_ratio"]["value"], row["differs"]) == (0.0, True)
    [cause] = [cause for cause in document["causes"] if cause["kind"] == "change"]
    assert (cause["share"], cause["ci_low"], cause["ci_high"]) == (1.0, 1.0, 1.0)


def test_settings_are_judged_together() -> None:
    def setting(p: float | None, ratio: float = 0.9) -> dict[str, Any]:
        return {"status": "measured", "p_value": p, "rms_ratio": {"value": ratio}}

    rollout, trainer = TWO_SIDED["FP16"]
    knobs = {rollout: setting(0.02, 1.1), trainer: setting(0.001), "rollout-batch-1": setting(None)}
    knobs["rollout-attention-flashinfer"] = {"status": "unavailable"}
    cells = {"neither": setting(None), "rollout": setting(0.02, 1.1), "trainer": setting(0.001), "both": setting(0.04)}
    two_sided = [{"name": "FP16", "cells": cells, "hurts": []}, {"name": "FP32 head", "cells": {}, "hurts": []}]
    judge(knobs, two_sided)
    # Three tests: 0.001 × 3, 0.02 × 2, and 0.04, which is not below those before it.
    assert [knobs[name]["p_holm"] for name in (trainer, rollout)] == pytest.approx([0.003, 0.04])
    assert cells["both"]["p_holm"] == pytest.approx(0.04)
    assert (cells["rollout"]["differs"], cells["trainer"]["differs"]) == (True, True)
    assert two_sided[0]["hurts"] == ["rollout"]
    assert (knobs["rollout-batch-1"]["p_holm"], knobs["rollout-batch-1"]["differs"]) == (None, None)
    assert knobs["rollout-attention-flashinfer"] == {"status": "unavailable"}
    # One more test, and 0.02 alone says nothing any more.
    more = {name: setting(row["p_value"]) for name, row in knobs.items() if "p_value" in row}
    judge(more | {"trainer-fp32-mlp": setting(0.03), "trainer-fp32-rope": setting(0.5)}, [])
    assert more[rollout]["p_holm"] == pytest.approx(0.06)
    assert not alters(more[rollout], larger=False)


def test_a_knob_on_some_of_the_sequences_is_compared_on_those(plant: Callable[..., Planted]) -> None:
    planted = plant(knobs=("batch-1",))
    count = int(planted.base.starts()[5])
    arrays = {"logprobs": planted.base.rollout_logprobs[:count].astype(np.float32), "index": np.arange(5)}
    name = "rollout-batch-1"
    save_arrays(planted.readings.file(name), planted.readings.key(name), {"seconds": 9.0}, arrays)
    row = knob_of(document_of(planted), name)
    assert (row["n_tokens"], row["time_ratio"], row["shift"]["value"]) == (count, None, 0.0)


def test_a_trainer_that_died_leaves_a_run_that_can_be_read(plant: Callable[..., Planted]) -> None:
    planted = plant(knobs=("trainer:fp32-head", "trainer:fp32-mlp"))
    for name in (TRAINER, "trainer-fp32-head", "fixes"):
        planted.fail(name, failed="The attribution's trainer was killed (signal 9).")
    document = document_of(planted)
    assert document["fixes"]["why"].startswith("The attribution's trainer was killed")
    assert knob_of(document, "trainer-fp32-head")["status"] == "not measured"
    assert set(document["failed"]) == {TRAINER, "trainer-fp32-head", "fixes"}


def test_a_setting_that_breaks_tokens_is_no_remedy(plant: Callable[..., Planted]) -> None:
    planted = plant(knobs=("trainer:float16",), pair="bf16")
    broken = planted.base.rollout_logprobs.copy()  # else it would close all of the gap
    broken[::9] = np.nan
    planted.put("trainer-float16", broken)
    document = document_of(planted)
    row = knob_of(document, "trainer-float16")
    assert row["rms_ratio"]["value"] is None
    assert "not finite" in row["rms_ratio"]["why"]
    assert row["n_nonfinite"] == len(broken[::9])
    assert not any(cause["kind"] == "change" for cause in document["causes"])


def test_what_the_pair_leaves_out_is_left_out_here(run_copy: Path) -> None:
    """A placeholder among the trainer's log-probs is NaN to every rung and setting, and counted."""
    run = RunDirectory.open(run_copy)
    name = open_baseline(run, AttributeOptions(layers=False)).trainer.pass_id
    before = Planted(run_copy)
    tokens = run.tokens(name)
    logprobs = tokens["logprob"].to_numpy().copy()
    own = {sequence.sequence_id for sequence in before.base.sequences}
    rows = np.flatnonzero(np.isin(tokens["sequence_id"].to_numpy(), list(own)))
    logprobs[rows[:2]] = -9999.0
    column = tokens.schema.get_field_index("logprob")
    record = run.manifest.passes[name]
    run.finish_pass(name, record, {"tokens": tokens.set_column(column, tokens.schema.field(column), [logprobs])})
    planted = Planted(run_copy)
    planted.ladder()
    document = document_of(planted)
    assert (document["n_nonfinite"], document["n_impossible"]) == (0, 2)
    assert document["gap"]["rms"]["value"] < 10


def test_two_dtypes_have_a_rung_of_their_own(plant: Callable[..., Planted]) -> None:
    planted = plant(knobs=("none",), pair="bf16/fp16")
    planted.put("trainer-in-rollout-dtype", planted.noisy(planted.base.trainer_logprobs))
    rows = document_of(planted)["ladder"]["rungs"]
    assert [row["key"] for row in rows] == ["prefill", "engine", "dtype", "layout"]
    assert rows[2]["change"] == "bfloat16 → float16 at the trainer"


def test_a_reading_that_cannot_be_made_here_is_still_read(plant: Callable[..., Planted]) -> None:
    """A run of a GPU, read on a CPU: what is unavailable here was available there."""
    planted = plant(knobs=("batch-invariant",))
    assert planted.readings.wanted == ()
    name = "rollout-batch-invariant"
    planted.put(name, planted.noisy(planted.base.rollout_logprobs))
    assert knob_of(document_of(planted), name)["status"] == "measured"


def test_tensors_that_are_not_finite_are_told(scripted_model: MakeModel, tmp_path: Path) -> None:
    config = CompareConfig(
        model=str(scripted_model(num_hidden_layers=1)),
        num_prompts=4,
        max_tokens=4,
        rollout_dtypes=("bfloat16",),
        trainer_dtypes=("bfloat16",),
    )
    base = Planted(mismatch_probe.compare(config, out=tmp_path / "run").path, knobs=("none",)).base
    readings = Readings(base, AttributeOptions(knobs=("none",), layer_dtypes=("float16",)))
    records = [
        {"kind": kind, "name": name, "layer": layer}
        for kind, name, layer in (("stream", "m.0", 0), ("layer", "m.0", 0), ("module", "m.0.down_proj", 0))
    ]
    facts = {"records": records, "layers": [], "trained_layers": ["m.0"]}
    sums = np.full((3, 2), np.nan)
    arrays = {"apart": sums, "engine": sums, "trainer": sums, "size": np.ones((3, 2)), "lens": np.empty((0, 0))}
    save_arrays(readings.file("inside-float16"), readings.key("inside-float16"), facts, arrays)
    result = mismatch_probe.attribute_run(base.run.path, knobs=("none",), layer_dtypes=("float16",))
    found = result.document["layers"]["dtypes"]["float16"]
    assert (found["located"]["verdict"], found["located"]["name"]) == ("not finite", "m.0.down_proj")
    assert found["layers"][0]["relative_error"] is None
    assert result.document["causes"][0]["text"] == "in float16, m.0.down_proj is not finite"


@pytest.fixture
def layered(scripted_model: MakeModel, tmp_path: Path) -> Planted:
    """A run of a model that says that it has layers."""
    config = CompareConfig(
        model=str(scripted_model(num_hidden_layers=1)),
        num_prompts=6,
        max_tokens=4,
        rollout_dtypes=("bfloat16",),
        trainer_dtypes=("bfloat16", "float32"),
    )
    planted = Planted(mismatch_probe.compare(config, out=tmp_path / "run").path, knobs=("none",))
    planted.options = replace(planted.options, layers=True)
    planted.readings = Readings(planted.base, planted.options)
    planted.ladder()
    return planted


@pytest.mark.parametrize(("left", "action"), [(0.0, "round differently"), (0.9, "not rounding: mend that first")])
def test_what_fp32_leaves_of_the_gap_is_not_rounding(layered: Planted, left: float, action: str) -> None:
    base = layered.base
    gap = base.trainer_logprobs - base.rollout_logprobs
    assert base.float32_logprobs is not None
    layered.put(WIDE_PREFILL, base.float32_logprobs - left * gap)
    document = mismatch_probe.attribute_run(base.run.path, knobs=("none",)).document
    assert document["left_in_fp32"]["share"]["value"] == pytest.approx(left**2, abs=1e-6)
    [engine] = [cause for cause in document["causes"] if cause["text"].startswith("vLLM")]
    assert action in engine["action"]
    assert document["conclusions"]["rounding"] == {
        "code": "part" if left else "cause",
        "left": document["left_in_fp32"]["share"]["value"],
        "elsewhere": False,
    }


def test_without_fp32_nothing_is_put_down_to_rounding(plant: Callable[..., Planted]) -> None:
    document = document_of(plant(knobs=("none",)))
    assert document["conclusions"]["rounding"]["code"] == "unknown"
    assert document["left_in_fp32"]["share"]["why"]
    assert not any("round" in cause["action"] for cause in document["causes"])


def test_a_setting_that_was_measured_is_shown_when_others_are_asked_for(plant: Callable[..., Planted]) -> None:
    planted = plant(knobs=("rollout:kv-fp8",))
    planted.put("rollout-kv-fp8", planted.noisy(planted.base.rollout_logprobs))
    document = mismatch_probe.attribute_run(planted.base.run.path, knobs=("batch-1",), layers=False).document
    assert knob_of(document, "rollout-kv-fp8")["status"] == "measured"
    assert knob_of(document, "rollout-batch-1")["status"] == "not measured"
    assert knob_of(document, "rollout-chunked-prefill")["status"] == "not asked"


def test_what_failed_and_what_does_not_apply_says_why(plant: Callable[..., Planted]) -> None:
    planted = plant(knobs=("kv-fp8", "fp32-rope"))
    planted.fail("rollout-kv-fp8", failed="The engine with kv-fp8 ran out of memory.")
    planted.fail("trainer-fp32-rope", unavailable="the model has no separate rotary-embedding module")
    path = planted.base.run.path
    result = mismatch_probe.attribute_run(path, knobs=planted.options.knobs, layers=False)
    assert result.failed == ["rollout-kv-fp8"]
    assert knob_of(result.document, "rollout-kv-fp8")["why"] == "The engine with kv-fp8 ran out of memory."
    row = knob_of(result.document, "trainer-fp32-rope")
    assert (row["status"], row["why"][:12]) == ("unavailable", "the model ha")


def test_readings_of_another_pair_are_not_taken(plant: Callable[..., Planted], run_copy: Path) -> None:
    plant(knobs=("none",))
    other = mismatch_probe.attribute_run(run_copy, pair="fp16", knobs=("none",), layers=False).document
    assert (other["rollout_dtype"], other["trainer_dtype"]) == ("float16", "float16")
    assert other["ladder"]["rungs"] == []


def test_a_pair_that_the_run_lacks_and_a_pass_that_failed(scripted_model: MakeModel, tmp_path: Path) -> None:
    config = CompareConfig(
        model=str(scripted_model({"trainer-bfloat16": "refuse"})),
        num_prompts=4,
        max_tokens=4,
        rollout_dtypes=("bfloat16",),
        trainer_dtypes=("bfloat16", "float32"),
    )
    run = mismatch_probe.compare(config, out=tmp_path / "run")
    with pytest.raises(UsageError, match="no pair float16/float16"):
        mismatch_probe.attribute_run(run.path, pair="fp16")
    with pytest.raises(EngineError, match="hf-bfloat16-cast has not finished"):
        mismatch_probe.attribute_run(run.path)


def test_no_run_and_another_temperature(scripted_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(TableError):
        mismatch_probe.attribute_run(tmp_path)
    config = CompareConfig(
        model=str(scripted_model()),
        num_prompts=4,
        max_tokens=4,
        temperature=0.7,
        rollout_dtypes=("bfloat16",),
        trainer_dtypes=("bfloat16",),
    )
    run = mismatch_probe.compare(config, out=tmp_path / "run")
    with pytest.raises(UsageError, match="temperature 1"):
        mismatch_probe.attribute_run(run.path)


def test_the_scripted_model_has_no_inside(run_copy: Path) -> None:
    with pytest.raises(UsageError, match="scripted"):
        mismatch_probe.attribute_resume(run_copy)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pair": "bf16/fp64"}, "--pair"),
        ({"layer_dtypes": ("int8",)}, "--layer-dtypes"),
        ({"target": 1.5}, "--target"),
        ({"target": float("nan")}, "--target"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        AttributeOptions(**options)


def test_knobs_by_name() -> None:
    knobs = knobs_of(CPU)
    assert len({knob.name for knob in knobs}) == len(knobs)
    assert {k.side for k in choose(knobs, ["kv-fp8"])} == {"rollout", "trainer"}
    assert [k.name for k in choose(knobs, ["trainer:kv-fp8", "kv-fp8"])] == ["trainer-kv-fp8", "rollout-kv-fp8"]
    assert choose(knobs, ["none"]) == []
    default, everything = choose(knobs, ["default"]), choose(knobs, ["all"])
    assert {k.name for k in everything} - {k.name for k in default} == {"rollout-compiled", "trainer-compiled"}
    with pytest.raises(UsageError, match="knows no 'kv-fp9'"):
        choose(knobs, ["kv-fp9"])
    with pytest.raises(UsageError, match="knows no 'trainer:batch-1'"):
        choose(knobs, ["trainer:batch-1"])


def test_every_knob_that_a_cpu_lacks_says_why() -> None:
    reasons = {knob.name: knob.why_missing(CPU) for knob in knobs_of(CPU)}
    for name in ("rollout-batch-invariant", "rollout-weights-fp8", "rollout-tensor-parallel", "trainer-tf32"):
        assert reasons[name], name
    assert all(reasons[f"rollout-attention-{b}"] for b in ("flash_attn", "flashinfer", "triton_attn"))
    for name in ("rollout-batch-1", "rollout-kv-fp8", "trainer-layout-left-padded", "trainer-fp32-mlp"):
        assert reasons[name] == "", name


def test_a_gpu_has_other_knobs() -> None:
    engine = {"enforce_eager": False, "attention_backends": ["FLASH_ATTN"], "prefix_caching": False}
    gpu = Context("cuda", 2, "bfloat16", "bfloat16", "autocast", "packed", {}, engine, "sdpa")
    knobs = {knob.name: knob for knob in knobs_of(gpu)}
    reasons = {name: knob.why_missing(gpu) for name, knob in knobs.items()}
    assert reasons["rollout-attention-flash_attn"] == "it is the baseline's"
    assert reasons["rollout-attention-triton_attn"] == ""
    assert reasons["rollout-tensor-parallel"] == reasons["rollout-weights-fp8"] == ""
    assert reasons["rollout-eager"] == ""
    assert "rollout-compiled" not in knobs
    assert reasons["trainer-layout-packed"] == "it is the baseline's"
    assert reasons["trainer-cast"] == ""
    assert knobs["rollout-prefix-cache"].arguments == {"enable_prefix_caching": True}
    assert reasons["trainer-tf32"].startswith("it concerns float32")


def test_a_trainer_in_fp32_has_nothing_to_widen() -> None:
    wide = Context("cpu", 0, "float32", "float32", "cast", "padded", {})
    reasons = {knob.name: knob.why_missing(wide) for knob in knobs_of(wide)}
    assert reasons["trainer-fp32-mlp"]
    assert reasons["rollout-fp32-head"]
    assert reasons["trainer-autocast"]


def test_sequences_of_a_trace_fit_its_limits() -> None:
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    assert choose_sequences([400, 400, 400], small, 2, 10_000) == [(0, 400), (1, 400)]
    assert choose_sequences([400] * 9, small, 2, 800) == [(0, 400), (1, 400)]
    assert choose_sequences([MOST_ROWS + 5, 3], small, 2, 10_000) == [(0, MOST_ROWS)]
    large = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    assert choose_sequences([3000, 10, 10], large, 4, 10_000) == [(0, MOST_BYTES // row_bytes(large, 4))]


def test_a_plan_says_what_would_run(scripted_model: MakeModel) -> None:
    plan = mismatch_probe.attribute_plan(CompareConfig(model=str(scripted_model())), knobs=("kv-fp8", "compiled"))
    names = [name for name, _, _ in plan.processes]
    assert {"vLLM baseline", "vLLM kv-fp8", "vLLM compiled"} <= set(names)
    reasons = {name: why for name, _, why in plan.knobs}
    assert reasons["rollout-kv-fp8"] == ""
    assert reasons["rollout-batch-1"] == "not asked for"
    assert plan.seconds > 0
    json.dumps(plan.as_dict())
