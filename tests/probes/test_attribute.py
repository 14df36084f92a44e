"""An attribution of a finished run of the scripted engine, with passes that are planted: its document and files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import escape
from numpy.typing import NDArray

import mismatch_probe
from mismatch_probe.config import AttributeOptions
from mismatch_probe.engines.attribute.trace import MOST_BYTES, MOST_ROWS, choose_sequences, row_bytes
from mismatch_probe.errors import EngineError, TableError, UsageError
from mismatch_probe.metrics.ladder import Change
from mismatch_probe.probes.attribute.effects import judged
from mismatch_probe.probes.attribute.pair import AttributedPair, open_pair
from mismatch_probe.probes.attribute.passes import AT_ROLLOUT, NOT_MEASURED, WIDE_PREFILL, PassStore
from mismatch_probe.probes.attribute.settings import ALREADY, PREFILL, REPLAY, TRAINER, Context, choose, settings_of
from mismatch_probe.report.attribution import attribution_answer
from mismatch_probe.results.attribution import WHERE, Attribution, AttributionPlan, BothSides, SettingResult
from mismatch_probe.results.finding import Finding
from mismatch_probe.runs.comparison import RunDirectory
from tests.conftest import MakeModel
from tests.factories.attribution import effect, setting, unchanged

pytestmark = pytest.mark.usefixtures("no_figures")
CPU = Context("cpu", 0, "bfloat16", "bfloat16", "cast", "padded", {"num_hidden_layers": 2}, attention="sdpa")
NOISE = 0.01


class Planted:
    """Passes of a run as an engine would leave them."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.options = AttributeOptions(layers=False, **options)
        self.base: AttributedPair = open_pair(RunDirectory.open(path), self.options)
        self.store = PassStore(self.base, self.options)
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
        self.store.files.at(name).save(facts, arrays)


@pytest.fixture
def plant(run_copy: Path) -> Callable[..., Planted]:
    """Passes of the finished run, its ladder there."""

    def make(**options: Any) -> Planted:
        planted = Planted(run_copy, **options)
        planted.ladder()
        return planted

    return make


def document_of(planted: Planted) -> Attribution:
    options = {"settings": planted.options.settings, "pair": planted.options.pair, "layers": False}
    return mismatch_probe.Run.open(planted.base.run.path).attribute(engines=False, **options).attribution


def setting_of(document: Attribution, name: str) -> SettingResult:
    return next(row for row in document.settings if row.name == name)


def effect_of(document: Attribution, name: str) -> Change:
    found = setting_of(document, name).effect
    assert found is not None
    return found


def closing(document: Attribution) -> list[Finding]:
    return [one for one in document.findings if one.code in ("setting-closes-gap", "both-sides-close-gap")]


def test_without_passes_everything_says_what_makes_it(run_copy: Path) -> None:
    document = mismatch_probe.Run.open(run_copy).attribute(engines=False).attribution
    assert document.ladder.rungs == ()
    assert document.ladder.why == setting_of(document, "rollout-kv-fp8").why == NOT_MEASURED
    assert setting_of(document, "rollout-kv-fp8").status == "skipped"
    assert document.layers.why.startswith("the checkpoint's config.json does not say how many layers")
    assert (document.gap.rms.value or 0.0) > 0
    assert document.experts is None
    assert [one.code for one in document.answer] == ["no-ladder", "rounding-not-known"]


def test_a_ladder_of_planted_passes(plant: Callable[..., Planted]) -> None:
    planted = plant(settings=("none",))
    document = document_of(planted)
    rungs = document.ladder.rungs
    assert sum(rung.contribution.value or 0.0 for rung in rungs) == pytest.approx(1, abs=1e-9)
    assert rungs[0].rms.value == pytest.approx(NOISE, rel=0.2)
    assert rungs[2].rms.value == pytest.approx(NOISE, rel=0.2)
    assert [found.key for found in document.ladder.passes] == ["sampled", "prefill", "rollout-batching", "trained"]
    assert {row.status for row in document.settings} <= {"skipped", "unsupported"}
    assert (document.answer[0].code, document.answer[0].where) == ("arises-at-rung", "engine")
    assert not closing(document)
    assert Attribution.read(planted.base.run.path / "attribute" / "attribution.json") == document


def test_autocast_has_a_rung_of_its_own(scripted_model: MakeModel, tmp_path: Path) -> None:
    config = {
        "model": str(scripted_model()),
        "num_prompts": 6,
        "max_tokens": 4,
        "rollout_dtypes": ("bfloat16",),
        "trainer_dtypes": ("bfloat16", "float32"),
        "trainer_modes": ("autocast",),
    }
    planted = Planted(mismatch_probe.compare(**config, out=tmp_path / "run").path, settings=("none",))
    planted.ladder()
    planted.put("trainer-cast-as-laid-out", planted.base.trainer_logprobs)
    rungs = document_of(planted).ladder.rungs
    assert rungs[-1].key == "mode"
    assert rungs[-1].contribution.value == pytest.approx(0, abs=1e-6)
    assert sum(rung.contribution.value or 0.0 for rung in rungs) == pytest.approx(1, abs=1e-9)


def test_a_setting_that_halves_the_gap(plant: Callable[..., Planted]) -> None:
    planted = plant(settings=("rollout:fp32-head", "trainer:fp32-head"))
    base = planted.base
    middle = (base.rollout_logprobs + base.trainer_logprobs) / 2
    planted.put("rollout-fp32-head", middle, 2.0, identity={"attention_backends": ["OTHER"]})
    planted.put("trainer-fp32-head", middle, 1.5)
    document = document_of(planted)
    row = setting_of(document, "rollout-fp32-head")
    assert effect_of(document, row.name).rms_ratio.value == pytest.approx(0.5, rel=1e-4)
    assert (row.time_ratio, row.peak_gib, row.memory_ratio) == (2.0, 1.0, 1.0)
    assert row.options == ("--engine-arg", 'hf_overrides={"head_dtype":"float32"}')
    (note,) = row.notes
    assert (note.code, note.values) == ("attention-changed-too", {"before": "none", "after": "OTHER"})
    assert effect_of(document, "trainer-fp32-head").rms_ratio.value == pytest.approx(0.5, rel=1e-4)
    both = next(row for row in document.both_sides if row.key == "fp32-head")
    assert both.best == "both"
    assert both.variants["both"].rms.value == pytest.approx(0, abs=1e-6)
    first, *_ = closing(document)
    assert (first.metric("closed").value or 0.0) >= 0.74
    assert document.fixes.why


def test_what_both_sides_share_hurts_where_one_side_alone_loses_it(plant: Callable[..., Planted]) -> None:
    planted = plant(settings=("rollout:fp32-head", "trainer:fp32-head"))
    base = planted.base
    largest = float(np.abs(base.trainer_logprobs - base.rollout_logprobs).max())
    shared = np.abs(planted.noisy(np.zeros(len(base.rollout_logprobs)), 10 * largest))
    planted.put("rollout-fp32-head", base.rollout_logprobs - shared)
    planted.put("trainer-fp32-head", base.trainer_logprobs - shared)
    document = document_of(planted)
    row = next(row for row in document.both_sides if row.key == "fp32-head")
    assert row.hurts == ("rollout", "trainer")
    assert row.variants["neither"].rms_ratio.value == 1
    assert row.variants["rollout"].rms == effect_of(document, "rollout-fp32-head").rms
    assert row.variants["both"].rms.value == pytest.approx(document.gap.rms.value, rel=1e-3)
    assert not closing(document)
    assert any(one.code == "no-setting-closes-gap" for one in document.findings)


def test_a_setting_that_leaves_no_gap_closes_all_of_it(plant: Callable[..., Planted]) -> None:
    planted = plant(settings=("rollout:fp32-head",))
    planted.put("rollout-fp32-head", planted.base.trainer_logprobs)
    document = document_of(planted)
    found = effect_of(document, "rollout-fp32-head")
    assert (found.rms_ratio.value, found.differs) == (0.0, True)
    (one,) = closing(document)
    closed = one.metric("closed")
    assert (closed.value, closed.ci_low, closed.ci_high) == (1.0, 1.0, 1.0)


def test_settings_are_tested_together() -> None:
    def with_p(found: Change, p: float | None) -> Change:
        return replace(found, p_value=p, p_holm=None, differs=None)

    rollout, trainer, both = with_p(effect(1.1), 0.02), with_p(effect(0.9), 0.001), with_p(effect(0.9), 0.04)
    rows = {row.name: row for row in (setting("rollout", "float16", rollout), setting("trainer", "float16", trainer))}
    rows["rollout-batch-1"] = setting("rollout", "batch-1", with_p(effect(0.9), None))
    rows["rollout-tensor-parallel"] = setting("rollout", "tensor-parallel")
    variants: Any = {"neither": unchanged(), "rollout": rollout, "trainer": trainer, "both": both}
    fp16 = BothSides(key="float16", variants=variants, best="both", hurts=(), why="")
    head = BothSides(key="fp32-head", variants={}, best=None, hurts=(), why="not measured")
    found, (sides, _) = judged(rows, [fp16, head])
    effects = [row.effect for row in found]
    # Three tests: 0.001 × 3, 0.02 × 2, and 0.04, which is not below those before it.
    assert [one and one.p_holm for one in effects] == [pytest.approx(0.04), pytest.approx(0.003), None, None]
    assert sides.variants["both"].p_holm == pytest.approx(0.04)
    assert [sides.variants[where].differs for where in WHERE] == [None, True, True, True]
    assert sides.hurts == ("rollout",)
    # One more test, and 0.02 alone says nothing any more.
    more = {name: setting("trainer", name, with_p(effect(0.9), p)) for name, p in (("a", 0.03), ("b", 0.5))}
    found, _ = judged(rows | more, [])
    (first, *_) = [row.effect for row in found]
    assert first is not None
    assert first.p_holm == pytest.approx(0.06)
    assert not first.alters(larger=True)


def test_a_setting_on_some_of_the_sequences_is_compared_on_those(plant: Callable[..., Planted]) -> None:
    planted = plant(settings=("batch-1",))
    count = int(planted.base.starts()[5])
    arrays = {"logprobs": planted.base.rollout_logprobs[:count].astype(np.float32), "index": np.arange(5)}
    name = "rollout-batch-1"
    planted.store.files.at(name).save({"seconds": 9.0}, arrays)
    document = document_of(planted)
    row = setting_of(document, name)
    assert (row.n_tokens, row.time_ratio, effect_of(document, name).shift.value) == (count, None, 0.0)


def test_a_trainer_that_died_leaves_a_run_that_can_be_read(plant: Callable[..., Planted]) -> None:
    planted = plant(settings=("trainer:fp32-head", "trainer:fp32-mlp"))
    for name in (TRAINER, "trainer-fp32-head", "fixes"):
        planted.fail(name, failed="The attribution's trainer was killed (signal 9).")
    document = document_of(planted)
    assert document.fixes.why.startswith("The attribution's trainer was killed")
    assert setting_of(document, "trainer-fp32-head").status == "skipped"
    assert set(document.failed) == {TRAINER, "trainer-fp32-head", "fixes"}
    failed = [one.where for one in document.findings if one.code == "attribution-pass-failed"]
    assert set(failed) == set(document.failed)


def test_a_setting_that_breaks_tokens_is_no_remedy(plant: Callable[..., Planted]) -> None:
    planted = plant(settings=("trainer:float16",), pair="bf16")
    broken = planted.base.rollout_logprobs.copy()  # else it would close all of the gap
    broken[::9] = np.nan
    planted.put("trainer-float16", broken)
    document = document_of(planted)
    ratio = effect_of(document, "trainer-float16").rms_ratio
    assert ratio.value is None
    assert "not finite" in ratio.why
    assert setting_of(document, "trainer-float16").n_nonfinite == len(broken[::9])
    assert not closing(document)


def test_what_the_pair_leaves_out_is_left_out_here(run_copy: Path) -> None:
    """A placeholder among the trainer's log-probs is NaN to every rung and setting, and counted."""
    run = RunDirectory.open(run_copy)
    name = str(open_pair(run, AttributeOptions(layers=False)).trainer)
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
    assert (document.n_nonfinite, document.n_impossible) == (0, 2)
    (found,) = [one for one in document.findings if one.code.startswith("attribution-tokens")]
    assert (found.code, found.number("tokens")) == ("attribution-tokens-impossible", 2)
    assert (document.gap.rms.value or 10.0) < 10


def test_two_dtypes_have_a_rung_of_their_own(plant: Callable[..., Planted]) -> None:
    planted = plant(settings=("none",), pair="bf16/fp16")
    planted.put("trainer-in-rollout-dtype", planted.noisy(planted.base.trainer_logprobs))
    ladder = document_of(planted).ladder
    assert [rung.key for rung in ladder.rungs] == ["prefill", "engine", "dtype", "layout"]
    assert [(rung.before, rung.after) for rung in ladder.rungs][2] == ("rollout-dtype", "rollout-batching")


def test_a_pass_that_cannot_be_made_here_is_still_read(plant: Callable[..., Planted]) -> None:
    """A run of a GPU, read on a CPU: what is unavailable here was available there."""
    planted = plant(settings=("batch-invariant",))
    assert planted.store.wanted == ()
    name = "rollout-batch-invariant"
    planted.put(name, planted.noisy(planted.base.rollout_logprobs))
    assert setting_of(document_of(planted), name).status == "measured"


def test_tensors_that_are_not_finite_are_named(scripted_model: MakeModel, tmp_path: Path) -> None:
    config = {
        "model": str(scripted_model(num_hidden_layers=1)),
        "num_prompts": 4,
        "max_tokens": 4,
        "rollout_dtypes": ("bfloat16",),
        "trainer_dtypes": ("bfloat16",),
    }
    base = Planted(mismatch_probe.compare(**config, out=tmp_path / "run").path, settings=("none",)).base
    store = PassStore(base, AttributeOptions(settings=("none",), layer_dtypes=("float16",)))
    records = [
        {"kind": kind, "name": name, "layer": layer}
        for kind, name, layer in (("stream", "m.0", 0), ("layer", "m.0", 0), ("module", "m.0.down_proj", 0))
    ]
    facts = {"records": records, "layers": [], "trained_layers": ["m.0"]}
    sums = np.full((3, 2), np.nan)
    arrays = {"apart": sums, "engine": sums, "trainer": sums, "size": np.ones((3, 2)), "lens": np.empty((0, 0))}
    store.files.at("inside-float16").save(facts, arrays)
    result = mismatch_probe.Run.open(base.run.path).attribute(
        engines=False, settings=("none",), layer_dtypes=("float16",)
    )
    found = result.attribution.layers.dtypes["float16"]
    assert found.located is not None
    assert (found.located.verdict, found.located.name) == ("not finite", "m.0.down_proj")
    assert found.layers[0].relative_error is None
    (one,) = [one for one in result.attribution.findings if one.code == "tensor-not-finite"]
    assert (one.names("dtypes"), one.values["name"]) == (("float16",), "m.0.down_proj")


@pytest.fixture
def layered(scripted_model: MakeModel, tmp_path: Path) -> Planted:
    """A run of a model that says that it has layers."""
    config = {
        "model": str(scripted_model(num_hidden_layers=1)),
        "num_prompts": 6,
        "max_tokens": 4,
        "rollout_dtypes": ("bfloat16",),
        "trainer_dtypes": ("bfloat16", "float32"),
    }
    planted = Planted(mismatch_probe.compare(**config, out=tmp_path / "run").path, settings=("none",))
    planted.options = planted.options.replace(layers=True)
    planted.store = PassStore(planted.base, planted.options)
    planted.ladder()
    return planted


@pytest.mark.parametrize(("left", "code"), [(0.0, "rounding-explains"), (0.9, "rounding-explains-part")])
def test_what_fp32_leaves_of_the_gap_is_not_rounding(layered: Planted, left: float, code: str) -> None:
    base = layered.base
    gap = base.trainer_logprobs - base.rollout_logprobs
    assert base.float32_logprobs is not None
    layered.put(WIDE_PREFILL, base.float32_logprobs - left * gap)
    document = mismatch_probe.Run.open(base.run.path).attribute(engines=False, settings=("none",)).attribution
    assert document.left_in_fp32.fraction.value == pytest.approx(left**2, abs=1e-6)
    assert document.answer[1].code == code
    assert document.answer[1].metric("left") == document.left_in_fp32.fraction


def test_without_fp32_nothing_is_put_down_to_rounding(plant: Callable[..., Planted]) -> None:
    document = document_of(plant(settings=("none",)))
    assert document.answer[1].code == "rounding-not-known"
    assert document.answer[1].values["why"] == document.left_in_fp32.fraction.why != ""


def test_a_setting_that_was_measured_is_shown_when_others_are_asked_for(plant: Callable[..., Planted]) -> None:
    planted = plant(settings=("rollout:kv-fp8",))
    planted.put("rollout-kv-fp8", planted.noisy(planted.base.rollout_logprobs))
    document = (
        mismatch_probe.Run.open(planted.base.run.path)
        .attribute(engines=False, settings=("batch-1",), layers=False)
        .attribution
    )
    assert setting_of(document, "rollout-kv-fp8").status == "measured"
    states = [setting_of(document, f"rollout-{key}") for key in ("batch-1", "chunked-prefill")]
    assert [(row.status, row.why) for row in states] == [("skipped", NOT_MEASURED), ("skipped", "not asked for")]


def test_what_failed_and_what_does_not_apply_says_why(plant: Callable[..., Planted]) -> None:
    planted = plant(settings=("kv-fp8", "fp32-rope"))
    planted.fail("rollout-kv-fp8", failed="The engine with kv-fp8 ran out of memory.")
    planted.fail("trainer-fp32-rope", unsupported="the model has no separate rotary-embedding module")
    path = planted.base.run.path
    result = mismatch_probe.Run.open(path).attribute(engines=False, settings=planted.options.settings, layers=False)
    assert result.failed == ["rollout-kv-fp8"]
    row = setting_of(result.attribution, "rollout-kv-fp8")
    assert (row.status, row.why) == ("failed", "The engine with kv-fp8 ran out of memory.")
    row = setting_of(result.attribution, "trainer-fp32-rope")
    assert (row.status, row.why[:12]) == ("unsupported", "the model ha")
    (step,) = [step for step in result.report().steps if "--resume" in step.command]
    assert step.command == f"mismatch-probe attribute --resume {path}"


def test_passes_of_another_pair_are_not_taken(plant: Callable[..., Planted], run_copy: Path) -> None:
    plant(settings=("none",))
    other = (
        mismatch_probe.Run.open(run_copy)
        .attribute(engines=False, pair="fp16", settings=("none",), layers=False)
        .attribution
    )
    assert (other.rollout_dtype, other.trainer_dtype) == ("float16", "float16")
    assert other.ladder.rungs == ()


def test_a_pair_that_the_run_lacks_and_a_pass_that_failed(scripted_model: MakeModel, tmp_path: Path) -> None:
    config = {
        "model": str(scripted_model({"trainer-bfloat16": "refuse"})),
        "num_prompts": 4,
        "max_tokens": 4,
        "rollout_dtypes": ("bfloat16",),
        "trainer_dtypes": ("bfloat16", "float32"),
    }
    run = mismatch_probe.compare(**config, out=tmp_path / "run")
    with pytest.raises(UsageError, match="no pair float16/float16"):
        mismatch_probe.Run.open(run.path).attribute(engines=False, pair="fp16")
    with pytest.raises(EngineError, match="hf-bfloat16-cast has not finished"):
        mismatch_probe.Run.open(run.path).attribute(engines=False)


def test_no_run_and_another_temperature(scripted_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(TableError):
        mismatch_probe.Run.open(tmp_path).attribute(engines=False)
    config = {
        "model": str(scripted_model()),
        "num_prompts": 4,
        "max_tokens": 4,
        "temperature": 0.7,
        "rollout_dtypes": ("bfloat16",),
        "trainer_dtypes": ("bfloat16",),
    }
    run = mismatch_probe.compare(**config, out=tmp_path / "run")
    with pytest.raises(UsageError, match="temperature 1"):
        mismatch_probe.Run.open(run.path).attribute(engines=False)


def test_the_scripted_model_has_no_inside(run_copy: Path) -> None:
    with pytest.raises(UsageError, match="scripted"):
        mismatch_probe.Run.open(run_copy).attribute()


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


def test_settings_by_name() -> None:
    settings = settings_of(CPU)
    assert len({row.name for row in settings}) == len(settings)
    assert {row.side for row in choose(settings, ["kv-fp8"])} == {"rollout", "trainer"}
    assert [row.name for row in choose(settings, ["trainer:kv-fp8", "kv-fp8"])] == ["trainer-kv-fp8", "rollout-kv-fp8"]
    assert choose(settings, ["none"]) == []
    default, everything = choose(settings, ["default"]), choose(settings, ["all"])
    assert {row.name for row in everything} - {row.name for row in default} == {"rollout-compiled", "trainer-compiled"}
    with pytest.raises(UsageError, match="does not know 'kv-fp9'"):
        choose(settings, ["kv-fp9"])
    with pytest.raises(UsageError, match="does not know 'trainer:batch-1'"):
        choose(settings, ["trainer:batch-1"])


def test_every_setting_that_a_cpu_does_not_have_says_why() -> None:
    reasons = {row.name: row.why_missing(CPU) for row in settings_of(CPU)}
    for name in ("rollout-batch-invariant", "rollout-weights-fp8", "rollout-tensor-parallel", "trainer-tf32"):
        assert reasons[name], name
    assert all(reasons[f"rollout-attention-{b}"] for b in ("flash_attn", "flashinfer", "triton_attn"))
    for name in ("rollout-batch-1", "rollout-kv-fp8", "trainer-layout-left-padded", "trainer-fp32-mlp"):
        assert reasons[name] == "", name


def test_a_gpu_has_other_settings() -> None:
    engine = {"enforce_eager": False, "attention_backends": ["FLASH_ATTN"], "prefix_caching": False}
    gpu = Context("cuda", 2, "bfloat16", "bfloat16", "autocast", "packed", {}, engine, "sdpa")
    settings = {row.name: row for row in settings_of(gpu)}
    reasons = {name: row.why_missing(gpu) for name, row in settings.items()}
    assert reasons["rollout-attention-flash_attn"] == ALREADY
    assert reasons["rollout-attention-triton_attn"] == ""
    assert reasons["rollout-tensor-parallel"] == reasons["rollout-weights-fp8"] == ""
    assert reasons["rollout-eager"] == ""
    assert "rollout-compiled" not in settings
    assert reasons["trainer-layout-packed"] == ALREADY
    assert reasons["trainer-cast"] == ""
    assert settings["rollout-prefix-cache"].arguments == {"enable_prefix_caching": True}
    assert reasons["trainer-tf32"].startswith("it concerns float32")


def test_a_trainer_in_fp32_has_nothing_to_widen() -> None:
    wide = Context("cpu", 0, "float32", "float32", "cast", "padded", {})
    reasons = {row.name: row.why_missing(wide) for row in settings_of(wide)}
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
    plan = mismatch_probe.attribute_plan(model=str(scripted_model()), settings=("kv-fp8", "compiled"))
    names = {process.name for process in plan.processes}
    assert {"rollout as it sampled", "rollout kv-fp8", "rollout compiled"} <= names
    reasons = {row.name: row.why for row in plan.settings}
    assert reasons["rollout-kv-fp8"] == ""
    assert reasons["rollout-batch-1"] == "not asked for"
    assert plan.seconds > 0
    assert AttributionPlan.model_validate_json(plan.model_dump_json()) == plan


def test_the_comparisons_report_quotes_the_answer(plant: Callable[..., Planted]) -> None:
    planted = plant(settings=("none",))
    document, path = document_of(planted), planted.base.run.path
    assert {file.name for file in (path / "attribute").iterdir()} >= {"attribution.json", "report.html", "report.md"}
    assert mismatch_probe.Run.open(path).report().data.attribution == document
    page = (path / "report.html").read_text(encoding="utf-8")
    assert all(str(escape(text)) in page for text in attribution_answer(document))


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 99}', '{"schema_version": 2, "gap": {}}'])
def test_a_damaged_attribution_is_an_error_that_says_what_to_do(text: str, run_copy: Path) -> None:
    path = run_copy / "attribute" / "attribution.json"
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TableError, match=r"attribution\.json") as caught:
        mismatch_probe.Run.open(run_copy).report()
    assert "Install a newer" in caught.value.fix or f"attribute --from {run_copy}`" in caught.value.fix
