"""An audit of finished runs of the scripted engine: the document, its files, and a comparison with an older one."""

from __future__ import annotations

import copy
import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest

import mismatch_probe
from mismatch_probe.config import CompareConfig
from mismatch_probe.errors import DtypeRefused, Interrupted, TableError, UsageError
from mismatch_probe.metrics.accounting import ExcludedValue
from mismatch_probe.probes.audit.baseline import compare_audits, read_audit
from mismatch_probe.probes.audit.checks import Checks
from mismatch_probe.probes.audit.junit import junit_xml
from mismatch_probe.probes.audit.options import AuditOptions
from mismatch_probe.probes.audit.profile import Bounds, Profile
from mismatch_probe.probes.progress import Progress
from mismatch_probe.probes.session import RunResult
from mismatch_probe.resources import data_path
from tests.conftest import MakeModel

Document = dict[str, Any]
ONE_PAIR: dict[str, Any] = {
    "num_prompts": 4,
    "max_tokens": 4,
    "rollout_dtypes": ("bfloat16",),
    "trainer_dtypes": ("bfloat16",),
}
SCHEMA = json.loads(data_path("audit.schema.json").read_text(encoding="utf-8"))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take most of the time, and few tests look at them."""
    monkeypatch.setattr("mismatch_probe.report.figures.audit.draw_audit", lambda document, folder: {})


@pytest.fixture(scope="module")
def audited(finished: RunResult, tmp_path_factory: pytest.TempPathFactory) -> Document:
    """Of the finished run; read it, never change it."""
    copied = Path(shutil.copytree(finished.path, tmp_path_factory.mktemp("audited") / "run"))
    return mismatch_probe.audit_run(copied).document


@pytest.fixture
def document(audited: Document) -> Document:
    return copy.deepcopy(audited)


def valid(document: Document) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(document)


def pair_of(document: Document, rollout: str, trainer: str) -> Document:
    return next(p for p in document["pairs"] if (p["rollout_dtype"], p["trainer_dtype"]) == (rollout, trainer))


def check_of(pair: Document, name: str) -> Document:
    return next(check for check in pair["checks"] if check["name"] == name)


def test_a_finished_run_is_judged_as_far_as_it_goes(run_copy: Path, no_pictures: None) -> None:
    result = mismatch_probe.audit_run(run_copy)
    document = result.document
    valid(document)
    assert len(document["pairs"]) == 9
    assert all(found is None for found in document["range"].values())
    whats = [row["what"] for row in document["missing"]]
    assert "range of activations" in whats
    assert "--resume" in document["missing"][-1]["why"]
    fp16 = pair_of(document, "float16", "float16")
    assert check_of(fp16, "fp16_headroom")["status"] == "not judged"
    assert fp16["verdict"] in ("not judged", "fail")
    assert not any(check["name"].startswith("fp16") for check in pair_of(document, "bfloat16", "float32")["checks"])
    assert json.loads((run_copy / "audit" / "audit.json").read_text()) == document
    assert (run_copy / "audit" / "report.html").read_text().startswith("<!doctype html>")
    ElementTree.parse(run_copy / "audit" / "junit.xml")


def test_metrics_are_those_of_the_comparison(document: Document, finished: Any) -> None:
    for pair in document["pairs"]:
        source = next(
            p
            for p in finished.summary.pairs
            if (p.rollout_dtype, p.trainer_dtype) == (pair["rollout_dtype"], pair["trainer_dtype"])
        )
        for check in pair["checks"]:
            if check["name"] in source.metrics:
                metric = source.metrics[check["name"]]
                assert (check["value"], check["ci_low"]) == (metric.value, metric.ci_low)


def test_the_exact_kl_is_judged_where_rows_were_kept(
    scripted_model: MakeModel, tmp_path: Path, no_pictures: None, no_figures: None
) -> None:
    run = mismatch_probe.compare(
        CompareConfig(model=str(scripted_model()), exact_kl="all", **ONE_PAIR), out=tmp_path / "run"
    )
    document = mismatch_probe.audit_run(run.path).document
    (pair,) = document["pairs"]
    value = run.summary.pairs[0].metrics["kl_exact"].value
    assert value is not None
    assert check_of(pair, "kl_exact")["value"] == value
    assert any("exact KL" in sentence for sentence in document["recommendation"]["sentences"])


def test_the_asked_for_pair_decides(run_copy: Path, no_pictures: None) -> None:
    found = mismatch_probe.audit_run(run_copy, pairs=("fp16/fp16",))
    assert found.document["decided_by"] == ["float16 → float16"]
    assert found.verdict == pair_of(found.document, "float16", "float16")["verdict"]
    assert found.failed


def test_a_pair_that_was_not_run_cannot_pass(scripted_model: MakeModel, tmp_path: Path, no_pictures: None) -> None:
    config = CompareConfig(model=str(scripted_model()), **ONE_PAIR)
    run = mismatch_probe.compare(config, out=tmp_path / "run")
    found = mismatch_probe.audit_run(run.path, pairs=("fp16",))
    assert found.verdict == "not judged"
    assert found.document["decided_by"] == []
    valid(found.document)


def test_a_run_without_fp32_says_that_a_bug_could_pass_for_rounding(
    scripted_model: MakeModel, tmp_path: Path, no_pictures: None
) -> None:
    config = CompareConfig(model=str(scripted_model()), **ONE_PAIR)
    run = mismatch_probe.compare(config, out=tmp_path / "run")
    pair = mismatch_probe.audit_run(run.path).document["pairs"][0]
    assert check_of(pair, "fp32_floor")["status"] == "not judged"
    assert "bug" in check_of(pair, "fp32_floor")["evidence"]


def test_a_failed_pass_leaves_its_pairs_missing(
    scripted_model: MakeModel, tmp_path: Path, no_pictures: None, no_figures: None
) -> None:
    model = str(scripted_model({"rollout-float16": "refuse"}))
    config = CompareConfig(model=model, **{**ONE_PAIR, "rollout_dtypes": ("bfloat16", "float16")})
    run = mismatch_probe.compare(config, out=tmp_path / "run")
    document = mismatch_probe.audit_run(run.path).document
    valid(document)
    assert document["missing"][0]["what"] == "float16 → bfloat16"


def test_a_scripted_model_has_nothing_to_measure(run_copy: Path) -> None:
    with pytest.raises(UsageError, match="no weights"):
        mismatch_probe.audit_resume(run_copy)


def test_a_refused_dtype_is_told_before_anything_is_loaded(scripted_model: MakeModel, tmp_path: Path) -> None:
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed, so its source has no table")
    model = scripted_model()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "gemma3"}))
    with pytest.raises(DtypeRefused, match="vLLM does not support float16 for model type gemma3"):
        mismatch_probe.audit(
            CompareConfig(model=str(model), rollout_dtypes=("float16",)), out=tmp_path / "run", profile="default"
        )
    assert not (tmp_path / "run").exists()


def test_options_are_checked() -> None:
    for given, message in (
        ({"planned_tokens": 0}, "--planned-tokens must be positive"),
        ({"step_tokens": -1}, "--step-tokens must be positive"),
        ({"learning_rates": (0.0,)}, "--learning-rate"),
        ({"pairs": ("bf16/fp8",)}, "is not rollout/trainer"),
    ):
        with pytest.raises(UsageError, match=message):
            AuditOptions(**given)
    assert AuditOptions(pairs=("bf16", "fp16/fp32")).wanted_pairs == (("bfloat16", "bfloat16"), ("float16", "float32"))


def test_junit_has_a_case_a_check(document: Document) -> None:
    root = ElementTree.fromstring(junit_xml(document))
    assert [suite.get("name") for suite in root][:2] == ["gate", "bfloat16/bfloat16"]
    checks = [check for pair in document["pairs"] for check in pair["checks"]]
    assert int(root.get("tests") or 0) == len(checks) + 1
    assert int(root.get("failures") or 0) == 0
    assert int(root.get("skipped") or 0) == sum(check["status"] in ("fail", "not judged") for check in checks)


def failures(document: Document, **options: bool) -> set[tuple[str | None, str | None]]:
    root = ElementTree.fromstring(junit_xml(document, **options))
    return {
        (suite.get("name"), case.get("name")) for suite in root for case in suite if case.find("failure") is not None
    }


def test_junit_fails_where_the_exit_code_does(document: Document) -> None:
    assert failures(document) == set()
    assert document["verdict"] == "warn"
    strict = failures(document, strict=True)
    assert ("gate", "verdict") in strict
    assert {suite for suite, _ in strict} <= {"gate", document["decided_by"][0].replace(" → ", "/")}
    for verdict in ("fail", "not judged"):
        assert ("gate", "verdict") in failures({**document, "verdict": verdict})
    worse = compare_audits(document, changed(document, "kl_k3", 20.0), "old")
    assert ("gate", "baseline") in failures({**document, "baseline": worse})


def test_junit_holds_hostile_text(document: Document) -> None:
    document["pairs"][0]["checks"][0]["evidence"] = "a\x1b[31m <b> & \x00 ]]>"
    root = ElementTree.fromstring(junit_xml(document))
    out = root[1][0].find("system-out")
    assert out is not None
    assert "a[31m <b> &  ]]>" in (out.text or "")


def test_an_audit_against_itself_has_not_changed(document: Document) -> None:
    found = compare_audits(document, copy.deepcopy(document), "old")
    assert found["regressions"] == []
    assert found["changed"] == []
    assert found["gone"] == []
    assert all(row["change"] is None or row["change"]["value"] in (0, 1) for row in found["checks"])
    assert not any(row["regressed"] for row in found["checks"])
    valid({**document, "baseline": found})


def changed(document: Document, check_name: str, factor: float, **more: Any) -> Document:
    other = copy.deepcopy(document)
    check = check_of(pair_of(other, "bfloat16", "bfloat16"), check_name)
    for key in ("value", "ci_low", "ci_high"):
        check[key] = None if check[key] is None else check[key] * factor
    check.update(more)
    return other


def test_a_gap_that_is_certainly_larger_is_a_regression(document: Document) -> None:
    worse = compare_audits(document, changed(document, "kl_k3", 20.0), "old")
    (row,) = worse["regressions"]
    assert (row["name"], row["change"]["kind"], row["change"]["value"]) == ("kl_k3", "ratio", pytest.approx(20.0))
    assert row["change"]["ci_low"] > 1
    assert compare_audits(document, changed(document, "kl_k3", 1 / 20), "old")["regressions"] == []
    assert compare_audits(document, changed(document, "kl_k3", 1.01), "old")["regressions"] == []


def test_the_interval_of_a_ratio_is_that_of_two_independent_estimates(document: Document) -> None:
    first = changed(document, "kl_k3", 1.0, value=1.0, ci_low=0.8, ci_high=1.25)
    second = changed(document, "kl_k3", 1.0, value=2.0, ci_low=1.6, ci_high=2.5)
    rows = compare_audits(first, second, "old")["checks"]
    row = next(r for r in rows if r["name"] == "kl_k3" and r["rollout_dtype"] == r["trainer_dtype"] == "bfloat16")
    spread = 1.25 ** (2**0.5)
    assert row["change"]["ci_low"] == pytest.approx(2 / spread)
    assert row["change"]["ci_high"] == pytest.approx(2 * spread)


def test_a_status_that_got_worse_is_a_regression_only_where_the_value_changed_for_certain(document: Document) -> None:
    first = changed(document, "kl_k3", 1.0, value=0.9e-3, ci_low=0.8e-3, ci_high=0.99e-3, status="pass", best="pass")
    near = changed(document, "kl_k3", 1.0, value=1.1e-3, ci_low=1.01e-3, ci_high=1.3e-3, status="warn", best="warn")
    far = changed(document, "kl_k3", 1.0, value=9e-3, ci_low=8e-3, ci_high=9.9e-3, status="warn", best="warn")
    assert [row["name"] for row in compare_audits(first, far, "old")["regressions"]] == ["kl_k3"]
    wide = changed(document, "kl_k3", 1.0, value=0.9e-3, ci_low=0.4e-3, ci_high=1.9e-3, status="pass", best="pass")
    assert compare_audits(wide, near, "old")["regressions"] == []


def regressions(before: Document, after: Document) -> list[str]:
    return [row["name"] for row in compare_audits(before, after, "old")["regressions"]]


def test_a_counted_event_that_was_not_there_before_is_a_regression(document: Document) -> None:
    name = "nonfinite_logprobs"
    other = changed(document, name, 1.0, value=0.01, ci_low=0.001, ci_high=0.05, status="fail", best="fail")
    before = changed(document, name, 1.0, value=0.0, ci_low=0.0, ci_high=0.005, status="pass", best="pass")
    assert regressions(before, other) == [name]
    assert regressions(other, before) == []


def test_impossible_log_probs_fail_the_check_of_those_that_are_not_finite(finished: RunResult) -> None:
    name = "nonfinite_logprobs"
    profile = Profile(name="own", checks={name: Bounds(event="fail", source="us")})
    checks = Checks(profile, finished.summary, {}, {}, 256)
    pair = finished.summary.pairs[0]
    # Among so few prompts none excludes no rate that the profile asks to exclude.
    assert [(check.name, check.status) for check in checks.of_pair(pair)] == [(name, "not judged")]
    excluded = (ExcludedValue("rollout", "sentinel", "-9999", 3),)
    (check,) = checks.of_pair(pair.model_copy(update={"n_excluded": 3, "excluded": excluded}))
    assert check.status == "fail"
    assert "rollout -9999: 3" in check.evidence


def test_a_fault_that_was_mended_is_none(document: Document) -> None:
    broken = changed(document, "one_sided", 1.0, value=0.7, ci_low=0.68, ci_high=0.72, status="fail", best="fail")
    whole = changed(document, "one_sided", 1.0, value=1.0, ci_low=0.99, ci_high=1.01, status="pass", best="pass")
    assert regressions(broken, whole) == []
    assert regressions(whole, broken) == ["one_sided"]


EXACT = {"ci_low": None, "ci_high": None, "exact": True}
OPEN = {"ci_low": None, "ci_high": None, "exact": False}


def test_a_value_that_is_no_ground_to_judge_on_is_none_for_a_regression(document: Document) -> None:
    before, after = (changed(document, "kl_k3", 1.0, value=value, **OPEN) for value in (1e-5, 1e-2))
    assert regressions(before, after) == []
    largest = {"name": "max_abs_logprob_diff", **OPEN}
    before, after = (changed(document, "kl_k3", 1.0, value=value, **largest) for value in (5.0, 6.0))
    assert regressions(before, after) == []
    after["pairs"][0]["checks"] = [
        {**check, "best": "fail"} if check["name"] == "max_abs_logprob_diff" else check
        for check in after["pairs"][0]["checks"]
    ]
    assert regressions(before, after) == ["max_abs_logprob_diff"]


def test_a_pair_that_fails_by_a_new_check_is_a_regression(document: Document) -> None:
    after = copy.deepcopy(document)
    after["pairs"][0]["verdict"] = "fail"
    after["pairs"][0]["checks"].append({**after["pairs"][0]["checks"][0], "name": "kl_exact", "best": "fail"})
    assert regressions(document, after) == ["verdict"]


def test_what_is_computed_counts_by_its_value_in_the_direction_of_its_limits(document: Document) -> None:
    # A check of the model's own range, in the place of one that the scripted run has.
    def headroom(value: float, **more: Any) -> Document:
        limits = {"warn_below": 4.0, "fail_below": 1.0}
        return changed(document, "kl_k3", 1.0, value=value, name="fp16_headroom", limits=limits, **EXACT, **more)

    assert regressions(headroom(1000.0), headroom(4.1)) == ["fp16_headroom"]
    assert regressions(headroom(4.1), headroom(1000.0)) == []
    assert regressions(headroom(2.29, status="pass", best="pass"), headroom(2.29, status="warn", best="warn")) == []
    assert regressions(headroom(4.1, best="pass"), headroom(3.9, best="warn")) == ["fp16_headroom"]


def test_loss_scales_are_compared_by_powers_of_two(document: Document) -> None:
    def room(value: float) -> Document:
        limits = {"warn_below": 2.0, "fail_below": 0.0}
        return changed(document, "kl_k3", 1.0, value=value, name="fp16_loss_scale", limits=limits, best="pass", **EXACT)

    (row,) = compare_audits(room(13.0), room(8.0), "old")["regressions"]
    assert (row["change"]["kind"], row["change"]["value"], row["why"]) == ("difference", -5.0, "worse by at least 5")
    assert regressions(room(13.0), room(12.0)) == []


def test_a_value_near_1_counts_by_the_way_to_its_limit(document: Document) -> None:
    def error(value: float) -> Document:
        return changed(
            document, "token_mult_prob_error", 1.0, value=value, ci_low=value - 1e-4, ci_high=value + 1e-4, best="pass"
        )

    assert regressions(error(1.001), error(1.049)) == ["token_mult_prob_error"]
    assert regressions(error(1.049), error(1.001)) == []
    assert regressions(error(1.001), error(1.0011)) == []


def test_a_pair_that_was_usable_and_is_gone_or_open_now_is_a_regression(document: Document) -> None:
    gone = copy.deepcopy(document)
    lost = gone["pairs"].pop(0)
    assert lost["verdict"] in ("pass", "warn")
    found = compare_audits(document, gone, "old")
    assert [(row["name"], row["why"]) for row in found["regressions"]] == [("verdict", "the pair is gone")]
    valid({**document, "baseline": found})
    unjudged = copy.deepcopy(document)
    unjudged["pairs"][0]["verdict"] = "not judged"
    assert regressions(document, unjudged) == ["verdict"]
    assert regressions(unjudged, document) == []
    refused = copy.deepcopy(document)
    refused["pairs"][0] |= {"verdict": "fail", "checks": [{**lost["checks"][0], "name": "fp16_refusal"}]}
    assert regressions(document, refused) == ["verdict"]


def test_a_baseline_that_had_not_measured_a_check_is_not_beaten(document: Document) -> None:
    unknown = changed(document, "kl_k3", 1.0, value=None, ci_low=None, ci_high=None, status="not judged", best="pass")
    assert regressions(unknown, changed(document, "kl_k3", 1.0, status="warn", best="warn")) == []


def test_what_was_made_differently_is_listed(document: Document) -> None:
    other = copy.deepcopy(document)
    other["provenance"]["versions"]["vllm"] = "99"
    other["provenance"]["config"]["eager"] = True
    found = compare_audits(document, other, "old")["changed"]
    assert {row["what"] for row in found} == {"versions.vllm", "config.eager"}
    other["pairs"].pop()
    assert len(compare_audits(document, other, "old")["gone"]) == len(document["pairs"][-1]["checks"])


def test_a_baseline_closes_the_gate(run_copy: Path, document: Document, tmp_path: Path, no_pictures: None) -> None:
    better = changed(document, "kl_k3", 1 / 50)
    (tmp_path / "old.json").write_text(json.dumps(better))
    found = mismatch_probe.audit_run(run_copy, baseline=tmp_path / "old.json", pairs=("bf16",))
    assert found.regressed
    assert found.failed
    valid(found.document)


def test_a_baseline_is_found_by_its_file_or_folder(run_copy: Path, tmp_path: Path, no_pictures: None) -> None:
    document = mismatch_probe.audit_run(run_copy).document
    for place in (run_copy, run_copy / "audit", run_copy / "audit" / "audit.json"):
        assert read_audit(place) == document
    with pytest.raises(TableError, match="There is no audit"):
        read_audit(tmp_path)
    (tmp_path / "audit.json").write_text('{"schema_version": 9}')
    with pytest.raises(TableError, match="no audit that this release reads"):
        read_audit(tmp_path / "audit.json")
    for damaged in ({"schema_version": 1, "pairs": []}, {**document, "pairs": {}}, {**document, "pairs": [{}]}, []):
        (tmp_path / "audit.json").write_text(json.dumps(damaged))
        with pytest.raises(TableError, match="no audit that this release reads"):
            read_audit(tmp_path / "audit.json")
    (tmp_path / "audit.json").write_text("{")
    with pytest.raises(TableError, match="cannot be read"):
        read_audit(tmp_path)


def test_a_look_at_a_run_changes_nothing_of_it(run_copy: Path, no_pictures: None) -> None:
    before = (run_copy / "manifest.json").read_bytes()
    mismatch_probe.audit_run(run_copy, planned_tokens=17, profile="verl", strict=True)
    assert (run_copy / "manifest.json").read_bytes() == before
    assert mismatch_probe.audit_run(run_copy).document["options"]["planned_tokens"] == 48


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
    tmp_path: Path, prompt: list[int], no_pictures: None, no_figures: None
) -> None:
    run = mismatch_probe.compare(CompareConfig(source=str(recorded(tmp_path, prompt))), out=tmp_path / "run")
    document = mismatch_probe.audit_run(run.path).document
    valid(document)
    (pair,) = document["pairs"]
    assert check_of(pair, "kl_k3")["status"] == "pass"
    snippets = document["recommendation"]["snippets"]
    assert [found["framework"] for found in snippets] == ["trl", "verl"]
    assert not any("recorded" in found["text"] for found in snippets)
    with pytest.raises(UsageError, match="names no model"):
        mismatch_probe.audit_resume(run.path)


def test_a_run_whose_rollouts_all_failed_is_not_judged(
    scripted_model: MakeModel, tmp_path: Path, no_pictures: None, no_figures: None
) -> None:
    config = CompareConfig(model=str(scripted_model({"rollout-bfloat16": "refuse"})), **ONE_PAIR)
    with pytest.raises(TableError):
        mismatch_probe.compare(config, out=tmp_path / "run")
    found = mismatch_probe.audit_run(tmp_path / "run")
    valid(found.document)
    assert (found.verdict, found.failed, found.document["recommendation"]) == ("not judged", True, None)


def test_two_trainer_modes_are_two_pairs_and_share_no_prediction(
    scripted_model: MakeModel, tmp_path: Path, no_pictures: None, no_figures: None
) -> None:
    sizes = {**ONE_PAIR, "num_prompts": 12, "max_tokens": 12}
    config = CompareConfig(model=str(scripted_model()), trainer_modes=("cast", "autocast"), **sizes)
    run = mismatch_probe.compare(config, out=tmp_path / "run")
    document = mismatch_probe.audit_run(run.path).document
    valid(document)
    cast, autocast = document["pairs"]
    assert (cast["trainer_mode"], autocast["trainer_mode"]) == ("cast", "autocast")
    assert check_of(autocast, "ess_seq_planned")["status"] == "not judged"
    assert "only the mode cast was predicted" in check_of(autocast, "ess_seq_planned")["evidence"]
    assert compare_audits(document, copy.deepcopy(document), "old")["regressions"] == []


class Impatient(Progress):
    """Stops at the first trainer pass."""

    def __init__(self, error: type[BaseException]) -> None:
        self._error = error

    def begin(self, pass_id: str, text: str) -> None:
        if pass_id.startswith("hf"):
            raise self._error


def test_an_audit_that_dies_keeps_what_it_was_asked_for(
    scripted_model: MakeModel, tmp_path: Path, no_pictures: None, no_figures: None
) -> None:
    config = CompareConfig(model=str(scripted_model()), num_prompts=4, max_tokens=4)
    with pytest.raises(ZeroDivisionError):
        mismatch_probe.audit(config, out=tmp_path / "run", planned_tokens=99, progress=Impatient(ZeroDivisionError))
    mismatch_probe.resume(tmp_path / "run")
    assert mismatch_probe.audit_run(tmp_path / "run").document["options"]["planned_tokens"] == 99


def test_an_audit_leaves_another_runs_folder_alone(scripted_model: MakeModel, run_copy: Path) -> None:
    before = (run_copy / "manifest.json").read_bytes()
    with pytest.raises(UsageError, match="not empty"):
        mismatch_probe.audit(CompareConfig(model=str(scripted_model()), **ONE_PAIR), out=run_copy)
    assert (run_copy / "manifest.json").read_bytes() == before


def test_an_interrupted_audit_goes_on_as_an_audit_and_keeps_what_it_was_asked_for(
    scripted_model: MakeModel, tmp_path: Path, no_pictures: None, no_figures: None
) -> None:
    config = CompareConfig(model=str(scripted_model()), num_prompts=4, max_tokens=4)
    with pytest.raises(Interrupted) as error:
        mismatch_probe.audit(
            config,
            out=tmp_path / "run",
            planned_tokens=99,
            pairs=("bf16",),
            strict=True,
            progress=Impatient(KeyboardInterrupt),
        )
    resume = f"mismatch-probe audit --resume {tmp_path / 'run'} --pair bf16 --strict"
    assert error.value.fix == f"Continue with: {resume}"
    mismatch_probe.resume(tmp_path / "run")
    assert mismatch_probe.audit_run(tmp_path / "run").document["options"]["planned_tokens"] == 99
