"""An audit of finished runs of the scripted engine: the document, its files, and a comparison with an older one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import mismatch_probe
from mismatch_probe.config import AuditOptions
from mismatch_probe.errors import DtypeRefused, Interrupted, TableError, UsageError
from mismatch_probe.probes.audit.baseline import compare_audits, read_audit
from mismatch_probe.probes.audit.checks import Checks
from mismatch_probe.probes.audit.profile import Profile
from mismatch_probe.probes.progress import Progress
from mismatch_probe.report.junit import junit_xml
from mismatch_probe.results.audit import Audit, AuditedPair, Bounds, Check, CheckChange
from mismatch_probe.results.ranges import Range
from mismatch_probe.run import Run
from mismatch_probe.types import MetricValue
from tests.conftest import MakeModel

ONE_PAIR: dict[str, Any] = {
    "num_prompts": 4,
    "max_tokens": 4,
    "rollout_dtypes": ("bfloat16",),
    "trainer_dtypes": ("bfloat16",),
}


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch, no_figures: None) -> None:
    """Figures take most of the time, and few tests look at them."""
    monkeypatch.setattr("mismatch_probe.report.figures.draw", lambda data, folder: {})


@pytest.fixture(scope="module")
def document(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Audit:
    """Of the finished run."""
    copied = Path(shutil.copytree(finished.path, tmp_path_factory.mktemp("audited") / "run"))
    return mismatch_probe.Run.open(copied).audit(engines=False).audit


def pair_of(audit: Audit, rollout: str, trainer: str) -> AuditedPair:
    return next(pair for pair in audit.pairs if pair.dtypes == (rollout, trainer))


def check_of(pair: AuditedPair, name: str) -> Check:
    found = pair.check(name)
    assert found is not None
    return found


def with_pairs(audit: Audit, pairs: Iterable[AuditedPair]) -> Audit:
    return audit.model_copy(update={"pairs": tuple(pairs)})


def codes(found: Iterable[CheckChange]) -> list[tuple[str, str]]:
    return [(row.name, "" if row.finding is None else row.finding.code) for row in found]


def test_a_finished_run_is_judged_as_far_as_it_goes(run_copy: Path, no_pictures: None) -> None:
    audit = mismatch_probe.Run.open(run_copy).audit(engines=False).audit
    assert len(audit.pairs) == 9
    assert audit.range == Range()
    (missing,) = audit.missing
    assert (missing.code, "forward" in missing.names("parts")) == ("audit-parts-missing", True)
    fp16 = pair_of(audit, "float16", "float16")
    headroom = check_of(fp16, "fp16_headroom")
    assert headroom.verdict == "inconclusive"
    assert headroom.settle is not None
    assert headroom.settle.parts == ("forward",)
    assert fp16.verdict in ("inconclusive", "fail")
    assert not any(check.name.startswith("fp16") for check in pair_of(audit, "bfloat16", "float32").checks)
    assert Audit.read(run_copy / "audit" / "audit.json") == audit
    for name in ("report.html", "report.md"):
        assert "FP16: inconclusive" in (run_copy / "audit" / name).read_text()
    ElementTree.parse(run_copy / "audit" / "junit.xml")


def test_metrics_are_those_of_the_comparison(document: Audit, finished: Run) -> None:
    for pair in document.pairs:
        source = next(p for p in finished.summary.pairs if (p.rollout_dtype, p.trainer_dtype) == pair.dtypes)
        for check in pair.checks:
            if check.name in source.metrics:
                metric = source.metrics[check.name]
                assert (check.value.value, check.value.ci_low) == (metric.value, metric.ci_low)


def test_the_exact_kl_is_judged_where_rows_were_kept(
    scripted_model: MakeModel, tmp_path: Path, no_pictures: None
) -> None:
    run = mismatch_probe.compare(model=str(scripted_model()), exact_kl="all", **ONE_PAIR, out=tmp_path / "run")
    audit = mismatch_probe.Run.open(run.path).audit(engines=False).audit
    (pair,) = audit.pairs
    value = run.summary.pairs[0].metrics["kl_exact"].value
    assert value is not None
    assert check_of(pair, "kl_exact").value.value == value
    assert audit.recommendation is not None
    (expected,) = (finding for finding in audit.recommendation.findings if finding.code == "audit-expected-kl")
    assert expected.text("metric") == "kl_exact"


def test_the_asked_for_pair_decides(run_copy: Path, no_pictures: None) -> None:
    found = mismatch_probe.Run.open(run_copy).audit(engines=False, pairs=("fp16/fp16",))
    assert [name.dtypes for name in found.audit.decided_by] == [("float16", "float16")]
    assert found.verdict == pair_of(found.audit, "float16", "float16").verdict
    assert found.failed


def test_a_pair_that_was_not_run_cannot_be_ok(scripted_model: MakeModel, tmp_path: Path, no_pictures: None) -> None:
    config = dict(model=str(scripted_model()), **ONE_PAIR)
    run = mismatch_probe.compare(**config, out=tmp_path / "run")
    found = mismatch_probe.Run.open(run.path).audit(engines=False, pairs=("fp16",))
    assert (found.verdict, found.audit.decided_by) == ("inconclusive", ())
    assert found.audit.missing[0].code == "audit-pairs-not-in-run"


def test_a_run_without_fp32_cannot_tell_a_fault_from_rounding(
    scripted_model: MakeModel, tmp_path: Path, no_pictures: None
) -> None:
    config = dict(model=str(scripted_model()), **ONE_PAIR)
    run = mismatch_probe.compare(**config, out=tmp_path / "run")
    floor = check_of(mismatch_probe.Run.open(run.path).audit(engines=False).audit.pairs[0], "fp32_floor")
    assert (floor.verdict, floor.finding.code) == ("inconclusive", "audit-no-fp32-pair")
    assert floor.settle is not None
    assert floor.settle.dtypes == ("float32",)


def test_a_failed_pass_leaves_its_pairs_missing(scripted_model: MakeModel, tmp_path: Path, no_pictures: None) -> None:
    model = str(scripted_model({"rollout-float16": "refuse"}))
    config = dict(model=model, **{**ONE_PAIR, "rollout_dtypes": ("bfloat16", "float16")})
    run = mismatch_probe.compare(**config, out=tmp_path / "run")
    missing = mismatch_probe.Run.open(run.path).audit(engines=False).audit.missing[0]
    assert (missing.code, missing.names("pairs")) == ("audit-pairs-missing", ("float16/bfloat16/cast",))


def test_a_scripted_model_has_nothing_to_measure(run_copy: Path) -> None:
    with pytest.raises(UsageError, match="no weights"):
        mismatch_probe.Run.open(run_copy).audit()


def test_a_refused_dtype_is_told_before_anything_is_loaded(scripted_model: MakeModel, tmp_path: Path) -> None:
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed, so its source has no table")
    model = scripted_model()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "gemma3"}))
    with pytest.raises(DtypeRefused, match="vLLM does not support float16 for model type gemma3"):
        mismatch_probe.audit(model=str(model), rollout_dtypes=("float16",), out=tmp_path / "run", profile="default")
    assert not (tmp_path / "run").exists()


def test_options_are_checked() -> None:
    for given, message in (
        ({"planned_tokens": 0}, "--planned-tokens must be above 0"),
        ({"step_tokens": -1}, "--step-tokens must be above 0"),
        ({"learning_rates": (0.0,)}, "--learning-rate"),
        ({"pairs": ("bf16/fp8",)}, "is not rollout/trainer"),
    ):
        with pytest.raises(UsageError, match=message):
            AuditOptions(**given)
    assert AuditOptions(pairs=("bf16", "fp16/fp32")).wanted_pairs == (("bfloat16", "bfloat16"), ("float16", "float32"))


def test_junit_has_a_case_a_check(document: Audit) -> None:
    root = ElementTree.fromstring(junit_xml(document))
    assert [suite.get("name") for suite in root][:2] == ["gate", "bfloat16/bfloat16"]
    checks = [check for pair in document.pairs for check in pair.checks]
    assert int(root.get("tests") or 0) == len(checks) + 1
    assert int(root.get("failures") or 0) == 0
    assert int(root.get("skipped") or 0) == sum(check.verdict in ("fail", "inconclusive") for check in checks)


def failures(audit: Audit, *, strict: bool = False) -> set[tuple[str | None, str | None]]:
    asked = audit.options.model_copy(update={"strict": strict})
    root = ElementTree.fromstring(junit_xml(audit.model_copy(update={"options": asked})))
    return {
        (suite.get("name"), case.get("name")) for suite in root for case in suite if case.find("failure") is not None
    }


def test_junit_fails_where_the_exit_code_does(document: Audit) -> None:
    assert failures(document) == set()
    assert document.verdict == "warn"
    strict = failures(document, strict=True)
    assert ("gate", "verdict") in strict
    assert {suite for suite, _ in strict} <= {"gate", "/".join(document.decided_by[0].dtypes)}
    for verdict in ("fail", "inconclusive"):
        assert ("gate", "verdict") in failures(document.model_copy(update={"verdict": verdict}))
    worse = compare_audits(document, changed(document, "kl_k3", 20.0), "old")
    assert ("gate", "baseline") in failures(document.model_copy(update={"baseline": worse}))


def test_junit_holds_hostile_text(document: Audit) -> None:
    told = document.missing[0].model_copy(
        update={"code": "audit-dtype-unsupported", "values": {"why": "a\x1b[31m <b> & \x00 ]]>"}}
    )
    first = document.pairs[0]
    check = first.checks[0].model_copy(update={"finding": told})
    pairs = (first.model_copy(update={"checks": (check, *first.checks[1:])}), *document.pairs[1:])
    out = ElementTree.fromstring(junit_xml(with_pairs(document, pairs)))[1][0].find("system-out")
    assert out is not None
    assert "a[31m <b> &  ]]>" in (out.text or "")


def test_an_audit_against_itself_has_not_changed(document: Audit) -> None:
    found = compare_audits(document, document, "old")
    assert (found.regressions, found.changed, found.gone) == ((), (), ())
    assert all(row.change is None or row.change.value in (0, 1) for row in found.checks)
    assert not any(row.finding for row in found.checks)


def changed(audit: Audit, which: str, factor: float = 1.0, value: MetricValue | None = None, **more: Any) -> Audit:
    """An audit whose BF16 pair has another value of one check, and whatever else is given of it."""
    pairs = []
    for pair in audit.pairs:
        checks = list(pair.checks)
        if pair.dtypes == ("bfloat16", "bfloat16"):
            i = next(i for i, check in enumerate(checks) if check.name == which)
            old = checks[i].value
            ends = (None if x is None else x * factor for x in (old.value, old.ci_low, old.ci_high))
            checks[i] = checks[i].model_copy(update={"value": value or MetricValue(*ends), **more})
        pairs.append(pair.model_copy(update={"checks": tuple(checks)}))
    return with_pairs(audit, pairs)


def test_a_gap_that_is_certainly_larger_is_a_regression(document: Audit) -> None:
    (row,) = compare_audits(document, changed(document, "kl_k3", 20.0), "old").regressions
    assert row.change is not None
    assert (row.name, row.change.kind, row.change.value) == ("kl_k3", "ratio", pytest.approx(20.0))
    assert (row.change.ci_low or 0) > 1
    assert regressions(document, changed(document, "kl_k3", 1 / 20)) == []
    assert regressions(document, changed(document, "kl_k3", 1.01)) == []


def test_the_interval_of_a_ratio_is_that_of_two_independent_estimates(document: Audit) -> None:
    first = changed(document, "kl_k3", value=MetricValue(1.0, 0.8, 1.25))
    second = changed(document, "kl_k3", value=MetricValue(2.0, 1.6, 2.5))
    rows = compare_audits(first, second, "old").checks
    row = next(r for r in rows if r.name == "kl_k3" and r.dtypes == ("bfloat16", "bfloat16"))
    assert row.change is not None
    spread = 1.25 ** (2**0.5)
    assert row.change.ci_low == pytest.approx(2 / spread)
    assert row.change.ci_high == pytest.approx(2 * spread)


OK, WARN, FAIL = ({"verdict": level, "best": level} for level in ("ok", "warn", "fail"))


def test_a_verdict_that_got_worse_is_a_regression_only_where_the_value_changed_for_certain(document: Audit) -> None:
    first = changed(document, "kl_k3", value=MetricValue(0.9e-3, 0.8e-3, 0.99e-3), **OK)
    near = changed(document, "kl_k3", value=MetricValue(1.1e-3, 1.01e-3, 1.3e-3), **WARN)
    far = changed(document, "kl_k3", value=MetricValue(9e-3, 8e-3, 9.9e-3), **WARN)
    assert codes(compare_audits(first, far, "old").regressions) == [("kl_k3", "audit-verdict-worse")]
    wide = changed(document, "kl_k3", value=MetricValue(0.9e-3, 0.4e-3, 1.9e-3), **OK)
    assert regressions(wide, near) == []


def regressions(before: Audit, after: Audit) -> list[str]:
    return [row.name for row in compare_audits(before, after, "old").regressions]


def test_a_counted_event_that_was_not_there_before_is_a_regression(document: Audit) -> None:
    name = "nonfinite_logprobs"
    other = changed(document, name, value=MetricValue(0.01, 0.001, 0.05), **FAIL)
    before = changed(document, name, value=MetricValue(0.0, 0.0, 0.005), **OK)
    assert regressions(before, other) == [name]
    assert regressions(other, before) == []


def test_impossible_log_probs_fail_the_check_of_those_that_are_not_finite(finished: Run) -> None:
    name = "nonfinite_logprobs"
    profile = Profile(name="own", checks={name: Bounds(event="fail", source="us")})
    checks = Checks(profile, finished.summary.pairs, {}, Range(), (), 256)
    pair = finished.summary.pairs[0]
    # Among so few prompts none excludes no rate that the profile asks to exclude.
    assert [(check.name, check.verdict) for check in checks.of_pair(pair)] == [(name, "inconclusive")]
    excluded = ({"side": "rollout", "kind": "sentinel", "value": "-9999", "n": 3},)
    broken = type(pair).model_validate({**dict(pair), "n_excluded": 3, "excluded": excluded})
    (check,) = checks.of_pair(broken)
    assert (check.verdict, check.finding.names("values")) == ("fail", ("rollout -9999: 3",))


def test_a_fault_that_was_fixed_is_no_regression(document: Audit) -> None:
    broken = changed(document, "one_sided", value=MetricValue(0.7, 0.68, 0.72), **FAIL)
    whole = changed(document, "one_sided", value=MetricValue(1.0, 0.99, 1.01), **OK)
    assert regressions(broken, whole) == []
    assert regressions(whole, broken) == ["one_sided"]


def test_a_value_that_is_no_ground_to_judge_on_is_none_for_a_regression(document: Audit) -> None:
    before, after = (changed(document, "kl_k3", value=MetricValue(value)) for value in (1e-5, 1e-2))
    assert regressions(before, after) == []
    name = "max_abs_logprob_diff"
    before, after = (changed(document, "kl_k3", value=MetricValue(value), name=name) for value in (5.0, 6.0))
    assert regressions(before, after) == []
    after = changed(document, "kl_k3", value=MetricValue(6.0), name=name, **FAIL)
    assert regressions(before, after) == [name]


def of_first(audit: Audit, **changes: Any) -> Audit:
    return with_pairs(audit, (audit.pairs[0].model_copy(update=changes), *audit.pairs[1:]))


def test_a_pair_that_fails_by_a_new_check_is_a_regression(document: Audit) -> None:
    first = document.pairs[0]
    new = first.checks[0].model_copy(update={"name": "kl_exact", "best": "fail"})
    after = of_first(document, verdict="fail", checks=(*first.checks, new))
    assert regressions(document, after) == ["verdict"]


def test_what_is_computed_counts_by_its_value_in_the_direction_of_its_limits(document: Audit) -> None:
    # A check of the model's own range, in the place of one that the scripted run has.
    def headroom(value: float, **more: Any) -> Audit:
        bounds = Bounds(warn_below=4.0, fail_below=1.0)
        given = {"name": "fp16_headroom", "bounds": bounds, "exact": True} | more
        return changed(document, "kl_k3", value=MetricValue(value), **given)

    assert regressions(headroom(1000.0), headroom(4.1)) == ["fp16_headroom"]
    assert regressions(headroom(4.1), headroom(1000.0)) == []
    assert regressions(headroom(2.29, **OK), headroom(2.29, **WARN)) == []
    assert regressions(headroom(4.1, **OK), headroom(3.9, **WARN)) == ["fp16_headroom"]


def test_loss_scales_are_compared_by_powers_of_two(document: Audit) -> None:
    def room(value: float) -> Audit:
        given = {"name": "fp16_loss_scale", "bounds": Bounds(warn_below=2.0, fail_below=0.0), "exact": True}
        return changed(document, "kl_k3", value=MetricValue(value), **given, **OK)

    (row,) = compare_audits(room(13.0), room(8.0), "old").regressions
    assert row.change is not None
    assert row.finding is not None
    assert (row.change.kind, row.change.value) == ("difference", -5.0)
    assert (row.finding.code, row.finding.number("amount")) == ("audit-value-worse-by", 5.0)
    assert regressions(room(13.0), room(12.0)) == []


def test_a_value_near_1_counts_by_the_way_to_its_limit(document: Audit) -> None:
    def error(value: float) -> Audit:
        return changed(document, "token_mult_prob_error", value=MetricValue(value, value - 1e-4, value + 1e-4), **OK)

    assert regressions(error(1.001), error(1.049)) == ["token_mult_prob_error"]
    assert regressions(error(1.049), error(1.001)) == []
    assert regressions(error(1.001), error(1.0011)) == []


def test_a_pair_that_was_usable_and_is_gone_or_open_now_is_a_regression(document: Audit) -> None:
    lost = document.pairs[0]
    assert lost.verdict in ("ok", "warn")
    found = compare_audits(document, with_pairs(document, document.pairs[1:]), "old")
    assert codes(found.regressions) == [("verdict", "audit-pair-gone")]
    open_ = of_first(document, verdict="inconclusive")
    assert regressions(document, open_) == ["verdict"]
    assert regressions(open_, document) == []
    unsupported = lost.checks[0].model_copy(update={"name": "fp16_unsupported"})
    assert regressions(document, of_first(document, verdict="fail", checks=(unsupported,))) == ["verdict"]


def test_a_baseline_that_had_not_measured_a_check_is_not_beaten(document: Audit) -> None:
    unknown = changed(document, "kl_k3", value=MetricValue(None), verdict="inconclusive", best="ok")
    assert regressions(unknown, changed(document, "kl_k3", **WARN)) == []


def test_what_was_made_differently_is_listed(document: Audit) -> None:
    made = document.provenance
    environment = made.environment.model_copy(update={"versions": {**made.environment.versions, "vllm": "99"}})
    config = made.config.replace(eager=True)
    other = document.model_copy(
        update={"provenance": made.model_copy(update={"environment": environment, "config": config})}
    )
    found = compare_audits(document, other, "old").changed
    assert {row.what for row in found} == {"environment.versions.vllm", "config.eager"}
    fewer = with_pairs(document, document.pairs[:-1])
    assert len(compare_audits(document, fewer, "old").gone) == len(document.pairs[-1].checks)


def test_a_baseline_closes_the_gate(run_copy: Path, document: Audit, tmp_path: Path, no_pictures: None) -> None:
    changed(document, "kl_k3", 1 / 50).write(tmp_path / "old.json")
    found = mismatch_probe.Run.open(run_copy).audit(engines=False, baseline=tmp_path / "old.json", pairs=("bf16",))
    assert found.regressed
    assert found.failed
    assert Audit.read(run_copy / "audit" / "audit.json") == found.audit


def test_a_baseline_is_found_by_its_file_or_folder(run_copy: Path, tmp_path: Path, no_pictures: None) -> None:
    audit = mismatch_probe.Run.open(run_copy).audit(engines=False).audit
    for place in (run_copy, run_copy / "audit", run_copy / "audit" / "audit.json"):
        assert read_audit(place) == audit
    for damaged in ("{}", "{", '{"schema_version": 9}', '{"schema_version": 1}', '{"schema_version": 2}'):
        (tmp_path / "audit.json").write_text(damaged)
        with pytest.raises(TableError, match=r"audit\.json"):
            read_audit(tmp_path)
    with pytest.raises(TableError, match="does not exist"):
        read_audit(tmp_path / "none.json")


def test_a_look_at_a_run_changes_nothing_of_it(run_copy: Path, no_pictures: None) -> None:
    before = (run_copy / "manifest.json").read_bytes()
    mismatch_probe.Run.open(run_copy).audit(engines=False, planned_tokens=17, profile="verl", strict=True)
    assert (run_copy / "manifest.json").read_bytes() == before
    assert mismatch_probe.Run.open(run_copy).audit(engines=False).audit.options.planned_tokens == 48


def recorded(folder: Path, prompt: list[int], n: int = 40) -> Path:
    rows = [
        {
            "prompt_token_ids": prompt,
            "response_token_ids": [5, 6, 7],
            "rollout_logprobs": [-1.0, -2.0, -0.5],
            "trainer_logprobs": [-1.01, -1.99, -0.5 + 0.001 * i],
            "prompt_id": f"p{i}",
        }
        for i in range(n)
    ]
    path = folder / "rollouts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("prompt", [[1, 2], []])
def test_a_recorded_run_is_judged_by_its_log_probs_and_names_no_dtype(
    tmp_path: Path, prompt: list[int], no_pictures: None
) -> None:
    run = mismatch_probe.compare(source=str(recorded(tmp_path, prompt)), out=tmp_path / "run")
    (tmp_path / "lax.toml").write_text("[checks.kl_k3]\nfail_above = 1.0\n")
    audit = mismatch_probe.Run.open(run.path).audit(engines=False, profile=str(tmp_path / "lax.toml")).audit
    (pair,) = audit.pairs
    assert check_of(pair, "kl_k3").verdict == "ok"
    assert audit.recommendation is not None
    snippets = audit.recommendation.snippets
    assert [found.framework for found in snippets] == ["trl", "verl"]
    assert not any("recorded" in found.text for found in snippets)
    with pytest.raises(UsageError, match="names no model"):
        mismatch_probe.Run.open(run.path).audit()


def test_a_run_whose_rollouts_all_failed_is_inconclusive(
    scripted_model: MakeModel, tmp_path: Path, no_pictures: None
) -> None:
    config = dict(model=str(scripted_model({"rollout-bfloat16": "refuse"})), **ONE_PAIR)
    with pytest.raises(TableError):
        mismatch_probe.compare(**config, out=tmp_path / "run")
    found = mismatch_probe.Run.open(tmp_path / "run").audit(engines=False)
    assert (found.verdict, found.failed, found.audit.recommendation) == ("inconclusive", True, None)


def test_two_trainer_modes_are_two_pairs_and_share_no_prediction(
    scripted_model: MakeModel, tmp_path: Path, no_pictures: None
) -> None:
    sizes = {**ONE_PAIR, "num_prompts": 12, "max_tokens": 12}
    config = dict(model=str(scripted_model()), trainer_modes=("cast", "autocast"), **sizes)
    run = mismatch_probe.compare(**config, out=tmp_path / "run")
    audit = mismatch_probe.Run.open(run.path).audit(engines=False).audit
    cast, autocast = audit.pairs
    assert (cast.trainer_mode, autocast.trainer_mode) == ("cast", "autocast")
    ess = check_of(autocast, "ess_seq_planned")
    assert (ess.verdict, ess.value.why) == ("inconclusive", "only the mode cast was predicted")
    assert compare_audits(audit, audit, "old").regressions == ()


class Impatient(Progress):
    """Stops at the first trainer pass."""

    def __init__(self, error: type[BaseException]) -> None:
        self._error = error

    def begin(self, pass_id: str, text: str) -> None:
        if pass_id.startswith("hf"):
            raise self._error


def test_an_audit_that_dies_keeps_what_it_was_asked_for(
    scripted_model: MakeModel, tmp_path: Path, no_pictures: None
) -> None:
    config = {"model": str(scripted_model()), "num_prompts": 4, "max_tokens": 4}
    with pytest.raises(ZeroDivisionError):
        mismatch_probe.audit(**config, out=tmp_path / "run", planned_tokens=99, progress=Impatient(ZeroDivisionError))
    mismatch_probe.Run.open(tmp_path / "run").resume()
    assert mismatch_probe.Run.open(tmp_path / "run").audit(engines=False).audit.options.planned_tokens == 99


def test_an_audit_leaves_another_runs_folder_alone(scripted_model: MakeModel, run_copy: Path) -> None:
    before = (run_copy / "manifest.json").read_bytes()
    with pytest.raises(UsageError, match="not empty"):
        mismatch_probe.audit(model=str(scripted_model()), **ONE_PAIR, out=run_copy)
    assert (run_copy / "manifest.json").read_bytes() == before


def test_an_interrupted_audit_goes_on_as_an_audit_and_keeps_what_it_was_asked_for(
    scripted_model: MakeModel, tmp_path: Path, no_pictures: None
) -> None:
    config = {"model": str(scripted_model()), "num_prompts": 4, "max_tokens": 4}
    with pytest.raises(Interrupted) as error:
        mismatch_probe.audit(
            **config,
            out=tmp_path / "run",
            planned_tokens=99,
            pairs=("bf16",),
            strict=True,
            progress=Impatient(KeyboardInterrupt),
        )
    resume = f"mismatch-probe audit --resume {tmp_path / 'run'} --pair bf16 --strict"
    assert error.value.fix == f"Continue with: {resume}"
    mismatch_probe.Run.open(tmp_path / "run").resume()
    assert mismatch_probe.Run.open(tmp_path / "run").audit(engines=False).audit.options.planned_tokens == 99
